"""Float types by the names that users type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from retnet_tools.errors import UsageError, did_you_mean

FloatName = Literal["float16", "bfloat16", "float32", "float64"]

ALIASES: dict[str, FloatName] = {
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "float32": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "float64": "float64",
}


def parse_dtype(text: str, allowed: Sequence[FloatName] = ("float16", "bfloat16", "float32", "float64")) -> FloatName:
    """The float type that a word names, in any case.

    Raises:
        UsageError: a word that names none, or one that is not allowed here.
    """
    name = ALIASES.get(text.strip().lower())
    if name is not None and name in allowed:
        return name
    words = [word for word, meaning in ALIASES.items() if meaning in allowed]
    short = [word for word in words if word.startswith(("fp", "bf16"))]
    raise UsageError(f"dtype {text!r}", f"one of {', '.join(short)}", did_you_mean(text.strip().lower(), words))
