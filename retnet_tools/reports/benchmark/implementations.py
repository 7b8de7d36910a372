"""RetNet and what it is measured against, each ready to be opened in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from retnet_tools.dtypes import FloatName
from retnet_tools.errors import UsageError
from retnet_tools.graph.transformer import matching_transformer
from retnet_tools.reports.benchmark.models import Model, Precision, write_transformer
from retnet_tools.reports.benchmark.options import RETNET, BenchOptions, Kind
from retnet_tools.reports.benchmark.results import Subject
from retnet_tools.reports.benchmark.specs import EngineSpec, RetNetSpec, TorchSpec, TransformerSpec
from retnet_tools.reports.benchmark.traffic import Traffic, retnet_traffic, transformer_traffic
from retnet_tools.runtime.providers import Device

_LEAST_POSITIONS = 512
"""Room in a Transformer's rotary tables, at least."""


@dataclass(frozen=True)
class Implementation:
    """One of those that take turns.

    Attributes:
        spec: what to open with a number of threads.
        kinds: of tests that it runs.
        buffers: how many times it holds the states of a batch at once.
    """

    subject: Subject
    spec: Callable[[int | None], EngineSpec]
    kinds: tuple[Kind, ...]
    buffers: int

    @property
    def name(self) -> str:
        """As `--against` and reports name it."""
        return self.subject.implementation

    def bytes_needed(self, batch: int, room: int) -> int:
        """What the states of a batch take."""
        return self.buffers * batch * self.subject.traffic.state_bytes(room)


def retnet(model: Model, options: BenchOptions, device: Device) -> Implementation:
    """The model itself."""
    precision = model.precision
    traffic = retnet_traffic(model.config, precision.dtype, precision.scheme, model.state_dtype, options.chunk_size)
    return Implementation(
        _subject(RETNET, device, precision, traffic),
        lambda threads: RetNetSpec(model.folder, device, threads, options.chunk_size),
        kinds=("prefill", "decode"),
        buffers=2,
    )


def alternative(name: str, model: Model, options: BenchOptions, device: Device, scratch: Path) -> Implementation:
    """One of `ALTERNATIVES`; a Transformer is written to a folder in `scratch`.

    Raises:
        UsageError: one that the device or the model does not allow.
        OutputError: no room in the folder.
    """
    return _torch(model, options) if name == "torch" else _transformer(name, model, options, device, scratch)


def _torch(model: Model, options: BenchOptions) -> Implementation:
    dtype, config = cast(FloatName, model.precision.dtype), model.config
    traffic = retnet_traffic(config, dtype, None, "float32", options.chunk_size)
    precision = Precision(dtype, None, "torch")
    return Implementation(
        _subject("torch", Device("cpu"), precision, traffic),
        lambda threads: TorchSpec(config, dtype, threads),
        kinds=("decode",),
        buffers=2,
    )


def _transformer(name: str, model: Model, options: BenchOptions, device: Device, scratch: Path) -> Implementation:
    precision = model.precision
    if device.kind == "cuda" and precision.dtype == "float32":
        raise UsageError(
            f"--against {name} in float32 on {device.kind}",
            "--dtype fp16 or bf16",
            "GroupQueryAttention has no float32 kernel there",
        )
    config = matching_transformer(
        model.config,
        kv_groups=4 if name.endswith("-gqa") else 1,
        max_positions=max(_LEAST_POSITIONS, options.room),
    )
    folder = write_transformer(config, precision, scratch / name)
    traffic = transformer_traffic(config, precision.dtype, precision.scheme)
    return Implementation(
        _subject(name, device, Precision(precision.dtype, precision.scheme, "fused"), traffic),
        lambda threads: TransformerSpec(folder, config, precision.dtype, device, threads),
        kinds=("prefill", "decode"),
        buffers=1,
    )


def _subject(name: str, device: Device, precision: Precision, traffic: Traffic) -> Subject:
    return Subject(name, device.kind, precision.dtype, precision.quantization, precision.ops, traffic)
