"""GPT-2's byte-level BPE (`vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`) as tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError

END_OF_TEXT = "<|endoftext|>"


def read_byte_level(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of its tokens, and its merges in order.

    Raises:
        InputError: files of another kind, or a merge of tokens that the vocabulary does not have.
    """
    from tokenizers import models

    try:
        ids, pairs = models.BPE.read_file(str(vocab), str(merges))
    except Exception as error:
        raise InputError(f"{vocab} and {merges.name} cannot be read ({error})", "a byte-level BPE") from error
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
        ids: of the tokens.
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
