"""The scales of xPos as a decay of each pair of key dimensions.

xPos multiplies q by z^(n/512) and k by z^(-m/512), which is a decay of z^(1/512) a step; z_i = (2i + 0.4 K) / 1.4 K.
"""

from __future__ import annotations

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.buffers import read_buffer
from retnet_tools.formats.schedules import floats
from retnet_tools.formats.storage import StoredTensors

XPOS_BASE = 512


def xpos_key_decay(stored: StoredTensors, name: str, key_dim: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """log(z) / 512 of each pair, and notes.

    Args:
        name: of the stored scales z, `[key_dim / 2]`.
        key_dim: dimensions that xPos runs over.

    Raises:
        InputError: as `read_buffer`; scales that are not above 0 and at most 1.
    """
    size = np.float32(key_dim)
    z = (np.arange(0, size, 2, dtype=np.float32) + np.float32(0.4) * size) / (np.float32(1.4) * size)
    found, notes = read_buffer(stored, name, z)
    if not np.all((found > 0) & (found <= 1)):
        raise InputError(f"tensor {name!r} holds scales outside (0, 1]", "those of xPos")
    return floats(np.log(found.astype(np.float64)) / XPOS_BASE), notes
