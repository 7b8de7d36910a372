"""A text as tokens, with the bytes that each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.runtime.codec import IdCodec
from retnet_tools.tokenizing.files import TokenizerSearch, find_tokenizer
from retnet_tools.tokenizing.token_ids import check_vocabulary
from retnet_tools.weights import Array


class TokenReader(Protocol):
    """A model as far as texts become its tokens; a `LogitsSource` is one."""

    @property
    def name(self) -> str:
        """Its path, for people."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        ...

    @property
    def tokenizer_files(self) -> Sequence[Path]:
        """Files beside it, its tokenizer among them if it has one."""
        ...


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
    tokenizer = None
    if token_ids:
        result = ScoredText(np.array(IdCodec().encode(text), dtype=np.int64), None)
    else:
        tokenizer = (
            _find(source).require(f"a text for {source.name}", "add one, or give token ids: --token-ids").tokenizer
        )
        result = _encode(tokenizer, text)
        if baseline is not None:
            result = replace(result, notes=_check_tokenizer(tokenizer, source, baseline, text, result.ids))
    result = _first(result, limit)
    if start_token is not None:
        result = _after(_token_id(start_token, tokenizer, source), result)
    check_vocabulary(result.ids, source.vocab_size, tokenizer, InputError)
    return result


def byte_sizes(text: str, ends: Array) -> Array:
    """UTF-8 bytes from the end of one token to that of the next, `[N]`, for ends `[N]` in characters."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    reached = np.maximum.accumulate(ends) if len(ends) else ends
    return np.diff(offsets[reached], prepend=0)


def _find(source: TokenReader) -> TokenizerSearch:
    return find_tokenizer(source.tokenizer_files, source.vocab_size)


def _encode(tokenizer: Any, text: str) -> ScoredText:
    encoding = tokenizer.encode(text)
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    return ScoredText(np.array(encoding.ids, dtype=np.int64), byte_sizes(text, ends))


def _check_tokenizer(
    tokenizer: Any, source: TokenReader, baseline: TokenReader, text: str, ids: Array
) -> tuple[str, ...]:
    found = _find(baseline).found
    if found is None:
        return (f"{baseline.name} has no tokenizer: that its tokens mean the same is not checked",)
    other = found.tokenizer
    if other.get_vocab() != tokenizer.get_vocab() or not np.array_equal(other.encode(text).ids, ids):
        raise UsageError(
            f"the tokenizers of {source.name} and {baseline.name} differ",
            "two models of one tokenizer",
        )
    return ()


def _first(text: ScoredText, limit: int | None) -> ScoredText:
    if limit is None:
        return text
    return replace(text, ids=text.ids[:limit], sizes=None if text.sizes is None else text.sizes[:limit])


def _after(token: int, text: ScoredText) -> ScoredText:
    sizes = None if text.sizes is None else np.concatenate([[0], text.sizes])
    return replace(text, ids=np.concatenate([[token], text.ids]), sizes=sizes)


def _token_id(word: str, tokenizer: Any, source: TokenReader) -> int:
    number = None if tokenizer is None else tokenizer.token_to_id(word)
    if number is not None:
        return int(number)
    if word.isdecimal() and len(word) < 10:
        return int(word)
    raise UsageError(f"start token {word!r}", f"a token of {source.name} or its id")
