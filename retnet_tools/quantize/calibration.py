"""Sequences to calibrate on, drawn from a text.

The text is cut into windows of `SEQUENCE` tokens, and as many as are wanted are drawn by the seed and kept in the
order of the text. It is read and tokenized about a megabyte at a time, up to a line's end: memory is 8 bytes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError
from retnet_tools.graph.quantization import Calibration
from retnet_tools.tokens import TOKENIZER_FILE, load_tokenizer
from retnet_tools.weights import Array

SEQUENCE = 512
DEFAULT_TOKENS = 128 * SEQUENCE
_PIECE = 1 << 20


@dataclass(frozen=True)
class CalibrationText:
    """A text to learn from.

    Attributes:
        record: what retnet.json says of it.
        sequences: its tokens, `[S, T]` int64.
    """

    record: Calibration
    sequences: Array


@dataclass(frozen=True)
class CalibrationOptions:
    """Where a text comes from.

    Attributes:
        file: a text in UTF-8.
        tokens: how many to take, at most; in whole sequences.
        seed: of the draw.
    """

    file: Path
    tokens: int = DEFAULT_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < SEQUENCE:
            raise UsageError(f"{self.tokens} tokens to calibrate on", f"at least {SEQUENCE}, one sequence")


def read_calibration(
    options: CalibrationOptions, config: RetNetConfig, tokenizer_files: Sequence[Path]
) -> CalibrationText:
    """Read, tokenize and draw. A text of less than a sequence is taken as it is.

    Raises:
        UsageError: a model without a vocabulary, no tokenizer, a tokenizer of another vocabulary, no text.
        InputError: a file that cannot be read or is not UTF-8, or a broken tokenizer.
    """
    if not config.has_vocabulary:
        raise UsageError("a text for a stack without embedding", "a model with a vocabulary", "use --method rtn")
    file = next((f for f in tokenizer_files if f.name == TOKENIZER_FILE), None)
    if file is None:
        raise UsageError(f"no {TOKENIZER_FILE} with the model to read {options.file} with", action="add one")
    tokenizer, digest = load_tokenizer(file), hashlib.sha256()
    ids = np.concatenate(
        [np.array(tokenizer.encode(piece).ids, dtype=np.int64) for piece in _pieces(options.file, digest)]
        or [np.empty(0, dtype=np.int64)]
    )
    if not len(ids):
        raise UsageError(f"{options.file} holds no text", "a text to calibrate on")
    if ids.max() >= config.vocab_size:
        raise UsageError(f"token {ids.max()} from {file}", f"0 to {config.vocab_size - 1}, the model's vocabulary")
    sequences = draw_sequences(ids, options.tokens, options.seed)
    return CalibrationText(Calibration(options.file.name, digest.hexdigest(), sequences.size), sequences)


def draw_sequences(ids: Array, tokens: int, seed: int) -> Array:
    """Windows of the tokens `[N]`, `[S, T]`: S T is at most `tokens` and at most N."""
    length = min(SEQUENCE, len(ids))
    places = np.random.default_rng(seed).permutation(len(ids) // length)[: tokens // length]
    return np.stack([ids[place * length : (place + 1) * length] for place in np.sort(places)])


def _pieces(file: Path, digest: hashlib._Hash) -> Iterator[str]:
    """The text in pieces that end with a line."""
    try:
        with file.open("rb") as stream:
            while lines := stream.readlines(_PIECE):
                piece = b"".join(lines)
                digest.update(piece)
                yield piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 ({error.reason})", "a text in UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror or error})", "a text to calibrate on") from error
