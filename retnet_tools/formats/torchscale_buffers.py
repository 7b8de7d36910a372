"""The buffers of torchscale and syncdoth: rotary angles, each twice for its pair, and log(gamma) per head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.buffers import holds, pairs_of, read_buffer
from retnet_tools.formats.schedules import (
    floats,
    language_model_log_decay,
    linspace_frequencies,
    paper_log_decay,
)
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale_releases import ANGLES, DECAYS
from retnet_tools.weights import Array

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
        InputError: as `read_buffer`; angles that differ within a pair, or the decay of the other published schedule.
    """
    name, published = prefix + DECAYS, log_decay(num_heads)
    for other, formula in PUBLISHED_DECAYS.items():
        if holds(stored, name, other(num_heads)) and not holds(stored, name, published):
            raise InputError(
                f"tensor {name!r} holds {formula}",
                PUBLISHED_DECAYS[log_decay] + ", as the configuration says",
                "correct the configuration (use_lm_decay)",
            )
    angles, angle_notes = read_buffer(stored, prefix + ANGLES, np.repeat(linspace_frequencies(head_k_dim), 2))
    decays, decay_notes = read_buffer(stored, name, published)
    frequencies = pairs_of(angles, prefix + ANGLES)
    return Schedules(floats(decays), floats(frequencies), (*angle_notes, *decay_notes))
