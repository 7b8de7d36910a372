"""What the tokenizers library raises about a stranger's file, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retnet_tools.errors import InputError, RetNetToolsError

MAX_TOKEN_ID = (1 << 22) - 1
"""A table of tokens is as long as its largest id."""
_PANIC = "PanicException"


@contextmanager
def library_errors(what: object, problem: str = "cannot be read") -> Iterator[None]:
    """Turns the library's errors, which are bare exceptions or its own panics, into one about `what`."""
    try:
        yield
    except RetNetToolsError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise InputError(f"{what} {problem} ({error})", "a tokenizer of the tokenizers library") from error


def encoding(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Any:
    """The library's encoding of a text.

    Raises:
        InputError: a tokenizer that has no token for a part of it, and none for what it does not know.
    """
    with library_errors("the tokenizer", "cannot cut a text"):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
