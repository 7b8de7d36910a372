"""The whole command on a GPU that computes nothing: where rows ran, what was captured, what memory it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retnet_tools.paper import paper_config
from tests.exports import export
from tests.fake_gpu import COUNTS, FakeGpu, needs_fake_gpu
from tests.helpers import BASE, random_source

COMMAND = ("bench", "--device", "cuda", "--quick", "-t", 1)


def bench(*arguments: object) -> tuple[dict[str, Any], str]:
    result = FakeGpu().run("-m retnet_tools.cli.app", *COMMAND, *arguments, "--json")
    return json.loads(result.stdout), result.stderr


@pytest.mark.slow
@needs_fake_gpu
@pytest.mark.parametrize("captured", [True, False])
def test_rows_say_which_steps_were_captured_and_what_memory_they_took(captured: bool, tmp_path: Path) -> None:
    options = ("--dtype", "fp16", "--against", "transformer", "-p", 9, "-n", 4, "-r", 1, "-b", "1,64", "--profile")
    document, _ = bench(*options, *(() if captured else ("--no-cuda-graph",)), "--folder", tmp_path)
    assert document["skipped"] == []
    assert (document["device"], document["device_name"]) == ("cuda", "Fake GPU 0")
    assert document["profile"]["device"] == "cuda"
    rows = {(row["implementation"], row["kind"], row["batch"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 8
    for row in rows.values():
        assert row["device"] == "cuda"
        assert row["cuda_graph"] is (captured if row["kind"] == "decode" else None)
        # Of the process alone, in one test: weights in float16 for each graph and what came on top.
        assert 2 * 4e6 < row["device_bytes"] < 2e8
    for name, buffers in (("retnet", 2), ("transformer", 1)):
        one, many = (rows[name, "decode", batch] for batch in (1, 64))
        assert one["state_buffers"] == buffers
        least = 63 * buffers * one["state_bytes_per_sequence"]
        assert least < many["device_bytes"] - one["device_bytes"] < least + 20e6
        assert many["memory_per_sequence"] == pytest.approx((many["device_bytes"] - one["device_bytes"]) / 63)


@needs_fake_gpu
def test_what_fell_back_to_the_cpu_is_not_called_cuda(tmp_path: Path) -> None:
    """The heads are too large for CUDA's LinearAttention in an export for the CPU."""
    config = paper_config(vocab_size=61, hidden_size=384, value_dim=800, ffn_dim=64, num_layers=1, num_heads=2)
    out = export(config, random_source(config, 5), tmp_path / "out")
    document, messages = bench(out, "-p", 0, "-n", 1, "-r", 1, "--allow-cpu-fallback")
    (row,) = document["rows"]
    assert (row["device"], row["device_bytes"], row["cuda_graph"]) == ("cpu", None, None)
    assert (document["device"], document["device_name"]) == ("cpu", None)
    assert "running on the CPU" in messages


PLACE = (
    COUNTS
    + """
import json, sys
from pathlib import Path
import numpy as np
from retnet_tools.bench.engines import RetNetEngine
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.runtime import Device
from retnet_tools.runtime.cuda_graphs import StepGraphs
released = []
StepGraphs._release = lambda self, pair, _own=StepGraphs._release: released.append(pair.ids) or _own(self, pair)
engine = RetNetEngine(RetNetSpec(Path(sys.argv[1]), Device("cuda"), 1, 128))
found = []
for batch in (64, 64, 2):
    engine.place(batch, 1000, 0)
    deviations = [float(np.std(value.read())) for value in engine._state.current]
    positions = engine._state.position.tolist()
    for _ in range(5):
        engine.feed(np.zeros((batch, 1), dtype=np.int64))
    found.append([len(released), counts()[1], deviations, positions])
print(json.dumps(found))
"""
)


@needs_fake_gpu
def test_captured_buffers_of_other_batch_sizes_are_given_back(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    first, again, other = FakeGpu().evaluate(PLACE, out)
    # The second batch of 64 moves into the buffers of the first; one of 2 has them released before its own are made.
    assert [place[:2] for place in (first, again, other)] == [[0, 2], [0, 2], [1, 4]]
    for batch, (*_, deviations, position) in zip((64, 64, 2), (first, again, other), strict=True):
        # N(0, 1) numbers in every layer.
        assert all(0.8 < deviation < 1.2 for deviation in deviations)
        assert position == [1000] * batch
