"""Rotary angles, decay and scales of xPos: as the implementations compute them, and as a file stores them.

Implementations compute them step by step in float32 and run with the rounded numbers, so those are the model; one
rounding at the end would differ in the last bit. Where a file stores them in float32 or float64 they are read. A half
type rounds them until logits move by 0.05: then, and where they are not stored, they are computed here. Powers,
exponentials and logarithms are rounded correctly, which is what torch does but for about one power in a hundred, all of
them in heads of more than 64 key dimensions.
"""

from __future__ import annotations

import math
import re

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.spec import Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, is_floating

ONE = np.float32(1)
XPOS_BASE = 512
OTHER_SCHEDULE = 1e-5
"""Stored numbers that differ from the published schedule by more than this, relatively, are another schedule."""
ROUNDING = {"float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 0.0)}
"""Steps of the half types: relative, and of the smallest numbers, which rounding moves by half of it."""


def linspace_frequencies(head_k_dim: int) -> Array:
    """1 / 10000^linspace(0, 1, K/2), float32 `[K/2]`."""
    return _inverse_powers(_linspace(0.0, 1.0, head_k_dim // 2))


def rope_frequencies(head_k_dim: int) -> Array:
    """1 / 10000^(2i/K), float32 `[K/2]`."""
    return _inverse_powers(np.arange(0, head_k_dim, 2, dtype=np.float32) / np.float32(head_k_dim))


def paper_gammas(num_heads: int) -> Array:
    """1 - 2^(-5-h), float32 `[H]`; 1 from h = 20 on."""
    return (1 - 2.0 ** (-5.0 - np.arange(num_heads))).astype(np.float32)


def language_model_gammas(num_heads: int, first: float = math.log(1 / 32), last: float = math.log(1 / 512)) -> Array:
    """1 - exp(linspace(log 1/32, log 1/512, H)), float32 `[H]`: the paper's other schedule."""
    return ONE - np.exp(_linspace(first, last, num_heads).astype(np.float64)).astype(np.float32)


def log_float32(gammas: Array, base: int | None = None) -> Array:
    """log(gamma), or log2(gamma) for base 2, float32."""
    exact = gammas.astype(np.float64)
    return (np.log2(exact) if base == 2 else np.log(exact)).astype(np.float32)


def paper_log_decay(num_heads: int) -> Array:
    """log(1 - 2^(-5-h)), float32 `[H]`."""
    return log_float32(paper_gammas(num_heads))


def floats(values: Array) -> tuple[float, ...]:
    """The numbers as float64, for a configuration."""
    return tuple(float(value) for value in values)


def _inverse_powers(exponents: Array) -> Array:
    powers = (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    return ONE / powers


def _linspace(start: float, end: float, count: int) -> Array:
    """torch's: from the start in the first half, from the end in the second."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = (last - first) / np.float32(count - 1)
    i = np.arange(count, dtype=np.float32)
    # Each product and sum is fused in torch: rounded once.
    up, down = (np.float64(step) * x for x in (i, np.float32(count - 1) - i))
    return np.where(i < count // 2, first + up, last - down).astype(np.float32)


def read_buffer(source: Source, name: str, published: Array, *, rtol: float = OTHER_SCHEDULE) -> Array:
    """The numbers that the model runs with, where `published` is the schedule that the configuration names; the source
    notes where they are not those of the file, or not published.

    Raises:
        InputError: another shape, no floats, or another schedule in a half type, whose exact numbers nothing tells.
    """
    location = source.stored.locations.get(name)
    if location is None:
        return published
    if location.shape != published.shape:
        found = f"tensor {name!r} has shape {list(location.shape)}"
        raise InputError(found, f"{list(published.shape)}", "check that the configuration belongs to these weights")
    if not is_floating(location.dtype):
        raise InputError(f"tensor {name!r} is {location.dtype}", "float32")
    rounded, buffer = location.dtype.name in ROUNDING, location.read()
    alike = _is_alike(buffer, published, rtol)
    if rounded and not alike:
        found = f"tensor {name!r} holds another schedule than the published one, rounded to {location.dtype}"
        raise InputError(found, "float32, or the published schedule", "save it again in float32")
    if rounded:
        source.notes.append(f"{name} is rounded in the file: computed from the published schedules instead")
    elif not alike:
        source.notes.append(f"{name} in the file differs from the published schedules: used as stored")
    return published if rounded else buffer


def read_named(
    source: Source, name: str, named: Array, other: Array, refusal: InputError, *, rtol: float = OTHER_SCHEDULE
) -> Array:
    """`read_buffer` of the one of two published schedules that the configuration names; the refusal of the other."""
    location = source.stored.locations.get(name)
    if location is not None and location.shape == other.shape:
        found = location.read()
        if _is_alike(found, other, rtol) and not _is_alike(found, named, rtol):
            raise refusal
    return read_buffer(source, name, named, rtol=rtol)


def read_xpos(source: Source, template: str, key_dim: int) -> tuple[float, ...]:
    """The scales of xPos as a decay of each pair of key dimensions, log(z) / 512.

    xPos multiplies q by z^(n/512) and k by z^(-m/512), a decay of z^(1/512) a step; z_i = (2i + 0.4 K) / 1.4 K.

    Args:
        template: of the names of the stored scales z, `[key_dim / 2]`, as in `name_of_all`.

    Raises:
        InputError: as `read_buffer`; scales that are not above 0 and at most 1.
    """
    name, size = name_of_all(source.stored, template), np.float32(key_dim)
    z = (np.arange(0, size, 2, dtype=np.float32) + np.float32(0.4) * size) / (np.float32(1.4) * size)
    found = read_buffer(source, name, z)
    if not np.all((found > 0) & (found <= 1)):
        raise InputError(f"tensor {name!r} holds scales outside (0, 1]", "those of xPos")
    return floats(np.log(found.astype(np.float64)) / XPOS_BASE)


def read_angles(source: Source, name: str, head_k_dim: int) -> tuple[float, ...]:
    """Rotary frequencies `[K/2]`, stored twice in a row, `[K]`; `linspace_frequencies` where they are not stored.

    Raises:
        InputError: as `read_buffer`; two angles of a pair differ.
    """
    angles = read_buffer(source, name, np.repeat(linspace_frequencies(head_k_dim), 2))
    if not np.array_equal(angles[0::2], angles[1::2]):
        raise InputError(f"tensor {name!r} has pairs of different angles", "each angle twice in a row")
    return floats(angles[0::2])


def name_of_all(stored: StoredTensors, template: str) -> str:
    """The stored name of a buffer that all layers `{i}` and heads `{h}` share, once they are found to be equal.

    Raises:
        InputError: two of them differ.
    """
    numbered = re.compile(re.sub(r"\\\{[ih]\\\}", r"\\d+", re.escape(template)))
    found = [name for name in stored.names() if numbered.fullmatch(name)]
    for other in found[1:]:
        if not stored.same_data(found[0], other):
            raise InputError(f"tensor {other!r} differs from {found[0]!r}", "one for all", "this is not supported")
    return found[0] if found else template.format(i=0, h=0)


def _is_alike(found: Array, published: Array, rtol: float) -> bool:
    relative, absolute = ROUNDING.get(found.dtype.name, (rtol, 0.0))
    return bool(np.allclose(found.astype(np.float64), published, rtol=relative, atol=absolute))
