"""Schedules that a file stores as buffers: rotary angles, decay, scales of xPos.

Implementations compute them in float32 and run with the rounded numbers, so those are the model. Where a file stores
them in float32 or float64 they are read. A half type rounds them until logits move by 0.05: then, and where they are
not stored, they are computed from the published schedule, in float32 as well.
"""

from __future__ import annotations

import re

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, is_floating

OTHER_SCHEDULE = 1e-5
"""Stored numbers that differ from the published schedule by more than this, relatively, are another schedule."""
HALF_TYPES = {"float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 0.0)}
"""Steps of the half types: relative, and of the smallest numbers, which rounding moves by half of it."""


def read_buffer(
    stored: StoredTensors, name: str, published: Array, *, rtol: float = OTHER_SCHEDULE
) -> tuple[Array, tuple[str, ...]]:
    """The numbers that the model runs with, and what the user should know about them.

    Args:
        published: the schedule that the configuration names, of the buffer's shape.
        rtol: what tells another schedule.

    Raises:
        InputError: another shape, no floats, or another schedule in a half type, whose exact numbers nothing tells.
    """
    location = stored.locations.get(name)
    if location is None:
        return published, ()
    if location.shape != published.shape:
        raise InputError(
            f"tensor {name!r} has shape {list(location.shape)}",
            f"{list(published.shape)}",
            "check that the configuration belongs to these weights",
        )
    if not is_floating(location.dtype):
        raise InputError(f"tensor {name!r} is {location.dtype}", "float32")
    rounded = location.dtype.name in HALF_TYPES
    found = stored.read(name)
    alike = _is_alike(found, published, rtol)
    if rounded and not alike:
        raise InputError(
            f"tensor {name!r} holds another schedule than the published one, rounded to {location.dtype}",
            "float32, or the published schedule",
            "save it again in float32",
        )
    if rounded:
        return published, (f"{name} is rounded in the file: computed from the published schedules instead",)
    return found, () if alike else (f"{name} in the file differs from the published schedules: used as stored",)


def holds(stored: StoredTensors, name: str, published: Array, *, rtol: float = OTHER_SCHEDULE) -> bool:
    """Whether a buffer is stored and is this published schedule, up to rounding."""
    location = stored.locations.get(name)
    if location is None or location.shape != published.shape:
        return False
    return _is_alike(stored.read(name), published, rtol)


def name_of_all(stored: StoredTensors, template: str) -> str:
    """The stored name of a buffer that all layers and heads share, once they are found to be equal.

    Args:
        template: of its names, with `{i}` for the layer and `{h}` for the head.

    Raises:
        InputError: two of them differ.
    """
    numbered = re.compile(re.sub(r"\\\{[ih]\\\}", r"\\d+", re.escape(template)))
    found = [name for name in stored.names() if numbered.fullmatch(name)]
    for other in found[1:]:
        if not stored.same_data(found[0], other):
            raise InputError(f"tensor {other!r} differs from {found[0]!r}", "one for all", "this is not supported")
    return found[0] if found else template.format(i=0, h=0)


def pairs_of(angles: Array, name: str) -> Array:
    """One angle of each pair `[K/2]`, of angles `[K]` that stand twice in a row.

    Raises:
        InputError: two angles of a pair differ.
    """
    if not np.array_equal(angles[0::2], angles[1::2]):
        raise InputError(f"tensor {name!r} has pairs of different angles", "each angle twice in a row")
    return angles[0::2]


def _is_alike(found: Array, published: Array, rtol: float) -> bool:
    relative, absolute = HALF_TYPES.get(found.dtype.name, (rtol, 0.0))
    return bool(np.allclose(found.astype(np.float64), published, rtol=relative, atol=absolute))
