"""Quantizing holds some blocks of a matrix, not the matrix."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.exports import export
from tests.helpers import BASE, PEAK_RESIDENT, MemorySource, random_source

# Two matrices of 134 MB; what is held is blocks of 16 MB, packed codes on their way and the scales of one matrix.
LARGE = replace(BASE, vocab_size=1 << 16, hidden_size=512, key_dim=512, rotary_frequencies=(1.0,) * 64)
QUANTIZE = (
    PEAK_RESIDENT
    + """
import sys
from pathlib import Path
from retnet_tools.graph.export import plan_of_export
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.steps import plan_quantized, write_quantized
plan = plan_of_export(Path(sys.argv[1]))
plan = plan_quantized(plan, QuantizeOptions("int4"))
before = peak_resident()
write_quantized(plan, Path(sys.argv[2]), force=False)
print(peak_resident() - before)
"""
)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_matrices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal((1 << 16, 512), dtype=np.float32)
    tensors = random_source(replace(LARGE, vocab_size=1), 1).tensors
    tensors |= {"embedding.weight": block, "lm_head.weight": block}
    folder = export(LARGE, MemorySource(tensors), tmp_path / "float")
    command = [sys.executable, "-c", QUANTIZE, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert block.nbytes > 100e6
    assert grown < block.nbytes
