"""The two buffers of torchscale and syncdoth: rotary angles, each stored twice for its pair, and log(gamma) per head.

Their code computes both in float32 and runs with the rounded numbers, so those are the model. Where a file stores them
in float32 or float64 they are read; where it stores them in a half type, which rounds them until logits move by 0.05,
or not at all, they are computed from the published schedules, in float32 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    published = (linspace_frequencies(head_k_dim), log_decay(num_heads))
    angles = read_buffer(stored, prefix + ANGLES, np.repeat(published[0], 2))
    decays = read_buffer(stored, prefix + DECAYS, published[1])
    if not np.array_equal(angles[0::2], angles[1::2]):
        raise InputError(f"tensor {prefix + ANGLES!r} has pairs of different angles", "each angle twice in a row")
    for other in PUBLISHED_DECAYS:
        if other is not log_decay and not is_alike(decays, published[1]) and is_alike(decays, other(num_heads)):
            raise InputError(
                f"tensor {prefix + DECAYS!r} holds {PUBLISHED_DECAYS[other]}",
                PUBLISHED_DECAYS[log_decay] + ", as the configuration says",
                "correct the configuration (use_lm_decay)",
            )
    same = is_alike(angles[0::2], published[0]) and is_alike(decays, published[1])
    notes = buffer_notes(stored, (prefix + ANGLES, prefix + DECAYS), same=same)
    return Schedules(floats(decays), floats(angles[0::2]), notes)


def read_buffer(stored: StoredTensors, name: str, published: Array) -> Array:
    """A buffer of a schedule, or the published schedule where it is missing or rounded to a half type.

    Raises:
        InputError: another shape.
    """
    location = stored.locations.get(name)
    if location is None:
        return published
    if location.shape != published.shape:
        raise InputError(f"tensor {name!r} has shape {list(location.shape)}", f"{list(published.shape)}")
    return published if _is_rounded(stored, name) else stored.read(name)


def buffer_notes(stored: StoredTensors, names: Iterable[str], *, same: bool) -> tuple[str, ...]:
    """What the user should know about buffers that were read.

    Args:
        same: whether they are those of the published schedules.
    """
    differ = "rotary or decay buffers in the file differ from the published schedules: used as stored"
    rounded = "rotary or decay buffers are rounded in the file: computed from the published schedules instead"
    return (differ,) * (not same) + (rounded,) * any(_is_rounded(stored, name) for name in names)


def is_alike(found: Array, published: Array) -> bool:
    """Whether numbers are those of a published schedule."""
    return bool(np.allclose(found, published, rtol=OTHER_SCHEDULE, atol=0))


def _is_rounded(stored: StoredTensors, name: str) -> bool:
    return name in stored.locations and stored.info(name).dtype.name not in ("float32", "float64")
