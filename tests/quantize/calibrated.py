"""Tasks and results of calibrated methods, for their tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.quantization import Calibration, Scheme
from retnet_tools.progress import Progress
from retnet_tools.quantize.blockwise import QuantizedRows, dequantize_rows
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.methods import Method, MethodTask
from retnet_tools.quantize.options import matrix_formats
from retnet_tools.quantize.unfinished import Workplace
from retnet_tools.tokenizing.files import load_tokenizer
from retnet_tools.weights import Array, WeightSource
from tests.helpers import MemorySource, random_tokens

FIXTURE = Path(__file__).parent.parent.parent / "fixtures" / "shakespeare"
INT4 = Scheme("int4", 32, method="gptq")


def quiet(what: str, done: int, total: int) -> None:
    pass


def as_text(sequences: Array) -> CalibrationText:
    return CalibrationText(Calibration("random", "00" * 32, sequences.size), sequences)


def make_task(
    config: RetNetConfig,
    source: WeightSource,
    work: Path | Workplace,
    *,
    scheme: Scheme = INT4,
    sequences: Array | None = None,
    dtype: str = "float32",
    progress: Progress = quiet,
) -> MethodTask:
    """A task; without sequences on 3 of 40 random tokens."""
    if sequences is None:
        sequences = random_tokens(config, 3, 40, 7)
    formats = matrix_formats(scheme, config)
    place = Workplace(work) if isinstance(work, Path) else work
    return MethodTask(config, source, formats, np.dtype(dtype), as_text(sequences), place, progress)


def all_rows(method: Method, task: MethodTask) -> dict[str, QuantizedRows]:
    """The codes of every quantized matrix."""
    return {
        name: method(name, task.weights.read(name).astype(np.float32), format, task.dtype)
        for name, format in task.formats.items()
        if format is not None
    }


def with_rows(
    source: WeightSource, rows: Mapping[str, QuantizedRows], formats: Mapping[str, BlockFormat | None]
) -> MemorySource:
    """The weights that a model of these codes computes with."""
    tensors = {name: source.read(name).astype(np.float32) for name in source.names()}
    for name, quantized in rows.items():
        format = formats[name]
        assert format is not None
        tensors[name] = dequantize_rows(quantized, format)
    return MemorySource(tensors)


def fixture() -> Checkpoint:
    return open_checkpoint(FIXTURE)


def fixture_tokens(name: str, rows: int, length: int) -> Array:
    """Rows of tokens `[rows, length]` that follow one another in a text of the fixture."""
    text = (FIXTURE / name).read_text(encoding="utf-8")
    ids = load_tokenizer(FIXTURE / "tokenizer.json").encode(text).ids
    return np.array(ids[: rows * length], dtype=np.int64).reshape(rows, length)
