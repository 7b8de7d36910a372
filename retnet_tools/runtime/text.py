"""Text to token ids and back, with the tokenizer of an exported folder, or plain ids where it has none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, UsageError
from retnet_tools.tokens import TOKENIZER_FILE, load_tokenizer

_LONGEST_ID = 18
"""Digits of the longest number that is surely an int64."""


class TextCodec:
    """The tokenizer of a folder: encode a prompt, decode a stream, know where text ends.

    Args:
        folder: an exported folder.
        vocab_size: of the model.

    Raises:
        InputError: a tokenizer file that cannot be read, or whose ids do not fit the model.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        size = self._tokenizer.get_vocab_size()
        if size > vocab_size:
            raise InputError(
                f"{folder / TOKENIZER_FILE} has {size} tokens", f"at most the model's {vocab_size}", "use --token-ids"
            )
        self.end_ids = end_of_text_ids(folder, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as the tokenizer's own post-processor makes them."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def stream(self) -> TextStream:
        """A decoder for one sequence, token by token."""
        return TextStream(self._tokenizer)


class TextStream:
    """Turns tokens into text as they come; a character that spans tokens appears with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        return self._stream.step(self._tokenizer, token) or ""


class IdCodec:
    """Token ids as text: numbers separated by spaces or commas in, by spaces out."""

    end_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            UsageError: something that is not a number.
        """
        words = [word for word in re.split(r"[\s,]+", text) if word]
        for word in words:
            if not word.isdecimal() or len(word) > _LONGEST_ID:
                raise UsageError(
                    f"{word!r} in the prompt",
                    "token ids, since there is no tokenizer in use",
                    "for example -p '12 7 300'",
                )
        return [int(word) for word in words]

    def stream(self) -> IdStream:
        """A decoder for one sequence, token by token."""
        return IdStream()


class IdStream:
    """Turns token ids into numbers separated by spaces."""

    def __init__(self) -> None:
        self._separator = ""

    def push(self, token: int) -> str:
        """The number, after a space unless it is the first."""
        text, self._separator = f"{self._separator}{token}", " "
        return text


def open_codec(folder: Path, vocab_size: int, *, token_ids: bool) -> TextCodec | IdCodec:
    """The folder's tokenizer, or plain ids when it has none or they are asked for.

    Raises:
        UsageError: a stack without vocabulary.
    """
    if not vocab_size:
        raise UsageError(
            f"{folder} holds a stack without embedding and head",
            "a model with a vocabulary, to generate text",
            "run its step.onnx with inputs_embeds",
        )
    if token_ids or not (folder / TOKENIZER_FILE).is_file():
        return IdCodec()
    return TextCodec(folder, vocab_size)


def end_of_text_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: `eos_token_id` of generation_config.json, or `eos_token` of tokenizer_config.json or
    special_tokens_map.json. The first file that names one decides.
    """
    file = folder / "generation_config.json"
    ids = _read_json(file).get("eos_token_id")
    if ids is not None:
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(number) is int for number in ids):
            raise InputError(f"{file} has eos_token_id {ids}", "a token id or a list of them")
        return frozenset(ids)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / name).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and (number := tokenizer.token_to_id(content)) is not None:
            return frozenset([number])
    return frozenset()


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
