"""Float types: the names that users type, their numpy types, and conversion that never overflows in silence."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from retnet_tools.errors import RangeError, UsageError, did_you_mean

FloatName = Literal["float16", "bfloat16", "float32", "float64"]

_WORDS: dict[FloatName, tuple[str, ...]] = {
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "f32", "float"),
    "float64": ("fp64", "f64", "double"),
}
ALIASES: dict[str, FloatName] = {word: name for name, words in _WORDS.items() for word in (*words, name)}

NUMPY_DTYPES: dict[FloatName, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}

_BLOCK = 1 << 20
"""Elements converted at a time: small enough to stay in the cache for the check that follows."""


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


def convert_array(name: str, array: npt.NDArray[Any], target: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array in another float type, contiguous, converted in blocks on two threads.

    Args:
        name: of the tensor, for the error.

    Raises:
        RangeError: a finite value that becomes infinite, which float16 does past 65504.
    """
    if array.dtype == target:
        return np.ascontiguousarray(array)
    source = array.reshape(-1)
    result = np.empty(source.shape, target)

    def convert_block(start: int) -> None:
        block = slice(start, start + _BLOCK)
        with np.errstate(over="ignore"):
            result[block] = source[block]
        lost = source[block][np.isinf(result[block])]
        lost = lost[np.isfinite(lost)]
        if lost.size:
            raise RangeError(
                f"tensor {name!r} has the value {float(lost[0]):.6g}, which {target.name} cannot hold",
                f"magnitudes up to {_largest(target):.6g}",
                "use --dtype bf16 or fp32",
            )

    # numpy releases the interpreter lock while it converts.
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(convert_block, range(0, source.size, _BLOCK)):
            pass
    return result.reshape(array.shape)


def _largest(dtype: np.dtype[Any]) -> float:
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.max)
