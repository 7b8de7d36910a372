"""Steps of the Transformer are captured on CUDA as RetNet's are; nothing here is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from retnet_tools.bench.models import Precision, write_transformer
from tests.bench.transformer_reference import CONFIG
from tests.fake_gpu import COUNTS, FakeGpu, needs_fake_gpu

OPEN = (
    COUNTS
    + f"""
import json, sys
from pathlib import Path
import numpy as np
from retnet_tools.bench.transformer_graph import TransformerConfig
from retnet_tools.runtime import Device
from retnet_tools.bench.transformer_session import TransformerSession
config = {CONFIG!r}
graph = {{"None": None, "False": False}}[sys.argv[2]]
session = TransformerSession(Path(sys.argv[1]), config, "float16", Device("cuda"), cuda_graph=graph)

def feed(cache, tokens):
    session.run(np.zeros((cache.batch, tokens), dtype=np.int64), cache)
    return counts()[1:]
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transformer") / "out"
    return write_transformer(CONFIG, Precision("float16", None, "fused"), out)


@needs_fake_gpu
def test_steps_are_captured_once_and_replayed_and_prompts_are_not(folder: Path) -> None:
    program = OPEN + "cache = session.new_cache(2, 32)\n"
    program += "print(json.dumps([session.eager_reason, *(feed(cache, n) for n in (5, 1, 1, 1, 1))]))"
    reason, prompt, *steps = FakeGpu().evaluate(program, folder, "None")
    assert reason is None
    assert prompt == [0, 0]
    assert [captures for captures, _ in steps] == [1, 1, 1, 1]
    assert [replays for _, replays in steps] == [1, 2, 3, 4]


@needs_fake_gpu
def test_every_cache_has_a_graph_of_its_own(folder: Path) -> None:
    program = OPEN + "caches = [session.new_cache(batch, 32) for batch in (1, 1, 2)]\n"
    program += "print(json.dumps([feed(cache, 1) for _ in range(2) for cache in caches]))"
    found = FakeGpu().evaluate(program, folder, "None")
    assert [captures for captures, _ in found] == [1, 2, 3, 3, 3, 3]
    # A cache that is gone takes its graph with it, and later ones are captured anew.
    program += "\ndel caches; cache = session.new_cache(1, 32)\nprint(json.dumps(feed(cache, 1)))"
    assert FakeGpu().evaluate(program, folder, "None")[0] == 4


@needs_fake_gpu
def test_it_runs_kernel_by_kernel_where_that_is_asked_for(folder: Path) -> None:
    program = OPEN + "cache = session.new_cache(1, 32)\n"
    program += "print(json.dumps([session.eager_reason, feed(cache, 1), feed(cache, 1)]))"
    assert FakeGpu().evaluate(program, folder, "False") == ["it was asked for", [0, 0], [0, 0]]
