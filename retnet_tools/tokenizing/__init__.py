"""Tokenizers and special tokens: what lies beside a model's weights, and what is carried on from it.

A tokenizer is always a `tokenizers.Tokenizer`, read from tokenizer.json or made of the files of another library.
"""
