"""Rounding as noise, to know how far it may take a run of a model from float64.

Beside the model itself run copies of it in which every value that a part hands on is moved,

    y + a (|y| + rms(y)) n + b n,   n ~ N(0, 1),

a being what a type may lose of a value times a headroom, and b of its smallest ones. How far the copies come out from
the model is what may be asked of a run in that type: little where the model computes with a comfortable margin, much
where a head's scores all but cancel and the head norm blows up what is left. Products in int8 are moved in what they
read: by the step of each block of activations, 1/127 of its largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retnet_tools.model.norms import Norm

_POOL = 1_048_583
"""Normal numbers that are taken again and again, since drawing them would take longer than the model: a prime, so that
the same ones do not come to the same place."""
_STEPS = 127
"""Of int8, from 0 to the largest activation of a block."""


@dataclass(frozen=True)
class Noise:
    """How the copies are moved that stand for one way of computing.

    Attributes:
        relative, absolute: a and b.
        steps: by how many steps of int8 what products read is moved; 0 where they are not in int8.
        blocks: by canonical name of a matrix that is multiplied with in int8, the columns that share a step.
        state: part that a state loses each time that it is written, always in the same direction.
        state_absolute: the same of its smallest numbers, for each head.
    """

    relative: float
    absolute: float
    steps: float
    blocks: Mapping[str, int]
    state: float = 0.0
    state_absolute: tuple[float, ...] = ()


class NoisyCopies:
    """The model and its copies, side by side in the first dimension: all rows of the model, then all of each copy.

    Args:
        noises: what to stand for.
        copies: of each.
        seed: of the noise.
    """

    def __init__(self, noises: Sequence[Noise], copies: int, seed: int) -> None:
        self._noises = [None, *(noise for noise in noises for _ in range(copies))]
        self.ranges = [slice(1 + i * copies, 1 + (i + 1) * copies) for i in range(len(noises))]
        generator = torch.Generator().manual_seed(seed)
        self._pool, self._taken = torch.randn(_POOL, generator=generator), 0
        self._blocks = {name: size for noise in noises for name, size in noise.blocks.items()}

    @property
    def count(self) -> int:
        """The model and all copies."""
        return len(self._noises)

    def repeat(self, x: Tensor) -> Tensor:
        """Rows `[B, ...]` for all, `[copies * B, ...]`."""
        return x.repeat(self.count, *[1] * (x.dim() - 1))

    def moved(self, y: Tensor) -> Tensor:
        """What a part hands on, `[copies * B, T, N]`."""
        relative, absolute = (self._each(name, y) for name in ("relative", "absolute"))
        spread = y.abs() + y.square().mean(-1, keepdim=True).sqrt()
        return y + (relative * spread + absolute) * self.normal(y)

    @property
    def moves_states(self) -> bool:
        """Whether any of the copies loses anything as states are written."""
        return any(noise is not None and noise.state for noise in self._noises)

    def written(self, state: Tensor, direction: Tensor, times: int) -> Tensor:
        """States `[copies * B, H, K, V]` that were written some times.

        Args:
            direction: normally distributed, of their shape.
        """
        spread = state.abs() + state.square().mean((-2, -1), keepdim=True).sqrt()
        least = torch.zeros(self.count, state.shape[1], dtype=state.dtype)
        for i, noise in enumerate(self._noises):
            if noise is not None and noise.state_absolute:
                least[i] = torch.tensor(noise.state_absolute, dtype=state.dtype)
        rows = least.repeat_interleave(len(state) // self.count, 0)[:, :, None, None]  # [copies * B, H, 1, 1]
        return state + times * (self._each("state", state) * spread + rows) * direction

    def apart(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's own of values `[copies * B, ...]`, and of each noise the largest |difference|, `[B, ...]`."""
        own, *_ = parts = y.chunk(self.count)
        return own, [torch.stack([(part - own).abs() for part in parts[r]]).amax(0) for r in self.ranges]

    def read(self, name: str, x: Tensor) -> Tensor:
        """What a product with a matrix reads, `[copies * B, T, N]`."""
        size = self._blocks.get(name)
        return x if size is None else self.stepped(x, size)

    @contextmanager
    def on(self, module: nn.Module, prefix: str = "") -> Iterator[None]:
        """Move what the linear layers and the norms of a module hand on, while it runs.

        Args:
            prefix: of its names, to be canonical ones.
        """
        hooks = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | Norm):
                hooks.append(part.register_forward_hook(lambda _, inputs, y: self.moved(y)))
            if (size := self._blocks.get(f"{prefix}{name}.weight")) is not None:
                hooks.append(part.register_forward_pre_hook(partial(self._move_input, size)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def stepped(self, x: Tensor, size: int) -> Tensor:
        """What a product in int8 reads, `[..., N]`, by blocks of `size` along N."""
        steps = self._each("steps", x)
        pad = -x.shape[-1] % size
        blocks = nn.functional.pad(x, (0, pad)).view(*x.shape[:-1], -1, size)
        step = blocks.abs().amax(-1, keepdim=True) / _STEPS
        moved: Tensor = steps * (step * self.normal(blocks)).flatten(-2)[..., : x.shape[-1]]
        return x + moved

    def _move_input(self, size: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (self.stepped(inputs[0], size),)

    def _each(self, name: str, y: Tensor) -> Tensor:
        """An amplitude for each row of `[copies * B, ...]`; 0 for the model itself."""
        values = [0.0 if noise is None else float(getattr(noise, name)) for noise in self._noises]
        rows = torch.tensor(values, dtype=y.dtype).repeat_interleave(y.shape[0] // self.count)
        return rows.view(-1, *[1] * (y.dim() - 1))

    def normal(self, y: Tensor) -> Tensor:
        """Normally distributed numbers of a shape."""
        start, self._taken = self._taken, (self._taken + y.numel()) % _POOL
        whole = self._pool.repeat(1 + (start + y.numel()) // _POOL) if start + y.numel() > _POOL else self._pool
        return whole[start : start + y.numel()].view(y.shape)
