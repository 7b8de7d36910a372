"""Sequences to calibrate on, drawn from a text.

The text is cut into windows of `SEQUENCE` tokens, and as many as are wanted are drawn by the seed and kept in the
order of the text. It is read and tokenized about a megabyte at a time, up to a line's end across which no token
reaches: memory is 8 bytes a token. Tokens that a tokenizer puts around a text are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import Calibration
from retnet_tools.quantize.options import SEQUENCE
from retnet_tools.tokenizing.files import find_tokenizer
from retnet_tools.tokenizing.text_files import text_pieces
from retnet_tools.tokenizing.token_ids import check_vocabulary
from retnet_tools.tokenizing.tokenizers_library import encoding
from retnet_tools.weights import Array

_AROUND = 256
"""Characters on each side of a cut that show whether a token would reach across it."""
_TRIES = 64
"""Line ends that are tried."""


@dataclass(frozen=True)
class CalibrationText:
    """A text to learn from: what retnet.json says of it, and its tokens, `[S, T]` int64."""

    record: Calibration
    sequences: Array


def read_calibration(
    file: Path, tokens: int, seed: int, config: RetNetConfig, tokenizer_files: Sequence[Path]
) -> CalibrationText:
    """Read, tokenize and draw. A text of less than a sequence is taken as it is.

    Args:
        file: a text in UTF-8.
        tokens: how many to take, at most; in whole sequences.
        seed: of the draw.

    Raises:
        UsageError: a model without a vocabulary, no tokenizer, a tokenizer of another vocabulary, no text.
        InputError: a file that cannot be read or is not UTF-8, or a broken tokenizer.
    """
    if not config.has_vocabulary:
        raise UsageError("a text for a stack without embedding", "a model with a vocabulary", "use --method rtn")
    tokenizer = find_tokenizer(tokenizer_files, config.vocab_size).require(f"a text, {file}").tokenizer
    digest = hashlib.sha256()
    parts = [np.array(part, dtype=np.int64) for part in _encode(tokenizer, text_pieces(file, digest))]
    ids = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    if not len(ids):
        raise UsageError(f"{file} holds no text", "a text to calibrate on")
    check_vocabulary(ids, config.vocab_size, tokenizer)
    sequences = draw_sequences(ids, tokens, seed)
    record = Calibration(
        text=file.name,
        sha256=digest.hexdigest(),
        tokens=sequences.size,
        sequence=sequences.shape[1],
        seed=seed,
        ids_sha256=hash_ids(sequences),
    )
    return CalibrationText(record, sequences)


def draw_sequences(ids: Array, tokens: int, seed: int) -> Array:
    """Windows of the tokens `[N]`, `[S, T]`: S T is at most `tokens` and at most N."""
    length = min(SEQUENCE, len(ids))
    places = np.random.default_rng(seed).permutation(len(ids) // length)[: tokens // length]
    return np.stack([ids[place * length : (place + 1) * length] for place in np.sort(places)])


def hash_ids(ids: Array) -> str:
    """sha256 of token ids in order, as int64, low bytes first."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


def _encode(tokenizer: Any, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of a text that comes in pieces, the same as those of the whole."""
    rest = ""
    for piece in pieces:
        rest += piece
        cut = _cut(tokenizer, rest)
        yield _ids(tokenizer, rest[:cut])
        rest = rest[cut:]
    yield _ids(tokenizer, rest)


def _cut(tokenizer: Any, text: str) -> int:
    """The last line's end across which no token reaches, whatever follows the text; 0 where none is found."""
    end = len(text) - _AROUND
    for _ in range(_TRIES):
        cut = text.rfind("\n", 0, max(end, 0)) + 1
        left, right = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
        if _ids(tokenizer, left + right) == _ids(tokenizer, left) + _ids(tokenizer, right):
            return cut
        end = cut - 1
    return 0


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = encoding(tokenizer, text, add_special_tokens=False).ids
    return ids
