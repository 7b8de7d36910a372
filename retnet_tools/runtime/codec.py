"""Text to token ids and back, with the tokenizer of an exported folder, or plain ids where it has none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, UsageError
from retnet_tools.inputs import read_input
from retnet_tools.tokenizing.files import MAX_TOKENIZER, TOKENIZER_FILE, load_tokenizer
from retnet_tools.tokenizing.special import special_tokens
from retnet_tools.tokenizing.token_ids import check_vocabulary
from retnet_tools.tokenizing.tokenizers_library import encoding

_LONGEST_ID = 18
"""Digits of the longest number that is surely an int64."""


class TextCodec:
    """The tokenizer of a folder: encode a prompt, decode a stream, know where text ends.

    `fingerprint` is the sha256 of its file.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        self.fingerprint = hashlib.sha256(read_input(folder / TOKENIZER_FILE, MAX_TOKENIZER)).hexdigest()
        self._vocab_size = vocab_size
        self.end_ids = _end_ids(folder, vocab_size, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as the tokenizer's own post-processor makes them.

        Raises:
            InputError: half of a surrogate pair, which no text in Unicode has.
            UsageError: a token that the model does not have.
        """
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise InputError("a prompt with half of a surrogate pair", "text in Unicode")
        ids: list[int] = encoding(self._tokenizer, text).ids
        check_vocabulary(ids, self._vocab_size, self._tokenizer)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens by themselves."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

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

    fingerprint = "token ids"

    def __init__(self, end_ids: frozenset[int] = frozenset()) -> None:
        self.end_ids = end_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        words = [word for word in re.split(r"[\s,]+", text) if word]
        for word in words:
            if not word.isdecimal() or len(word) > _LONGEST_ID:
                raise UsageError(
                    f"{word!r} where token ids are read, without a tokenizer",
                    "numbers, such as 12 7 300",
                    "give ids, or a model with a tokenizer and no --token-ids",
                )
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(map(str, ids))

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


class StopMatcher:
    """Looks for stop strings in a stream of text, across its pieces; the one that begins first ends the text."""

    def __init__(self, stops: Collection[str]) -> None:
        if "" in stops:
            raise UsageError("an empty --stop", "a text to stop at")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is sure to stand before any stop string, and whether one is complete."""
        text = self._held + piece
        if found := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self._held = ""
            return text[: min(found)], True
        longest = max(map(len, self._stops), default=1) - 1
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


Codec = TextCodec | IdCodec


def open_codec(folder: Path, vocab_size: int, *, token_ids: bool = False) -> Codec:
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
    if not (folder / TOKENIZER_FILE).is_file():
        return IdCodec(_end_ids(folder, vocab_size, None))
    return IdCodec(TextCodec(folder, vocab_size).end_ids) if token_ids else TextCodec(folder, vocab_size)


def _end_ids(folder: Path, vocab_size: int, tokenizer: Any) -> frozenset[int]:
    return frozenset(special_tokens([folder], vocab_size, tokenizer).ids.get("eos", ()))
