"""Microsoft's torchscale as a measured implementation: its RetNet decoder, one token at a time, as it was published.

The package is needed as it lies on PyPI, without what it depends on:

    pip install --no-deps --target DIR torchscale==0.3.0

What it imports and a plain RetNet never calls (fairscale, timm, mixture of experts) is replaced by empty modules.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch

from retnet_tools.config import RetNetConfig
from retnet_tools.random_weights import noise
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

UNUSED = {
    "fairscale.nn": ("checkpoint_wrapper", "wrap"),
    "timm.models.layers": ("drop_path",),
    "torchscale.component.xmoe.moe_layer": ("MOELayer",),
    "torchscale.component.xmoe.routing": ("Top1Gate", "Top2Gate"),
}


@dataclass(frozen=True)
class TorchscaleSpec:
    """torchscale's decoder with random weights in float32 on the CPU."""

    engine: ClassVar[str] = "torchscale_engine:TorchscaleEngine"
    config: RetNetConfig
    threads: int | None

    @property
    def device(self) -> Device:
        return Device("cpu")


class TorchscaleEngine:
    device = Device("cpu")
    captured: bool | None = None
    prompt_at_once: int | None = 1

    def __init__(self, spec: TorchscaleSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self._model = build(spec.config)
        self._config = spec.config
        self.vocab_size = spec.config.vocab_size

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Random states at a depth, each with the scale that torchscale keeps beside it."""
        shape = (batch, self._config.num_heads, self._config.head_v_dim, self._config.head_k_dim)
        decay = np.exp(np.array(self._config.decay))
        scale = torch.from_numpy((1 - decay ** max(int(depth), 1)) / (1 - decay)).float()
        layers = range(self._config.num_layers)
        states = {i: {"prev_key_value": torch.from_numpy(noise(shape, 7919 * i)), "scale": scale} for i in layers}
        self._state = {"is_first_step": False, **states}
        self._tokens = torch.zeros((batch, int(depth)), dtype=torch.int64)

    def feed(self, input_ids: Array) -> Array:
        """torchscale reads the last of all tokens so far, and the position from their number."""
        self._tokens = torch.cat([self._tokens, torch.from_numpy(input_ids)], dim=1)
        with torch.inference_mode():
            logits, _ = self._model(self._tokens, incremental_state=self._state)
        return np.asarray(logits[:, -1].numpy())

    def release(self) -> None:
        self._state, self._tokens = {}, torch.zeros((0, 0), dtype=torch.int64)


def build(config: RetNetConfig) -> torch.nn.Module:
    """Its language model of a configuration of `retnet_tools.paper`."""
    for name, members in UNUSED.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if not part.startswith("torchscale") or end == len(parts):
                sys.modules.setdefault(part, ModuleType(part))
        for member in members:
            setattr(sys.modules[name], member, None)
    from torchscale.architecture.config import RetNetConfig as Arguments
    from torchscale.architecture.retnet import RetNetDecoder

    arguments = Arguments(
        decoder_embed_dim=config.hidden_size,
        decoder_value_embed_dim=config.value_dim,
        decoder_retention_heads=config.num_heads,
        decoder_ffn_embed_dim=config.feed_forward.dim,
        decoder_layers=config.num_layers,
        vocab_size=config.vocab_size,
        no_output_layer=False,
        share_decoder_input_output_embed=False,
    )
    embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
    output = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return RetNetDecoder(arguments, embed_tokens=embedding, output_projection=output).eval()
