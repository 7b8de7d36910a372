"""A text as tokens, with the bytes that each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.evaluate.logits import TokenReader
from retnet_tools.runtime.codec import IdCodec
from retnet_tools.tokenizing.files import find_tokenizer
from retnet_tools.tokenizing.token_ids import check_vocabulary
from retnet_tools.tokenizing.tokenizers_library import encoding
from retnet_tools.weights import Array


@dataclass(frozen=True)
class ScoredText:
    """Tokens to score.

    Attributes:
        ids: `[N]` int64.
        sizes: `[N]` int64, UTF-8 bytes of the text from the end of the token before to the end of this one, so that
            sums over neighbours are the length of what they cover: a character that several tokens make counts with
            the first, what the tokenizer drops with the token after it, and a token that the tokenizer adds has none.
            None for a text of token ids.
        notes: what the user should know.
    """

    ids: Array
    sizes: Array | None
    notes: tuple[str, ...] = ()


def read_tokens(
    text: str,
    source: TokenReader,
    baseline: TokenReader | None = None,
    *,
    token_ids: bool = False,
    start_token: str | None = None,
    limit: int | None = None,
) -> ScoredText:
    """A text through the model's tokenizer, or numbers as token ids.

    Args:
        source: the model.
        baseline: a model that is to have the same tokenizer.
        token_ids: the text is token ids, separated by spaces or commas.
        start_token: a token to put before the text, as its id or as the tokenizer writes it.
        limit: tokens of the text to take at most, from its beginning.

    Raises:
        UsageError: no tokenizer, an unknown start token, a word that is no id, another vocabulary or tokenizer in the
            baseline.
        InputError: a tokenizer that cannot be read, a token outside the vocabulary.
    """
    if baseline is not None and baseline.vocab_size != source.vocab_size:
        raise UsageError(
            f"{baseline.name} has a vocabulary of {baseline.vocab_size}, {source.name} of {source.vocab_size}",
            "two models of one vocabulary",
        )
    tokenizer, sizes, notes = None, None, tuple[str, ...]()
    if token_ids:
        ids = np.array(IdCodec().encode(text), dtype=np.int64)
    else:
        search = find_tokenizer(source.tokenizer_files, source.vocab_size)
        tokenizer = search.require(f"a text for {source.name}", "add one, or give token ids: --token-ids").tokenizer
        encoded = encoding(tokenizer, text)
        ids = np.array(encoded.ids, dtype=np.int64)
        sizes = byte_sizes(text, np.array([end for _, end in encoded.offsets], dtype=np.int64))[:limit]
        notes = () if baseline is None else _check_tokenizer(tokenizer, source, baseline, text, ids)
    ids = ids[:limit]
    if start_token is not None:
        ids = np.concatenate([[_token_id(start_token, tokenizer, source)], ids])
        sizes = None if sizes is None else np.concatenate([[0], sizes])
    check_vocabulary(ids, source.vocab_size, tokenizer, InputError)
    return ScoredText(ids, sizes, notes)


def byte_sizes(text: str, ends: Array) -> Array:
    """UTF-8 bytes from the end of one token to that of the next, `[N]`, for ends `[N]` in characters."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    reached = np.maximum.accumulate(ends) if len(ends) else ends
    return np.diff(offsets[reached], prepend=0)


def _check_tokenizer(
    tokenizer: Any, source: TokenReader, baseline: TokenReader, text: str, ids: Array
) -> tuple[str, ...]:
    found = find_tokenizer(baseline.tokenizer_files, baseline.vocab_size).found
    if found is None:
        return (f"{baseline.name} has no tokenizer: that its tokens mean the same is not checked",)
    other = found.tokenizer
    if other.get_vocab() != tokenizer.get_vocab() or not np.array_equal(other.encode(text).ids, ids):
        raise UsageError(
            f"the tokenizers of {source.name} and {baseline.name} differ",
            "two models of one tokenizer",
        )
    return ()


def _token_id(word: str, tokenizer: Any, source: TokenReader) -> int:
    number = None if tokenizer is None else tokenizer.token_to_id(word)
    if number is not None:
        return int(number)
    if word.isdecimal() and len(word) < 10:
        return int(word)
    raise UsageError(f"start token {word!r}", f"a token of {source.name} or its id")
