"""What to run a model on: seeded random token ids, or a text through the checkpoint's tokenizer; random embeddings for
a stack without one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.tokenizing.files import find_tokenizer
from retnet_tools.tokenizing.tokenizers_library import encoding

RANDOM_ROWS = 2


@dataclass(frozen=True)
class ChosenTokens:
    """Token ids `[rows, T]`, or embeddings `[rows, T, D]`, and in words where they come from."""

    ids: npt.NDArray[Any]
    source: str


def choose_tokens(
    config: RetNetConfig, tokenizer_files: Iterable[Path], text: str | None, *, length: int, seed: int
) -> ChosenTokens:
    """The first `length` tokens of a text, or two rows of random ones where there is no text.

    A stack without an embedding gets random embeddings.

    Raises:
        UsageError: a text without tokens, with a token that the model lacks or for a model without a vocabulary, no
            tokenizer, a length below 1.
        InputError: a tokenizer that cannot be read.
    """
    if length < 1:
        raise UsageError(f"{length} tokens", "at least 1")
    vocab_size = config.vocab_size
    if text is not None and not config.has_vocabulary:
        raise UsageError("a text for a stack without embedding", "random embeddings", "leave the text out")
    if not config.has_vocabulary:
        embeddings = np.random.default_rng(seed).standard_normal((RANDOM_ROWS, length, config.hidden_size))
        return ChosenTokens(embeddings, f"random embeddings, seed {seed}")
    if text is None:
        return ChosenTokens(random_tokens(vocab_size, RANDOM_ROWS, length, seed), f"random, seed {seed}")
    tokenizer = find_tokenizer(tokenizer_files, vocab_size).require("a text").tokenizer
    ids = encoding(tokenizer, text).ids[:length]
    if not ids:
        raise UsageError("a text without tokens", "at least one token")
    check_vocabulary(ids, vocab_size, tokenizer)
    return ChosenTokens(np.array([ids], dtype=np.int64), "from a text")


def random_tokens(vocab_size: int, rows: int, length: int, seed: int) -> npt.NDArray[np.int64]:
    """Uniform token ids `[rows, length]`, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length), dtype=np.int64)


def check_vocabulary(
    ids: Sequence[int] | npt.NDArray[np.int64],
    vocab_size: int,
    tokenizer: Any = None,
    error: type[RetNetToolsError] = UsageError,
) -> None:
    """Refuse a text with a token that the model does not have; a tokenizer may have more tokens than the embedding.

    Args:
        tokenizer: what made the ids of a text, to name the token.
        error: the kind to raise for an id that is none of 0 to `vocab_size` - 1.
    """
    wrong = next((int(i) for i in ids if not 0 <= i < vocab_size), None) if len(ids) else None
    if wrong is None:
        return
    word = None if tokenizer is None else tokenizer.id_to_token(wrong)
    raise error(
        f"token id {wrong}" if word is None else f"token {word!r} (id {wrong}) in the text",
        f"0 to {vocab_size - 1}, the ids that the model has",
    )
