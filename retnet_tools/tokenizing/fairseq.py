"""Vocabularies in files of their own: GPT-2's byte-level BPE (`vocab.json` and `merges.txt`, or `encoder.json` and
`vocab.bpe`), and fairseq's dict.txt, which gives the pieces of that or of a SentencePiece model other ids."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.inputs import load_json, read_input, read_words
from retnet_tools.tokenizing.sentence_piece import SentencePieceModel, sentence_piece_tokenizer
from retnet_tools.tokenizing.tokenizers_library import MAX_TOKEN_ID, library_errors

END_OF_TEXT = "<|endoftext|>"
"""The special token of GPT-2."""
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
"""fairseq's own words."""
SPECIAL_IDS = {"bos": 0, "pad": 1, "eos": 2}


def read_byte_level(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of its tokens, and its merges in order.

    Raises:
        InputError: files of another kind, or a merge of tokens that the vocabulary does not have.
    """
    from tokenizers import models

    document = load_json(vocab, "a byte-level BPE", "fetch it again")
    numbers = document.values() if isinstance(document, dict) else [document]
    if wrong := [n for n in numbers if type(n) is not int or not 0 <= n <= MAX_TOKEN_ID]:
        raise InputError(f"{vocab} has the id {str(wrong[0])[:40]}", f"an object with ids of 0 to {MAX_TOKEN_ID}")
    read_input(merges)
    with library_errors(f"{vocab} and {merges.name}"):
        ids, pairs = models.BPE.read_file(str(vocab), str(merges))
    for left, right in pairs:
        if not {left, right, left + right} <= ids.keys():
            raise InputError(f"{merges} merges {left!r} and {right!r}", f"tokens of {vocab.name}")
    if any("</w>" in token for token in ids):
        raise InputError(f"{vocab.name} marks the ends of words", "the byte-level BPE of GPT-2")
    return ids, pairs


def byte_level_tokenizer(
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    special: Iterable[str],
    *,
    beyond: int,
    prefix_space: bool = False,
) -> tuple[Any, int]:
    """A tokenizer that cuts a text as GPT-2's does, and how many bytes have no token.

    Args:
        special: tokens that are recognised in a text, and that are not shown.
        beyond: first id for bytes without a token, which no text should become in silence.
        prefix_space: a space before every text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys())
    beyond = max(beyond, 1 + max(ids.values(), default=-1))
    vocab = {**ids, **{symbol: beyond + i for i, symbol in enumerate(missing)}}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer, len(missing)


def read_dictionary(file: Path) -> dict[str, int]:
    """Ids by word: four of fairseq's own, then a line each, `word count [#fairseq:overwrite]`.

    Raises:
        InputError: a line of another kind, or a word that comes twice.
    """
    ids, count = dict(SPECIAL), len(SPECIAL)
    for number, line in enumerate(io.StringIO(read_words(file)), 1):
        word, _, last = line.rstrip().rpartition(" ")
        if overwrite := last == "#fairseq:overwrite":
            word, _, last = word.rpartition(" ")
        if not word or not _is_number(last):
            raise InputError(f"{file} has {line.strip()!r} in line {number}", "a word and its count")
        if word in ids and not overwrite:
            raise InputError(f"{file} has {word!r} twice (line {number})", "every word once")
        ids[word] = count
        count += 1
    return ids


def fairseq_sentence_piece(
    words: Mapping[str, int], model: SentencePieceModel, beyond: int
) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of a SentencePiece model with the dictionary's ids, and what the user should know.

    Pieces that are no words get ids from `beyond` on, which a text should not become in silence.
    """
    ids = dict(words)
    ids[model.unknown] = ids.pop("<unk>")
    ids, notes = _complete(ids, model.normal, beyond, model.file.name)
    ids, _ = _complete(ids, model.control, beyond, model.file.name)
    special = [*model.control, *(token for token in SPECIAL if token in ids)]
    return sentence_piece_tokenizer(model, ids, special), (*notes, *model.notes)


def fairseq_byte_level(words: Mapping[str, int], vocab: Path, merges: Path, beyond: int) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of GPT-2's BPE with the dictionary's ids, whose words are GPT-2's ids in decimal.

    Raises:
        InputError: as `read_byte_level`, or a dictionary of other words.
    """
    numbers, pairs = read_byte_level(vocab, merges)
    tokens = {str(number): token for token, number in numbers.items()}
    ids = {tokens.get(word, word): number for word, number in words.items()}
    if not any(word in tokens for word in words):
        raise InputError("dict.txt holds no number", f"the ids of {vocab.name} as its words")
    ids, notes = _complete(ids, numbers, beyond, vocab.name)
    tokenizer, _ = byte_level_tokenizer(ids, pairs, SPECIAL, beyond=beyond)
    return tokenizer, notes


def _complete(
    ids: Mapping[str, int], pieces: Iterable[str], beyond: int, name: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ids for the pieces that have none."""
    missing = [piece for piece in pieces if piece not in ids]
    beyond = max(beyond, 1 + max(ids.values()))
    notes: tuple[str, ...] = ()
    if missing:
        count = len(missing)
        notes = (f"dict.txt lacks {count} pieces of {name}, such as {missing[0]!r}: a prompt that has one is refused",)
    return {**ids, **{piece: beyond + i for i, piece in enumerate(missing)}}, notes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
