"""RetNet and what it is measured against, each ready to be opened in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from retnet_tools.bench.models import Model, Precision, write_transformer
from retnet_tools.bench.options import RETNET, BenchOptions, Case, Kind
from retnet_tools.bench.rows import Subject
from retnet_tools.bench.specs import EngineSpec, RetNetSpec, TorchSpec, TransformerSpec
from retnet_tools.bench.traffic import Traffic, retnet_traffic, transformer_traffic
from retnet_tools.bench.transformer_graph import TransformerConfig, matching_transformer
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import ProviderError, UsageError
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.runtime.device_memory import chunk_bytes
from retnet_tools.runtime.providers import Device

ATTENTION_TYPES = {"cpu": ("float32", "float16"), "cuda": ("float16",)}
"""In which GroupQueryAttention is measured, by device."""
_LEAST_POSITIONS = 512
"""Room in a Transformer's rotary tables, at least."""
_FLOAT32 = 4


@dataclass(frozen=True)
class Implementation:
    """One of those that take turns.

    Attributes:
        spec: what to open with a number of threads for a kind of test.
        weights: bytes of weights that it keeps in memory for a kind of test, at least.
        passing: bytes that a test takes besides states, for a while.
    """

    subject: Subject
    spec: Callable[[int | None, Kind], EngineSpec]
    weights: Callable[[Kind], int]
    passing: Callable[[Case], int] = lambda test: 0

    @property
    def name(self) -> str:
        """As `--against` and reports name it."""
        return self.subject.implementation

    def runs(self, kind: Kind) -> bool:
        """Whether it takes part in tests of a kind."""
        return kind in self.subject.buffers

    def bytes_needed(self, test: Case) -> int:
        """What a test takes: its states in all buffers, its logits, and what is needed for a while."""
        traffic = self.subject.traffic
        states = self.subject.buffers[test.kind] * traffic.state_bytes(test.room)
        return test.batch * (states + traffic.logit_bytes) + self.passing(test)


def retnet(model: Model, options: BenchOptions, device: Device) -> Implementation:
    """The model itself."""
    precision, config = model.precision, model.config
    traffic = retnet_traffic(config, precision.dtype, precision.scheme, model.state_dtype, options.chunk_size)

    def passing(test: Case) -> int:
        # A layer's numbers are float32 first.
        copies = 1 if model.state_dtype == "float32" else 3
        placing = copies * test.batch * traffic.fixed_state // config.num_layers if test.depth else 0
        placing = placing if device.kind == "cpu" else 0
        if test.kind == "decode":
            return placing
        return max(placing, chunk_bytes(config, precision.dtype, test.batch, min(test.tokens, options.chunk_size)))

    return Implementation(
        # On the CPU a step writes states where it reads them.
        _subject(RETNET, precision, traffic, {"prefill": 2, "decode": 1 if device.kind == "cpu" else 2}),
        lambda threads, kind: RetNetSpec(
            model.folder, device, threads, options.chunk_size, kind == "prefill", options.cuda_graph
        ),
        weights=lambda kind: traffic.weight_bytes,
        passing=passing,
    )


def alternative(name: str, model: Model, options: BenchOptions, device: Device, scratch: Path) -> Implementation:
    """One of `ALTERNATIVES`; a Transformer is written to a folder in `scratch`.

    Raises:
        UsageError: one that the device or the model does not allow.
        ProviderError: torch without CUDA on a GPU.
        OutputError: no room in the folder.
    """
    return _torch(model, options, device) if name == "torch" else _transformer(name, model, options, device, scratch)


def _torch(model: Model, options: BenchOptions, device: Device) -> Implementation:
    if device.kind != "cpu":
        check_torch_device(device)
    dtype, config = cast(FloatName, model.precision.dtype), model.config
    traffic = retnet_traffic(config, dtype, None, "float32", options.chunk_size)
    return Implementation(
        _subject("torch", Precision(dtype, None, "torch"), traffic, {"decode": 2}),
        lambda threads, kind: TorchSpec(config, dtype, threads, device),
        weights=lambda kind: traffic.parameters * ELEMENT_TYPES[dtype].numpy().itemsize,
    )


def check_torch_device(device: Device) -> None:
    """Check that torch runs on a GPU.

    Raises:
        ProviderError: it does not.
    """
    # It takes seconds to import, and nothing else in this process needs it.
    from retnet_tools.bench.torch_decoder import has_device

    if not has_device(str(device)):
        raise ProviderError(
            f"--against torch on {device}, where this torch finds no GPU",
            "a torch with CUDA",
            "install one, or measure without it",
        )


def _transformer(name: str, model: Model, options: BenchOptions, device: Device, scratch: Path) -> Implementation:
    precision = model.precision
    if precision.dtype not in ATTENTION_TYPES[device.kind]:
        raise UsageError(
            f"--against {name} in {precision.dtype} on {device.kind}",
            " or ".join(ATTENTION_TYPES[device.kind]),
            "GroupQueryAttention has no kernel for others there",
        )
    if precision.mixed:
        raise UsageError(
            f"--against {name} for {precision.quantization} weights",
            "one type for all matrices",
            "types are chosen by the names of RetNet's matrices, which a Transformer does not have",
        )
    config = matching_transformer(
        model.config,
        kv_groups=4 if name.endswith("-gqa") else 1,
        max_positions=max(_LEAST_POSITIONS, options.room),
    )
    folder = write_transformer(config, precision, scratch / name)
    traffic = transformer_traffic(config, precision.dtype, precision.scheme)
    return Implementation(
        _subject(name, Precision(precision.dtype, precision.scheme, "fused"), traffic, {"prefill": 1, "decode": 1}),
        lambda threads, kind: TransformerSpec(folder, config, precision.dtype, device, threads, options.cuda_graph),
        weights=lambda kind: traffic.weight_bytes,
        passing=lambda test: _attention_bytes(config, precision.dtype, test, device),
    )


def _attention_bytes(config: TransformerConfig, dtype: str, test: Case, device: Device) -> int:
    """What a Transformer takes for a while: scores of a prompt and its activations, or a buffer of float32 noise.

    On the CPU, GroupQueryAttention holds the scores of all heads in float32. A cache of another type is filled from
    float32 numbers, one buffer at a time.
    """
    itemsize = ELEMENT_TYPES[dtype].numpy().itemsize
    placing = 0
    if device.kind == "cpu" and test.depth and itemsize < _FLOAT32:
        placing = test.batch * config.num_kv_heads * config.head_size * test.room * _FLOAT32
    tokens = test.tokens if test.kind == "prefill" else 1
    scores = test.batch * config.num_heads * tokens * test.room * _FLOAT32 if device.kind == "cpu" else 0
    activations = test.batch * tokens * itemsize * (2 * config.ffn_dim + 4 * config.hidden_size)
    return max(placing, scores + activations)


def _subject(name: str, precision: Precision, traffic: Traffic, buffers: dict[Kind, int]) -> Subject:
    return Subject(name, precision.dtype, precision.quantization, precision.ops, traffic, buffers)
