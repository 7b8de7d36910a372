"""Boxes of a tensor: offsets and sizes along each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]


def fill_exactly(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, none of them empty, fill a shape, each element once."""
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    if 0 in shape:
        return not boxes
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    if len(boxes) == 1:
        return boxes[0] == ((0,) * len(shape), shape)
    if not shape:
        return False
    # Between two neighbouring edges along the first axis the boxes are the same ones: they must fill the other axes.
    starting = sorted(boxes, key=lambda box: box[0][0])
    edges = sorted({e for offsets, sizes in boxes for e in (offsets[0], offsets[0] + sizes[0])})
    if edges[0] != 0 or edges[-1] != shape[0]:
        return False
    active: list[Box] = []
    done = 0
    for start in edges[:-1]:
        active = [box for box in active if box[0][0] + box[1][0] > start]
        while done < len(starting) and starting[done][0][0] == start:
            active.append(starting[done])
            done += 1
        if not fill_exactly([(offsets[1:], sizes[1:]) for offsets, sizes in active], shape[1:]):
            return False
    return True
