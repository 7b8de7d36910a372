"""An exported folder, opened: prompts by chunks, then a call a token; states stay where the provider keeps them.

Memory, beside activations: the weights once. On the CPU float32 ones are mapped, others packed for one session of
decoder.onnx, which serves steps, prompts and scoring, and mapped too where they are kept (`runtime.packed_weights`);
steps of less than 256 MB of packed weights may have a session of their own. On CUDA the sessions of step.onnx and
decoder.onnx share their weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.graph.contract import (
    ATTENTION_MASK,
    DECODER_FILE,
    EXPORT_AGAIN,
    LOGITS_INDICES,
    MANIFEST_FILE,
    MAX_POSITION,
    PAST_NAMES,
    POSITION_IDS,
    PRESENT_NAMES,
    STEP_FILE,
    WEIGHTS_FILE,
    TensorSpec,
    decoder_outputs,
    step_inputs,
)
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime.buffers import Binding, Buffer
from retnet_tools.runtime.cuda_graphs import StepGraphs
from retnet_tools.runtime.device_memory import chunk_bytes
from retnet_tools.runtime.failures import CaptureError
from retnet_tools.runtime.opening import GraphOpener
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE, Chunk, Prompts
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime


class DecoderSession:
    """An exported folder on one device: steps, prompts, and the logits of every token of a text.

    Args:
        folder: what `retnet-tools export` wrote.
        device: where to run.
        threads: of the CPU provider; None chooses by the size of the work.
        in_place: whether steps write states where they read them, or into a second buffer; None writes in place on the
            CPU, whose kernels are known to read a state before they write it.
        cuda_graph: whether steps on CUDA are captured and replayed; None does where it can.
        prompts: whether prompts of several tokens will come: then on CUDA the two graphs share their weights, and there
            must be room for both before anything is loaded. Else decoder.onnx loads its own when it is opened there.
        profile: where ONNX Runtime writes a profile of steps when `end_profile` is called: the start of its name.

    It is closed at the end of a `with` block, by `close`, or when nothing refers to it any more.

    Attributes:
        closed: whether `close` was called.
        device: where it runs; the CPU where `device.cpu_fallback` allowed it and there was no other way.
        eager_reason: why steps run kernel by kernel; None where they are replayed as CUDA graphs. A capture that fails
            sets it, and `EagerStepsWarning` says so.

    Raises:
        InputError: not an exported folder, or an incomplete one.
        ProviderError: the device cannot be had, or has no room; nothing is loaded then.
        UsageError: CUDA graphs of steps in place, or no threads.
    """

    def __init__(
        self,
        folder: Path | str,
        device: Device | None = None,
        threads: int | None = None,
        *,
        in_place: bool | None = None,
        cuda_graph: bool | None = None,
        prompts: bool = False,
        profile: Path | None = None,
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no folder {folder}", f"a folder with {MANIFEST_FILE}, written by `retnet-tools export`")
        self.folder = folder
        self.manifest = read_manifest(folder)
        for name in (STEP_FILE, DECODER_FILE):
            if name not in self.manifest.graphs:
                found = f"{folder} holds {', '.join(self.manifest.graphs)}"
                raise InputError(found, f"an export of --to onnx, with {name}", EXPORT_AGAIN)
        for name in (STEP_FILE, DECODER_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}", "a complete export", EXPORT_AGAIN)
        if threads is not None and threads < 1:
            raise UsageError(f"--threads {threads}", "at least 1")
        self.threads, self.closed = threads, False
        if in_place and cuda_graph:
            raise UsageError("CUDA graphs of steps in place", "one of them: a capture runs a step several times")
        border = (self.manifest.config, self.manifest.state_dtype)
        self._input, self._output = step_inputs(*border)[0], decoder_outputs(*border)[0]
        reasons = {
            "states are written in place": in_place,
            "it was asked for": cuda_graph is False,
            "a profile is taken": profile is not None,
        }
        eager_reason = next((reason for reason, holds in reasons.items() if holds), None)
        self._opener = GraphOpener(folder, self.manifest, device or Device("cpu"), threads, eager_reason)
        self._step = self._opener.open_step(profile, prompts=prompts)
        self.device, self.eager_reason = self._opener.device, self._opener.eager_reason
        self.in_place = self.device.provider.in_place if in_place is None else in_place
        self._states: weakref.WeakSet[RecurrentState] = weakref.WeakSet()
        # Not a method of this session, which would then live until the next garbage collection.
        bind = partial(_bind, self._step, self._output, self.device)
        self._graphs = None if self.eager_reason else StepGraphs(self._step, bind)

    def close(self) -> None:
        """Give back the graphs and their memory; states keep theirs. Nothing runs any more."""
        if self._graphs is not None:
            self._graphs.close()
        for state in self._states:
            state.bindings.clear()
        self.closed, self._graphs = True, None
        for name in ("_step", "_decoder", "_opener"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_state(self, batch: int = 1) -> RecurrentState:
        """The state before the first token of `batch` sequences."""
        self._check_open()
        if self._graphs is not None:
            self._graphs.keep_only(batch)
        return RecurrentState.zeros(self.manifest, batch, self.device)

    def open_prefill(self) -> None:
        """Open what prompts need now rather than with the first one of several tokens."""
        self._check_open()
        _ = self._decoder

    def step(self, input_ids: Array, state: RecurrentState, *, logits: bool = True) -> Array | None:
        """Feed one token to each row: S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6). Moves `state` on.

        Args:
            input_ids: `[B]` integers; for a stack without an embedding, embeddings `[B, D]`.
            state: of the rows so far.
            logits: whether to fetch them.

        Returns:
            Logits `[B, vocab]` float32 (hidden states `[B, D]` of a stack without a head), or None.

        Raises:
            UsageError: ids outside the vocabulary, a wrong batch size, or a position past the last one.
        """
        self._check_open()
        ids = np.asarray(input_ids, dtype=self._input.dtype)
        expected = (state.batch, *self._input.shape[2:])
        if ids.shape != expected:
            raise UsageError(
                f"{self._input.name} of shape {list(ids.shape)}",
                f"{list(expected)}, one token for each row of the state",
            )
        self._check_ids(ids)
        self._check_positions(state.position)
        feeds = {self._input.name: ids[:, None], POSITION_IDS: state.position[:, None]}
        return self._run_step(feeds, state, fetch=logits)

    def prefill(
        self,
        input_ids: Array | Sequence[Any],
        state: RecurrentState,
        *,
        lengths: Array | Sequence[int] | None = None,
        chunk_size: int = PREFILL_CHUNK_SIZE,
    ) -> Array:
        """Feed a prompt to each row, chunk by chunk (Eq. 7), from wherever its state stands. Moves `state` on.

        Each row moves on by its own tokens; a row that has ended waits for the others unchanged. Memory depends on
        `chunk_size`, not on the prompts.

        Args:
            input_ids: `[B, T]` integers, or one sequence of integers for each row, of any lengths; for a stack without
                an embedding, `[B, T, D]` or one `[T_b, D]` for each row.
            state: of the rows so far.
            lengths: how many tokens of each row of `input_ids` count; None takes all.
            chunk_size: tokens to run at once.

        Returns:
            Logits `[B, vocab]` float32 after the last token of each row (hidden states `[B, D]` of a stack without a
            head).

        Raises:
            UsageError: an empty prompt, ids outside the vocabulary, a wrong batch size, a position past the last one,
                or a chunk size below 1. Nothing has run then.
        """
        prompts = self._prompts(input_ids, lengths, state)
        result = np.zeros((state.batch, int(self._output.shape[-1])), dtype=np.float32)
        bindings: dict[Any, Binding] = {}
        for chunk in prompts.chunks(chunk_size):
            fetch = bool(chunk.ends.any())
            if chunk.mask.shape[1] == 1 and chunk.mask.all():
                feeds = {self._input.name: chunk.tokens, POSITION_IDS: state.position[:, None]}
                logits = self._run_step(feeds, state, fetch=fetch)
            else:
                last = np.maximum(chunk.counts - 1, 0)[:, None]
                found = self._run_chunk(chunk, state, last, bindings, fetch=fetch)
                logits = None if found is None else found[:, 0]
            if logits is not None:
                result[chunk.ends] = logits[chunk.ends]
        self._release_spare(state)
        return result

    def score(
        self,
        input_ids: Array | Sequence[Any],
        state: RecurrentState,
        *,
        lengths: Array | Sequence[int] | None = None,
        chunk_size: int = PREFILL_CHUNK_SIZE,
    ) -> Iterator[Array]:
        """Feed a text to each row as `prefill` does, and give the logits after every token. Moves `state` on.

        Memory: as `prefill`, and four times a chunk of logits, `4 B chunk_size vocab` bytes: what the graph makes, its
        output for each of the two sets of states, and what is given.

        Yields:
            Logits `[B, n, vocab]` float32 of n = `chunk_size` tokens a row, fewer in the last chunk; those at tokens
            past a row's length mean nothing. `state` stands after the last chunk that was taken.

        Raises:
            UsageError: as `prefill`, when the first chunk is asked for; a state that was fed something else between two
                chunks, or a session that was closed.
        """
        prompts, bindings = self._prompts(input_ids, lengths, state), dict[Any, Binding]()
        expected = state.position
        try:
            for chunk in prompts.chunks(chunk_size):
                self._check_open()
                if not np.array_equal(state.position, expected):
                    raise UsageError("a state that was fed something else between two blocks", "one text at a time")
                every = np.broadcast_to(np.arange(chunk.mask.shape[1]), chunk.mask.shape)
                logits = self._run_chunk(chunk, state, every, bindings, fetch=True)
                assert logits is not None
                expected = state.position
                yield logits
        finally:
            self._release_spare(state)

    def _release_spare(self, state: RecurrentState) -> None:
        """Steps in place need no second set of buffers."""
        if self.in_place:
            state.release_spare()

    def _prompts(self, input_ids: Array | Sequence[Any], lengths: Any, state: RecurrentState) -> Prompts:
        """Prompts that can follow a state, whose spare buffers may be used."""
        self._check_open()
        width = tuple(int(size) for size in self._input.shape[2:])
        prompts = Prompts.of(input_ids, lengths, dtype=self._input.dtype, width=width)
        if len(prompts.lengths) != state.batch:
            raise UsageError(f"{len(prompts.lengths)} prompts", f"{state.batch}, one for each row of the state")
        for row, length in zip(prompts.tokens, prompts.lengths, strict=True):
            self._check_ids(row[:length])
        self._check_positions(state.position + prompts.lengths - 1)
        if self._graphs is not None:
            self._graphs.settle(state)
        return prompts

    def _run_chunk(
        self, chunk: Chunk, state: RecurrentState, indices: Array, bindings: dict[Any, Binding], *, fetch: bool
    ) -> Array | None:
        """Feed a chunk to each row: logits `[B, R, vocab]` at the places `indices` `[B, R]` of it, where asked for.

        Args:
            bindings: of the call, which chunks of one shape share.
        """
        tokens, mask = chunk.tokens, chunk.mask
        if mask.shape[1] == 1 and not mask.all():
            # A single token is real to the graph: here one more column is padding to all rows.
            tokens, mask = (np.pad(x, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)]) for x in (tokens, mask))
        feeds = {
            self._input.name: tokens,
            POSITION_IDS: state.position[:, None] + np.arange(mask.shape[1]),
            ATTENTION_MASK: mask,
            LOGITS_INDICES: indices,
        }
        past, present = state.current, state.spare
        # Buffers, which a binding keeps: numbers of lists are given again.
        key = (mask.shape, indices.shape, id(past[0]), id(present[0]))
        if key not in bindings:
            needed = chunk_bytes(self.manifest.config, self.manifest.dtype, *mask.shape)
            bindings[key] = _bind(
                self._decoder,
                self._output,
                self.device,
                feeds,
                past,
                present,
                needed=needed,
                rows=indices.shape[1],
            )
        logits = bindings[key].run(feeds, fetch=fetch)
        state.advance(chunk.counts, swap=True)
        return logits

    def _run_step(self, feeds: Mapping[str, Array], state: RecurrentState, *, fetch: bool) -> Array | None:
        binding = self._graphs.binding(state, feeds) if self._graphs is not None else None
        failure = None
        try:
            logits = (binding or self._bind_step(state, feeds)).run(feeds, fetch=fetch)
        except CaptureError as error:
            failure = error.found
        if failure is not None:
            # It writes the other set of buffers, so the states are what they were before it.
            binding = None
            self._give_up_graphs(failure)
            logits = self._bind_step(state, feeds).run(feeds, fetch=fetch)
        state.advance(1, swap=not self.in_place)
        return None if logits is None else logits[:, 0]

    def _give_up_graphs(self, failure: str) -> None:
        """Open step.onnx again without CUDA graphs: a session in which a capture failed can do nothing else."""
        assert self._graphs is not None
        self._graphs.close()
        # All that refers to the session, so that its memory is free for the next one.
        self._graphs = None
        del self._step
        self._step = self._opener.open_eager_step(f"a step could not be captured ({failure})")
        self.device, self.eager_reason = self._opener.device, self._opener.eager_reason

    def _bind_step(self, state: RecurrentState, feeds: Mapping[str, Array]) -> Binding:
        key = (self._step, id(state.current))
        if key not in state.bindings:
            present = state.current if self.in_place else state.spare
            if self.device.provider.step_file == DECODER_FILE:
                first = np.zeros((state.batch, 1), dtype=np.int64)
                feeds = {**feeds, ATTENTION_MASK: first + 1, LOGITS_INDICES: first}
            state.bindings[key] = _bind(self._step, self._output, self.device, feeds, state.current, present)
            self._states.add(state)
        binding: Binding = state.bindings[key]
        return binding

    @cached_property
    def _decoder(self) -> onnxruntime.InferenceSession:
        return self._opener.open_prompts(self._step)

    def end_profile(self) -> Path:
        """Write the profile that was asked for, and say where it is."""
        return Path(self._step.end_profiling())

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Check one prompt of token ids without running it.

        Raises:
            UsageError: no tokens, or ids outside the vocabulary.
        """
        if not len(tokens):
            raise UsageError("an empty prompt", "at least one token")
        self._check_ids(np.array(tokens, dtype=object))

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(f"the session of {self.folder} is closed", "an open one")

    def _check_ids(self, ids: Array) -> None:
        vocab = self.manifest.config.vocab_size
        if vocab and (ids.min() < 0 or ids.max() >= vocab):
            raise UsageError(f"token id {int(ids.max() if ids.max() >= vocab else ids.min())}", f"0 to {vocab - 1}")

    def _check_positions(self, last: Array) -> None:
        if last.max() > MAX_POSITION:
            raise UsageError(f"position {int(last.max())}", f"at most {MAX_POSITION}, the last the graph can place")


def _bind(
    graph: onnxruntime.InferenceSession,
    output: TensorSpec,
    device: Device,
    feeds: Mapping[str, Array],
    past: Sequence[Buffer],
    present: Sequence[Buffer],
    graph_id: int | None = None,
    needed: int | None = None,
    rows: int = 1,
) -> Binding:
    read = {PAST_NAMES % i: value for i, value in enumerate(past)}
    written = {PRESENT_NAMES % i: value for i, value in enumerate(present)}
    return Binding(graph, feeds, read, written, output, device, graph_id, needed, rows)
