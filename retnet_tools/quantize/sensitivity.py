"""What quantizing a matrix costs: the KL divergence of the logits when that matrix alone is quantized.

    s(W, type) = mean over tokens of KL(p of the float model || p of the model with W rounded to nearest as type)

Time: for each matrix and type a pass from its block to the end, half a model on average, and the head twice. Memory:
one block in float32; the matrix of the head, and where embedding or head are tried two more of that size; hidden
states of the tokens, of which there are few, five times; 2^22 logits of each model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retnet_tools.distributions import mean_kl
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.quantization import Calibration
from retnet_tools.inputs import load_json
from retnet_tools.model.layerwise import EMBEDDING, Block, Head, block_count, embed, head_matrix
from retnet_tools.quantize.activations import FloatWeights, batches, not_finite
from retnet_tools.quantize.blockwise import dequantize_rows, quantize_rows
from retnet_tools.quantize.calibration import hash_ids
from retnet_tools.quantize.methods import MethodTask
from retnet_tools.quantize.options import SEQUENCE
from retnet_tools.quantize.unfinished import hash_work
from retnet_tools.weights import Array

VERSION = 2
"""Of what divergences come out."""
TOKENS = 8 * SEQUENCE
"""Calibration tokens that are looked at, at most. On the shipped model (33 matrices, 4 bits) sensitivities by 8
sequences are 5% off those by 128 in the median, and up to 60% for the least sensitive matrices."""
_LOGITS = 1 << 22
"""Logits of a model in memory at a time; at least those of one token."""
_FILE = "divergences.json"
Formats = Mapping[str, BlockFormat]


@dataclass(frozen=True)
class Trial:
    """Matrices of one block, or the embedding or the head, to be quantized together in one format."""

    names: tuple[str, ...]
    format: BlockFormat

    @property
    def key(self) -> str:
        """A name for it."""
        return f"{' '.join(self.names)} {self.format.bits}"


class Sensitivity:
    """Measures divergences of a model from itself with some matrices quantized.

    Results are kept as they are found: a run that is stopped goes on after the last of them.

    Args:
        task: the model, the text, the folder; its formats are not looked at.
        trials: what will be measured.

    Attributes:
        text: the tokens that are looked at: sequences of the task's text, evenly spaced.

    Raises:
        InputError: weights that are not finite, before anything is kept; then and later, logits that are not.
    """

    def __init__(self, task: MethodTask, trials: Sequence[Trial]) -> None:
        assert task.text is not None
        self._config, self._task, self._trials = task.config, task, trials
        self._weights = FloatWeights(task.weights, task.dtype)
        total, length = task.text.sequences.shape
        count = min(total, max(1, TOKENS // length))
        self._ids: Array = task.text.sequences[np.arange(count) * total // count]
        self.text: Calibration = replace(task.text.record, tokens=self._ids.size, ids_sha256=hash_ids(self._ids))
        self._parts, self._last = batches(self._ids), block_count(task.config)
        task.progress("reading weights", 0, len(trials) + 1)
        formats = {trial.key: trial.format for trial in trials}
        key = hash_work(task.config, self._weights, formats, self._ids, dtype=task.dtype.name, version=VERSION)
        self._work = task.work.open("sensitivity", key)
        name = head_matrix(self._config)
        self._head = Head(self._config, self._weights, self._weights.read(name))
        self._start = self._embed({})
        self._float = self._run(0, self._start, {})

    def measure(self) -> dict[Trial, float]:
        """The divergence of each trial, nats a token."""
        file = self._work.folder / _FILE
        found: dict[str, float] = load_json(file, action=f"remove {file}") if _FILE in self._work else {}
        places: dict[int, list[Trial]] = {}
        for trial in self._trials:
            if trial.key not in found:
                places.setdefault(self._place(trial), []).append(trial)
        x = self._start
        for n in range(self._last + 1):
            for trial in places.get(n, ()):
                self._task.progress(trial.names[0], len(found), len(self._trials) + 1)
                found[trial.key] = self._divergence(n, x, dict.fromkeys(trial.names, trial.format))
                with self._work.writing(_FILE) as path:
                    path.write_text(json.dumps(found), encoding="utf-8")
            if n < self._last and max(places, default=0) > n:
                x = self._step(n, x, {})
        return {trial: found[trial.key] for trial in self._trials}

    def total(self, formats: Formats) -> float:
        """The divergence with all of these matrices quantized, nats a token."""
        self._task.progress("all together", len(self._trials), len(self._trials) + 1)
        return self._divergence(0, self._start, formats)

    def _divergence(self, n: int, x: Array, formats: Formats) -> float:
        if n == 0 and EMBEDDING in formats:
            x = self._embed(formats)
        final, name = self._run(n, x, formats), head_matrix(self._config)
        head = Head(self._config, self._weights, self._matrix(name, formats)) if name in formats else self._head
        total = 0.0
        for states, changed in zip(self._few(self._float), self._few(final), strict=True):
            logits = self._head.logits(states), head.logits(changed)
            if not all(np.isfinite(part).all() for part in logits):
                # No later run gets further than this one.
                self._work.remove()
                raise not_finite(name, "inputs or logits")
            total += mean_kl(*logits) * states.shape[1]
        return total / self._ids.size

    def _few(self, states: Array) -> Iterator[Array]:
        """Hidden states `[S, T, D]` of some tokens at a time, `[1, n, D]`."""
        tokens = states.reshape(1, -1, states.shape[-1])  # [S, T, D] -> [1, S T, D]
        size = max(1, _LOGITS // self._config.vocab_size)
        for start in range(0, tokens.shape[1], size):
            yield tokens[:, start : start + size]

    def _place(self, trial: Trial) -> int:
        """The block before which a run has to begin."""
        name = trial.names[0]
        if name.startswith("layers."):
            _, layer, part, *_ = name.split(".")
            return 2 * int(layer) + (part == "ffn")
        return 0 if name == EMBEDDING else self._last

    def _embed(self, formats: Formats) -> Array:
        matrix = self._matrix(EMBEDDING, formats)
        return np.concatenate([embed(self._config, self._weights, matrix, self._ids[part]) for part in self._parts])

    def _run(self, n: int, x: Array, formats: Formats) -> Array:
        """Hidden states after the last block, `[S, T, D]`, from those before block n."""
        for m in range(n, self._last):
            x = self._step(m, x, formats)
        return x

    def _step(self, n: int, x: Array, formats: Formats) -> Array:
        block = Block(self._config, self._weights, n)
        for name in (name for step in block.matrices for name in step if name in formats):
            block.set_matrix(name, self._quantized(block.matrix(name), formats[name]))
        return np.concatenate([block(x[part]) for part in self._parts])

    def _matrix(self, name: str, formats: Formats) -> Array:
        matrix = self._weights.read(name)
        return self._quantized(matrix, formats[name]) if name in formats else matrix

    def _quantized(self, matrix: Array, format: BlockFormat) -> Array:
        return dequantize_rows(quantize_rows(matrix, format, self._task.dtype), format)
