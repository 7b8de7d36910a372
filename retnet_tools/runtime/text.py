"""Text to token ids and back, with the tokenizer of an exported folder, or plain ids where it has none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, UsageError
from retnet_tools.tokens import TOKENIZER_FILE, load_tokenizer, special_token_ids

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
        self.end_ids = frozenset(special_token_ids(folder, "eos", self._tokenizer))

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
