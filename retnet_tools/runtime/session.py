"""An exported folder, opened: one call a token, states staying where the provider keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.graph.contract import (
    MANIFEST_FILE,
    MAX_POSITION,
    POSITION_IDS,
    STEP_FILE,
    WEIGHTS_FILE,
    past_name,
    present_name,
    step_inputs,
    step_outputs,
)
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime.providers import Device, open_session
from retnet_tools.runtime.state import RecurrentState
from retnet_tools.weights import Array


class DecoderSession:
    """step.onnx of an exported folder on one device.

    Args:
        folder: what `retnet-tools export` wrote.
        device: where to run.
        threads: of the CPU provider; None lets ONNX Runtime choose.

    Raises:
        InputError: not an exported folder, or an incomplete one.
        ProviderError: the device cannot be had.
    """

    def __init__(self, folder: Path, device: Device | None = None, threads: int | None = None) -> None:
        if not folder.is_dir():
            raise InputError(f"no folder {folder}", f"a folder with {MANIFEST_FILE}, written by `retnet-tools export`")
        self.folder = folder
        self.manifest = read_manifest(folder)
        for name in (STEP_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}", "a complete export", "export the checkpoint again")
        self.device = device or Device("cpu")
        self._session = open_session(folder / STEP_FILE, self.device, threads)
        self._binding = self._session.io_binding()
        config = self.manifest.config
        self._input, *_ = step_inputs(config, self.manifest.state_dtype)
        self._output, *_ = step_outputs(config, self.manifest.state_dtype)

    def new_state(self, batch: int = 1) -> RecurrentState:
        """The state before the first token of `batch` sequences."""
        return RecurrentState.zeros(self.manifest, batch, self.device)

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
        ids = np.asarray(input_ids, dtype=self._input.dtype)
        self._check(ids, state)
        binding = self._binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        binding.bind_cpu_input(self._input.name, np.ascontiguousarray(ids[:, None]))
        binding.bind_cpu_input(POSITION_IDS, np.ascontiguousarray(state.position[:, None]))
        for i, (past, present) in enumerate(zip(state.current, state.spare, strict=True)):
            binding.bind_ortvalue_input(past_name(i), past)
            binding.bind_ortvalue_output(present_name(i), present)
        if logits:
            binding.bind_output(self._output.name, "cpu")
        self._session.run_with_iobinding(binding)
        state.advance()
        return binding.get_outputs()[-1].numpy()[:, 0] if logits else None

    def _check(self, ids: Array, state: RecurrentState) -> None:
        vocab, expected = self.manifest.config.vocab_size, (state.batch, *self._input.shape[2:])
        if ids.shape != expected:
            raise UsageError(
                f"{self._input.name} of shape {list(ids.shape)}",
                f"{list(expected)}, one token for each row of the state",
            )
        if vocab and (ids.min() < 0 or ids.max() >= vocab):
            raise UsageError(f"token id {int(ids.max() if ids.max() >= vocab else ids.min())}", f"0 to {vocab - 1}")
        if state.position.max() > MAX_POSITION:
            raise UsageError(
                f"position {int(state.position.max())}", f"at most {MAX_POSITION}, the last the graph can place"
            )
