"""What a measuring process is told to open. Plain data: the process that gets it imports what it needs for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.graph.transformer import TransformerConfig
from retnet_tools.runtime.providers import Device


@dataclass(frozen=True)
class RetNetSpec:
    """An exported RetNet.

    Attributes:
        chunk_size: tokens of a prompt that are read at once.
        profile: where ONNX Runtime writes a profile of its steps: the start of its name.
    """

    engine: ClassVar[str] = "retnet_tools.reports.benchmark.engines:RetNetEngine"
    folder: Path
    device: Device
    threads: int | None
    chunk_size: int
    profile: Path | None = None


@dataclass(frozen=True)
class TransformerSpec:
    """A Transformer with a KV cache."""

    engine: ClassVar[str] = "retnet_tools.reports.benchmark.engines:TransformerEngine"
    folder: Path
    config: TransformerConfig
    dtype: str
    device: Device
    threads: int | None
    profile: Path | None = None


@dataclass(frozen=True)
class TorchSpec:
    """Our torch recurrent form, with random weights, on the CPU."""

    engine: ClassVar[str] = "retnet_tools.reports.benchmark.torch_engine:TorchEngine"
    config: RetNetConfig
    dtype: FloatName
    threads: int | None

    @property
    def device(self) -> Device:
        """The CPU."""
        return Device("cpu")


EngineSpec = RetNetSpec | TransformerSpec | TorchSpec
