"""The graphs of an exported folder as they are, of either target: a token or a chunk at a time, from any state.

Nothing of the decoding runtime is between a graph and what is said of it, but that a step writes states where it reads
them if it does so there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, RetNetToolsError
from retnet_tools.graph import contract
from retnet_tools.graph.contract import EXPORT_AGAIN
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime.buffers import Binding, Buffer, buffer_of, spare_buffer, zero_buffer
from retnet_tools.runtime.failures import one_line
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.opening import session_threads
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

FILLER = -100
"""An id of padding: any will do, also one that no token has."""


class GraphRunError(Exception):
    """ONNX Runtime gave up on a run of a graph: what it says."""


@dataclass(frozen=True)
class Standing:
    """Where rows stand: one state `[B, H, K, V]` a layer, as the graph holds it, and the next positions `[B]`."""

    states: tuple[Array, ...]
    position: Array


class GraphRuns:
    """The graphs of a folder on a device; each is opened when it is first run.

    Args:
        config: the model, as its checkpoint says.
        exact: products with quantized weights are made in floats.
        decoder: run decoder.onnx in place of step.onnx and prefill.onnx.

    Raises:
        ProviderError: the device cannot be had.
        InputError: a graph that cannot be opened, or whose inputs and outputs are not those of the contract.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: RetNetConfig,
        device: Device,
        threads: int | None,
        *,
        exact: bool = False,
        decoder: bool = False,
    ) -> None:
        self._decoder = decoder
        self._folder, self._manifest, self._config = folder, manifest, config
        self._threads, self._exact = threads, exact
        self.device, self.is_genai = device, contract.GENAI_FILE in manifest.graphs
        device.provider.check_model(manifest, device)
        self._scale = np.array(contract.state_scale(config, manifest.state_dtype))[:, None, None]

    def zeros(self, rows: int) -> Standing:
        """Before the first token."""
        shape = (rows, *contract.state_shape(self._config))
        return self.standing([np.zeros(shape) for _ in range(self._config.num_layers)], np.zeros(rows, dtype=np.int64))

    def standing(self, states: Sequence[Array], position: Array) -> Standing:
        """With these plain sums S for states, as far as their type holds them."""
        dtype = zero_buffer((1,), self._manifest.state_dtype, Device("cpu")).dtype
        held = tuple((state * self._scale).astype(dtype) for state in states)
        return Standing(held, np.asarray(position, dtype=np.int64))

    def sums(self, standing: Standing) -> list[Array]:
        """The plain sums S `[B, H, K, V]` of its states in float64."""
        return [state.astype(np.float64) / self._scale for state in standing.states]

    def step(self, tokens: Array, at: Standing) -> tuple[Array, Standing]:
        """One token a row, `[B]` or `[B, D]`: logits `[B, vocab]`, and where the rows stand then."""
        feeds = {self._input: tokens[:, None], contract.POSITION_IDS: at.position[:, None]}
        if self._decoder:
            feeds |= self._chunk_feeds(np.ones((len(tokens), 1), dtype=np.int64))
        in_place = not self.is_genai and self.device.provider.in_place
        return self._run(self._step, feeds, at, np.ones(len(tokens), dtype=np.int64), in_place=in_place)

    def chunk(
        self, tokens: Array, at: Standing, lengths: Array | None = None, *, blank: bool = False
    ) -> tuple[Array, Standing]:
        """The first `lengths` of tokens `[B, T]` or `[B, T, D]`: logits `[B, vocab]` after the last of each row.

        What is right of them is padding: the tokens that are there, or with `blank` ids that no token has, at
        positions that no token has.
        """
        rows, width = tokens.shape[:2]
        counts = np.full(rows, width) if lengths is None else np.asarray(lengths)
        index = np.arange(width)
        mask = index < counts[:, None]
        positions = at.position[:, None] + index
        if blank or self.is_genai:
            filler = contract.padding_id(self._config) if self.is_genai and blank else FILLER
            real = mask if tokens.ndim == 2 else mask[:, :, None]
            tokens = np.where(real, tokens, tokens.dtype.type(filler)) if blank else tokens
            positions = np.where(mask, positions, 0 if self.is_genai else FILLER)
        feeds = {self._input: tokens, contract.POSITION_IDS: positions}
        if not self.is_genai:
            feeds |= self._chunk_feeds(mask.astype(np.int64))
        return self._run(self._prefill, feeds, at, counts, in_place=False)

    def _chunk_feeds(self, mask: Array) -> dict[str, Array]:
        """The mask `[B, T]`, and for decoder.onnx the place of the last real token of each row."""
        feeds = {contract.ATTENTION_MASK: mask}
        if self._decoder:
            feeds[contract.LOGITS_INDICES] = np.maximum(mask.sum(1, keepdims=True) - 1, 0)
        return feeds

    def _run(
        self,
        graph: onnxruntime.InferenceSession,
        feeds: dict[str, Array],
        at: Standing,
        counts: Array,
        *,
        in_place: bool,
    ) -> tuple[Array, Standing]:
        past = {contract.PAST_NAMES % i: buffer_of(s.copy(), self.device) for i, s in enumerate(at.states)}
        read = list(past.values())
        written = read if in_place else [spare_buffer(b.shape, b.dtype, self.device) for b in read]
        present = {contract.PRESENT_NAMES % i: buffer for i, buffer in enumerate(written)}
        if self.is_genai:
            past |= self._conv_states(contract.PAST_CONV_NAMES, len(counts))
            present |= self._conv_states(contract.PRESENT_CONV_NAMES, len(counts))
        binding = Binding(graph, feeds, past, present, self._output, self.device)
        try:
            logits = binding.run({}, fetch=True)
        except RetNetToolsError:
            raise
        except Exception as error:
            raise GraphRunError(one_line(error)) from error
        assert logits is not None
        logits = logits[:, 0]
        if self.is_genai:
            logits = logits[:, :-1]
        return logits, Standing(tuple(buffer.read() for buffer in written), at.position + counts)

    def _conv_states(self, names: str, rows: int) -> dict[str, Buffer]:
        layers = range(self._config.num_layers)
        return {names % i: zero_buffer((rows, 1, 1), "float32", self.device) for i in layers}

    @cached_property
    def _border(self) -> dict[str, tuple[tuple[contract.TensorSpec, ...], tuple[contract.TensorSpec, ...]]]:
        """Inputs and outputs of each graph by the contract."""
        border = (self._config, self._manifest.state_dtype)
        if self.is_genai:
            return {contract.GENAI_FILE: (contract.genai_inputs(*border), contract.genai_outputs(*border))}
        if self._decoder:
            return {contract.DECODER_FILE: (contract.decoder_inputs(*border), contract.decoder_outputs(*border))}
        outputs = contract.step_outputs(*border)
        return {
            contract.STEP_FILE: (contract.step_inputs(*border), outputs),
            contract.PREFILL_FILE: (contract.prefill_inputs(*border), outputs),
        }

    @property
    def _input(self) -> str:
        return next(iter(self._border.values()))[0][0].name

    @property
    def _output(self) -> contract.TensorSpec:
        return next(iter(self._border.values()))[1][0]

    @cached_property
    def _step(self) -> onnxruntime.InferenceSession:
        return self._open(contract.STEP_FILE, 1) if contract.STEP_FILE in self._border else self._prefill

    @cached_property
    def _prefill(self) -> onnxruntime.InferenceSession:
        name = contract.PREFILL_FILE
        return self._open(name if name in self._border else next(iter(self._border)), PREFILL_CHUNK_SIZE)

    def _open(self, name: str, tokens: int) -> onnxruntime.InferenceSession:
        path, threads = self._folder / name, self._threads
        if self.device.provider.memory is None:
            threads = threads or session_threads((self._folder / contract.WEIGHTS_FILE).stat().st_size, tokens)
        session = open_session(path, self.device, threads, exact=self._exact)
        for found, specs in zip((session.get_inputs(), session.get_outputs()), self._border[name], strict=True):
            values = [(value.name, tuple(value.shape)) for value in found]
            if values != [(spec.name, spec.shape) for spec in specs]:
                raise InputError(
                    f"{path} does not fit its model", "the inputs and outputs of the contract", EXPORT_AGAIN
                )
        return session
