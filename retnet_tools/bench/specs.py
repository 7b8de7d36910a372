"""What a measuring process is told to open. Plain data: the process that gets it imports what it needs for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from retnet_tools.bench.transformer_graph import TransformerConfig
from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.runtime.providers import Device


@dataclass(frozen=True)
class RetNetSpec:
    """An exported RetNet.

    Attributes:
        chunk_size: tokens of a prompt that are read at once.
        prompts: whether it will read prompts: what they need is opened at once then.
        cuda_graph: whether steps on CUDA are captured where they can be.
        profile: where ONNX Runtime writes a profile of its steps: the start of its name.
    """

    engine: ClassVar[str] = "retnet_tools.bench.engines:RetNetEngine"
    folder: Path
    device: Device
    threads: int | None
    chunk_size: int
    prompts: bool = False
    cuda_graph: bool = True
    profile: Path | None = None


@dataclass(frozen=True)
class TransformerSpec:
    """A Transformer with a KV cache.

    Attributes:
        cuda_graph: as `RetNetSpec`.
    """

    engine: ClassVar[str] = "retnet_tools.bench.engines:TransformerEngine"
    folder: Path
    config: TransformerConfig
    dtype: str
    device: Device
    threads: int | None
    cuda_graph: bool = True


@dataclass(frozen=True)
class TorchSpec:
    """Our torch recurrent form, with random weights."""

    engine: ClassVar[str] = "retnet_tools.bench.torch_decoder:TorchEngine"
    config: RetNetConfig
    dtype: FloatName
    threads: int | None
    device: Device = field(default_factory=lambda: Device("cpu"))


EngineSpec = RetNetSpec | TransformerSpec | TorchSpec
