"""GPTQ over a whole model, block by block, in the order in which the model computes.

Two streams of hidden states run through the model: the float model's, and that of the model whose blocks so far are
quantized. In each block first the matrices that read its input are rounded, then, with these in place, the one that
reads what they make (see `retnet_tools.quantize.gptq`). The embedding is a lookup, which has no inputs: it is rounded
to nearest, and the output head comes last. A tied matrix is embedding and head in one: it is rounded first, as the
head, on the float model's hidden states, and all blocks see the embedding that results.

On the shipped model (int4 in blocks of 64, 65,536 tokens) the mean KL divergence on held-out text is 0.022 to nearest,
0.016 with both streams the quantized one, as the paper has it, and 0.013 as it is done here; with the tied matrix to
nearest or rounded after the blocks, 0.015 and 0.014. Choosing scales for errors weighted by diag(H) changes nothing.

Memory: one block in float32 twice, 3 K^2 numbers of 8 bytes for its input (see `ErrorFeedback`), activations of 2048
tokens; while tokens are embedded, and for the head, the vocabulary's matrix. On disk: both streams twice, 16 bytes a
token and hidden dimension (2.1 GB for 65,536 tokens of a model of 2048), 24 where both blocks of a layer read one
stream, and a byte for each weight that is done.

A run that is stopped goes on at the block it was at: see `retnet_tools.quantize.unfinished`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from retnet_tools.errors import InputError, OutputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.model.layerwise import EMBEDDING, Block, Head, block_count, embed, head_matrix, stream_width
from retnet_tools.quantize.activations import FloatWeights, batches, read_states, write_states
from retnet_tools.quantize.blockwise import QuantizedRows, dequantize_rows, join_rows, quantize_rows
from retnet_tools.quantize.gptq import DAMPING, ErrorFeedback, InputStatistics
from retnet_tools.quantize.methods import MethodTask
from retnet_tools.quantize.unfinished import Unfinished, hash_work
from retnet_tools.weights import Array, canonical_shapes

VERSION = 2
"""Of what codes come out, so that a run does not go on from codes that another algorithm chose."""
_ROWS = 1024
"""Rows of a matrix that are rounded at a time."""
_Pairs = Iterable[tuple[Array, Array]]
Formats = dict[str, BlockFormat]


class Gptq:
    """The method: every matrix is rounded when it is made, and handed out when it is asked for.

    Raises:
        InputError: weights that are not finite, before anything is kept, or activations that are not.
        OutputError: too little space for the hidden states and the codes.
    """

    def __init__(self, task: MethodTask) -> None:
        self._work = _Run(task).finish()
        self._open: tuple[str, QuantizedRows, int] | None = None

    def __call__(self, name: str, rows: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
        """The codes of the next rows of a matrix, and after its last rows of the first again; the rows themselves are
        known from the task.
        """
        if self._open is None or self._open[0] != name:
            self._open = name, self._work.load_rows(name, scale_type), 0
        _, done, start = self._open
        part, count = slice(start, start + len(rows)), len(done.codes)
        if part.stop > count:
            raise ValueError(f"rows {start} to {part.stop - 1} of {name}, which has {count}")
        self._open = (name, done, part.stop) if part.stop < count else None
        zeros = done.zero_points
        return QuantizedRows(done.codes[part], done.scales[part], None if zeros is None else zeros[part])


class _Run:
    def __init__(self, task: MethodTask) -> None:
        assert task.text is not None
        self._config, self._task, self._formats = task.config, task, task.formats
        self._weights, self._ids = FloatWeights(task.weights, task.dtype), task.text.sequences
        self._parts = batches(self._ids)
        self._shapes = canonical_shapes(task.config)
        self._head, self._last = head_matrix(task.config), block_count(task.config)
        task.progress("reading weights", 0, self._last + 2)
        decisions = {"dtype": task.dtype.name, "version": VERSION, "damping": DAMPING}
        self._work = task.work.open("gptq", hash_work(task.config, self._weights, task.formats, self._ids, **decisions))

    def finish(self) -> Unfinished:
        """Do what is not done yet; gives back where the codes are."""
        if self._missing():
            self._check_space()
            self._begin()
            start = next((n for n in range(self._last, -1, -1) if all(s in self._work for s in _streams(n))), None)
            if start is None:
                start = 0
                self._embed()
            for n in range(start, self._last):
                self._quantize_block(n)
            self._finish_head()
        return self._work

    def _missing(self) -> Formats:
        """Matrices whose codes are not there yet, and their formats."""
        return {name: f for name, f in self._formats.items() if f is not None and f"{name}.npz" not in self._work}

    def _begin(self) -> None:
        """The embedding, which all blocks see: as the head where it is tied, else to nearest."""
        format = self._formats[EMBEDDING]
        if format is None or f"{EMBEDDING}.npz" in self._work:
            return
        self._progress("embedding", 0)
        if self._head == EMBEDDING:
            self._quantize_tied(format)
        else:
            matrix = self._weights.read(EMBEDDING)
            self._work.save_rows(EMBEDDING, quantize_rows(matrix, format, self._task.dtype))

    def _quantize_tied(self, format: BlockFormat) -> None:
        matrix = self._weights.read(EMBEDDING)
        self._write("hidden-float", (embed(self._config, self._weights, matrix, self._ids[p]) for p in self._parts))
        for n in range(self._last):
            block = Block(self._config, self._weights, n)
            self._write("hidden-float", (block(x) for x in self._read("hidden-float")))
        head = Head(self._config, self._weights, matrix)
        inputs = (head.inputs(x) for x in self._read("hidden-float"))
        statistics = self._statistics([EMBEDDING], ((x, x) for x in inputs))
        rows = self._round(self._feedback("the output head", statistics), matrix, format)
        self._work.save_rows(EMBEDDING, rows)
        self._work.discard("hidden-float")

    def _embed(self) -> None:
        matrix = self._weights.read(EMBEDDING)
        for name in _streams(0):
            if "quantized" in name and (format := self._formats[EMBEDDING]) is not None:
                matrix = dequantize_rows(self._work.load_rows(EMBEDDING, self._task.dtype), format)
            self._write(name, (embed(self._config, self._weights, matrix, self._ids[p]) for p in self._parts))

    def _quantize_block(self, n: int) -> None:
        floats, block = (Block(self._config, self._weights, n) for _ in range(2))
        self._progress(block.name, n + 1)
        first, last = ({n: f for n in names if (f := self._formats[n]) is not None} for names in block.matrices)
        if first:
            pairs = ((floats.inputs(0, x), block.inputs(0, y)) for x, y in self._states(n))
            self._round_matrices(block, first, self._statistics(first, pairs))
        old, (new_float, new_quantized) = _streams(n), _streams(n + 1)
        # What the last matrix reads is most of a block's work: the float stream moves on with it.
        statistics = self._statistics(last) if last else None
        self._write(new_float, self._moving_on(n, floats, block, statistics))
        if statistics is not None:
            self._round_matrices(block, last, statistics)
        self._write(new_quantized, (block(y) for y in self._read(old[1])))
        for name in old:
            self._work.discard(name)

    def _moving_on(self, n: int, floats: Block, block: Block, statistics: InputStatistics | None) -> Iterator[Array]:
        """The float stream after a block; on the way what the last matrix of the block reads is taken in."""
        for x, y in self._states(n):
            inputs = floats.inputs(1, x)
            if statistics is not None:
                statistics.add(inputs, block.inputs(1, y))
            yield floats.after(x, inputs)

    def _round_matrices(self, block: Block, chosen: Formats, statistics: InputStatistics) -> None:
        """Round the matrices of a block that read one input, and put them into it."""
        feedback = self._feedback(block.name, statistics)
        for name, format in chosen.items():
            rows = self._round(feedback, block.matrix(name), format)
            self._work.save_rows(name, rows)
            block.set_matrix(name, dequantize_rows(rows, format))

    def _finish_head(self) -> None:
        format = self._formats[self._head]
        if self._head == EMBEDDING or format is None:
            return
        self._progress("output head", self._last + 1)
        matrix = self._weights.read(self._head)
        head = Head(self._config, self._weights, matrix)
        pairs = ((head.inputs(x), head.inputs(y)) for x, y in self._states(self._last))
        feedback = self._feedback("the output head", self._statistics([self._head], pairs))
        self._work.save_rows(self._head, self._round(feedback, matrix, format))

    def _statistics(self, names: Iterable[str], pairs: _Pairs = ()) -> InputStatistics:
        """Of the input of some matrices."""
        statistics = InputStatistics(self._shapes[next(iter(names))][1])
        for float_inputs, inputs in pairs:
            statistics.add(float_inputs, inputs)
        return statistics

    def _feedback(self, name: str, statistics: InputStatistics) -> ErrorFeedback:
        try:
            return ErrorFeedback(statistics, name)
        except InputError:
            # No later run gets further than this one.
            self._work.remove()
            raise

    def _round(self, feedback: ErrorFeedback, matrix: Array, format: BlockFormat) -> QuantizedRows:
        starts = range(0, len(matrix), _ROWS)
        return join_rows([feedback.quantize(matrix[n : n + _ROWS], format, self._task.dtype) for n in starts])

    def _states(self, n: int) -> Iterator[tuple[Array, Array]]:
        return zip(*(self._read(name) for name in _streams(n)), strict=True)

    def _read(self, name: str) -> Iterator[Array]:
        return read_states(self._work.folder / name, self._parts)

    def _write(self, name: str, parts: Iterable[Array]) -> None:
        with self._work.writing(name) as path:
            write_states(path, len(self._ids), parts)

    def _progress(self, what: str, done: int) -> None:
        self._task.progress(what, done, self._last + 2)

    def _check_space(self) -> None:
        streams = [self._work.folder / name for n in range(self._last + 1) for name in _streams(n)]
        needed = 8 * self._ids.size * sum(stream_width(self._config, n) for n in range(2))
        needed -= sum(file.stat().st_size for file in streams if file.is_file())
        for name, format in self._missing().items():
            rows, columns = self._shapes[name]
            # A byte a code, 4 a scale, 1 a zero point.
            needed += rows * (columns + format.blocks(columns) * (4 if format.symmetric else 5))
        free = shutil.disk_usage(self._work.folder).free
        if free < needed:
            raise OutputError(
                f"{free / 1e9:.2f} GB free for hidden states of {self._ids.size} tokens and codes in "
                f"{self._work.folder}",
                f"{needed / 1e9:.2f} GB",
                "free space, or calibrate on fewer tokens",
            )


def _streams(n: int) -> tuple[str, str]:
    """The files of the hidden states before block n: the float model's, and the quantized one's."""
    return f"hidden-{n}-float", f"hidden-{n}-quantized"
