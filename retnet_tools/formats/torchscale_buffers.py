"""The two buffers of torchscale and syncdoth: rotary angles, each stored twice for its pair, and log(gamma) per head.

Their code computes both in float32 and runs with the rounded numbers, so those are the model. Where a file stores them
in float32 or float64 they are read; where it stores them in a half type, which rounds them until logits move by 0.05,
or not at all, they are computed from the published schedules, in float32 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.schedules import (
    floats,
    language_model_log_decay,
    linspace_frequencies,
    paper_log_decay,
)
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale_releases import ANGLES, DECAYS
from retnet_tools.weights import Array

OTHER_SCHEDULE = 1e-5
"""Stored numbers that differ from the published schedules by more than this, relatively, are another schedule."""
PUBLISHED_DECAYS: dict[Callable[[int], Array], str] = {
    paper_log_decay: "gamma = 1 - 2^(-5-h)",
    language_model_log_decay: "gamma = 1 - exp(linspace(log 1/32, log 1/512))",
}


@dataclass(frozen=True)
class Schedules:
    """log(gamma) per head, radians per position for each pair, and what the user should know about them."""

    decay: tuple[float, ...]
    rotary_frequencies: tuple[float, ...]
    notes: tuple[str, ...]


def read_schedules(
    stored: StoredTensors,
    prefix: str,
    num_heads: int,
    head_k_dim: int,
    log_decay: Callable[[int], Array] = paper_log_decay,
) -> Schedules:
    """The schedules that the model runs with.

    Args:
        prefix: of the buffers' names.
        log_decay: the published schedule that the configuration names, for this many heads.

    Raises:
        InputError: a buffer of the wrong shape, angles that differ within a pair, or the decay of the other published
            schedule.
    """
    angles = _buffer(stored, prefix + ANGLES, (head_k_dim,))
    decays = _buffer(stored, prefix + DECAYS, (num_heads,))
    published = (linspace_frequencies(head_k_dim), log_decay(num_heads))
    if angles is None or decays is None:
        half = prefix + ANGLES in stored.locations
        note = "rotary and decay buffers are rounded in the file: computed from the published schedules instead"
        return Schedules(floats(published[1]), floats(published[0]), (note,) if half else ())
    if not np.array_equal(angles[0::2], angles[1::2]):
        raise InputError(f"tensor {prefix + ANGLES!r} has pairs of different angles", "each angle twice in a row")
    same = _alike(angles[0::2], published[0]) and _alike(decays, published[1])
    for other in PUBLISHED_DECAYS:
        if other is not log_decay and not _alike(decays, published[1]) and _alike(decays, other(num_heads)):
            raise InputError(
                f"tensor {prefix + DECAYS!r} holds {PUBLISHED_DECAYS[other]}",
                PUBLISHED_DECAYS[log_decay] + ", as the configuration says",
                "correct the configuration (use_lm_decay)",
            )
    note = "rotary or decay buffers in the file differ from the published schedules: used as stored"
    return Schedules(floats(decays), floats(angles[0::2]), () if same else (note,))


def _alike(found: Array, published: Array) -> bool:
    return bool(np.allclose(found, published, rtol=OTHER_SCHEDULE, atol=0))


def _buffer(stored: StoredTensors, name: str, shape: tuple[int, ...]) -> Array | None:
    """A buffer, or None where it is missing or rounded to a half type."""
    location = stored.locations.get(name)
    if location is None:
        return None
    if location.shape != shape:
        raise InputError(f"tensor {name!r} has shape {list(location.shape)}", f"{list(shape)}")
    return stored.read(name) if location.dtype.name in ("float32", "float64") else None
