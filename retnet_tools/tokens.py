"""What to run a model on: seeded random token ids, or a text through the checkpoint's tokenizer; random embeddings for
a stack without one. And which tokens start and end a text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError

TOKENIZER_FILE = "tokenizer.json"
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
        UsageError: a text without tokens or for a model of another vocabulary or of none, no `tokenizer.json`, a
            length below 1.
        InputError: a `tokenizer.json` that cannot be read.
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
    ids = text_tokens(text, tokenizer_files)[:, :length]
    if ids.max() >= vocab_size:
        raise UsageError(f"token {ids.max()} from {TOKENIZER_FILE}", f"0 to {vocab_size - 1}, the model's vocabulary")
    return ChosenTokens(ids, "from a text")


def random_tokens(vocab_size: int, rows: int, length: int, seed: int) -> npt.NDArray[np.int64]:
    """Uniform token ids `[rows, length]`, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length), dtype=np.int64)


def text_tokens(text: str, tokenizer_files: Iterable[Path]) -> npt.NDArray[np.int64]:
    """The tokens of a text, `[1, T]`.

    Raises:
        UsageError: no `tokenizer.json` among the files, or a text without tokens.
        InputError: a `tokenizer.json` that cannot be read.
    """
    file = next((f for f in tokenizer_files if f.name == TOKENIZER_FILE), None)
    if file is None:
        raise UsageError(f"a text, but no {TOKENIZER_FILE} with the checkpoint", action="add one or use random tokens")
    ids = load_tokenizer(file).encode(text).ids
    if not ids:
        raise UsageError("a text without tokens", "at least one token")
    return np.array([ids], dtype=np.int64)


def load_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file, without the truncation and padding that it may ask for.

    Raises:
        InputError: a file that is missing or not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file} cannot be read ({error})", "a tokenizer of the tokenizers library") from error
    # Settings of its training: they would cut a long text without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_token_ids(folder: Path, name: Literal["bos", "eos"], tokenizer: Any) -> tuple[int, ...]:
    """Ids that start (`bos`) or end (`eos`) a text: `eos_token_id` of generation_config.json, or `eos_token` of
    tokenizer_config.json or special_tokens_map.json. The first file that names one decides.

    Args:
        folder: where these files lie.
        name: which tokens.
        tokenizer: of the model; None where it has none, and only ids count.

    Raises:
        InputError: a file that is not a JSON object, or an id that is no number.
    """
    file = folder / "generation_config.json"
    ids = _read_json(file).get(f"{name}_token_id")
    if ids is not None:
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(number) is int for number in ids):
            raise InputError(f"{file} has {name}_token_id {ids}", "a token id or a list of them")
        return tuple(dict.fromkeys(ids))
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / other).get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if tokenizer is not None and content is not None and (number := tokenizer.token_to_id(content)) is not None:
            return (number,)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})", "a JSON object") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}", "a JSON object")
    return data
