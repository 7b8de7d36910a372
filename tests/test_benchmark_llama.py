"""The comparison with llama.cpp: in turns, with what deviates made again, and its table in docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from retnet_tools.bench.options import Case
from retnet_tools.bench.transformer_graph import matching_transformer, transformer_shapes
from retnet_tools.paper import model_size

ROOT = Path(__file__).parent.parent
PAIR = ("int8", "q8_0")
PROMPT, FAR = Case("prefill", 512, 0, 1), Case("decode", 16, 8192, 1)


@pytest.fixture
def llama(scripts) -> ModuleType:
    return scripts("llama_cpp")


@pytest.fixture
def engine(scripts) -> ModuleType:
    return scripts("llama_engine")


def replies(ours: list[float], theirs: list[float]) -> list[dict[str, dict[str, object]]]:
    """Of repetitions, in seconds."""
    rest = {"opening_seconds": 0.5, "first_seconds": 0.1, "peak_resident_bytes": 2e9, "private_bytes": None}
    both = zip(ours, theirs, strict=True)
    return [{"retnet": {"seconds": a, **rest}, "llama.cpp": {"seconds": b, **rest}} for a, b in both]


def test_its_table_says_what_was_made_again_and_what_deviates(llama: ModuleType, scripts) -> None:
    rows = [
        llama.row(PAIR, PROMPT, replies([2.0, 2.1, 2.0], [4.0, 4.1, 4.2]), [1]),
        llama.row(PAIR, FAR, replies([0.02, 0.02, 0.03], [0.08, 0.06, 0.06]), [0, 2]),
    ]
    record = {
        "command": "python benchmarks/llama_cpp.py",
        "recorded": "2026-11-24",
        "machine": {"processor": "Some processor", "cores": 2, "memory_bytes": None},
        "libraries": {"llama_cpp_python": "0.3.36"},
        "parameters": {"retnet": 10**9, "llama.cpp": 1_001_000_000},
        "weight_bytes": {"int8": 10**9, "q8_0": 2 * 10**9},
        **{"size": "1.3b", "threads": 2, "cache": "float16", "flash_attention": False, "results": rows},
    }
    text = scripts("docs_script_tables").llama_cpp(record)
    assert "| int8 / q8_0 | pp512 (again) | 256 | 125 | 2.00 times | 2.00 / 2.00 | - / - |" in text
    # The median of ratios within repetitions, 4, 3 and 2.
    assert "| int8 / q8_0 | tg16 @ d8192 (again) | 50 | 16.7 | 3.00 times |" in text
    assert "1,000.0 million parameters, the Llama 1,001.0; int8 1.00 GB, q8_0 2.00 GB; 2 threads" in text
    assert "Opening takes 0.50 / 0.50 s for int8 / q8_0 pp512." in text
    assert "Some still deviate by more than that: int8 tg16 @ d8192." in text
    assert "Some processor, 2 cores; 2026-11-24:\n\n```\npython benchmarks/llama_cpp.py\n```" in text
    printed = llama.text(record).splitlines()
    made_again = "int8 / q8_0 pp512 256.0 / 124.9 2.00 2.00 / 2.00 - / - 0.50 / 0.50 made again"
    assert " ".join(printed[1].split()) == made_again
    assert printed[2].endswith("deviating")


def test_what_deviates_by_more_than_a_tenth_is_named(llama: ModuleType) -> None:
    assert llama.deviating(replies([1.0, 1.09, 0.91], [1.0, 1.0, 1.0])) == []
    assert llama.deviating(replies([1.0, 1.0, 1.0], [1.0, 0.89, 1.0])) == [1]
    assert llama.deviating(replies([1.2, 1.0, 1.0], [1.0, 1.0, 1.2])) == [0, 2]


def test_a_repetition_that_deviates_is_made_again_once_by_both(
    llama: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {"retnet": iter([1.0, 1.0, 1.5, 1.0]), "llama.cpp": iter([2.0, 2.0, 2.0, 2.1])}
    asked: list[tuple[str, str]] = []

    def run(self: object, side: str, weights: str, test: Case) -> dict[str, object]:
        asked.append((side, weights))
        return replies([next(seconds[side])], [0.0])[0]["retnet"]

    monkeypatch.setattr(llama.Comparison, "run", run)
    comparison = llama.Comparison(Path(sys.executable), tmp_path, 1, False)
    (found,) = comparison.compare(PAIR, [Case("decode", 4, 0, 1)], 3)
    assert (found["made_again"], found["deviating"], found["times_as_fast"]) == ([2], [], 2.0)
    assert found["retnet"]["repetitions_ms"] == [1000, 1000, 1000]
    assert found["llama.cpp"]["repetitions_ms"] == [2000, 2000, 2100]
    # In turns, so that neither is always the first.
    ours, theirs = ("retnet", "int8"), ("llama.cpp", "q8_0")
    assert asked == [ours, theirs, theirs, ours, ours, theirs, ours, theirs]


def test_a_prompt_is_timed_when_it_is_read_again_and_steps_after_a_warm_up(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    now = 0.0

    class Fake:
        vocab_size = 7

        def __init__(self) -> None:
            nonlocal now
            now += 5

        def place(self, batch: int, depth: int, room: int) -> None:
            nonlocal now
            now += 1000
            calls.append((batch, depth, room))

        def feed(self, input_ids: np.ndarray) -> np.ndarray:
            nonlocal now
            calls.append(input_ids.shape[1])
            tokens = [n for n in calls if isinstance(n, int)]
            now += 100 / len(tokens)
            return np.zeros((1, 7))

    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now))
    test = {"warm_up": 3, "room": 99}
    found = engine.measured(Fake, test | {"kind": "prefill", "tokens": 5, "depth": 0})
    assert calls == [(1, 0, 99), 5, (1, 0, 99), 5]
    assert [found[f"{part}seconds"] for part in ("opening_", "first_", "")] == [5, 100, 50]
    calls.clear()
    found = engine.measured(Fake, test | {"kind": "decode", "tokens": 2, "depth": 64})
    assert calls == [(1, 64, 99), 1, 1, 1, 1, 1]
    assert [found[f"{part}seconds"] for part in ("opening_", "first_", "")] == pytest.approx([5, 100, 22.5])


def test_without_llama_cpp_one_line_says_what_to_do(llama: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named gguf' >&2\nexit 1\n")
    script.chmod(0o755)
    for python, reason in ((script, "No module named gguf"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(SystemExit) as stop:
            llama.versions(python)
        assert str(stop.value.code).startswith(f"error: {python} ")
        assert reason in str(stop.value.code)
        assert "\n" not in str(stop.value.code)


def test_every_weight_has_a_name_of_its_own_in_llama_cpp(engine: ModuleType) -> None:
    shapes = transformer_shapes(matching_transformer(model_size("base").config(100), max_positions=8))
    names = {engine.tensor_name(name) for name in shapes}
    assert len(names) == len(shapes)
    assert {"token_embd.weight", "blk.5.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"} <= names


def interpreter() -> Path | None:
    """One that has llama.cpp."""
    for python in (Path(sys.executable), ROOT / "out" / "llama-cpp" / "bin" / "python"):
        command = [python, "-P", "-c", "import llama_cpp, gguf"]
        if python.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return python
    return None


PLACED = """
import json, sys
from pathlib import Path
import llama_cpp  # before a script of that name can be found
import numpy as np
sys.path.append(sys.argv[3])
from llama_engine import LlamaEngine

engine = LlamaEngine(sys.argv[1], 1, 600, sys.argv[2], flash_attention=False)
api, memory = engine._api, engine._memory
prompt, following = np.random.default_rng(1).integers(0, 50257, (1, 64)), np.array([[777]])

def after(depth):
    engine.place(1, depth, 600)
    return engine.feed(following).copy()

engine.place(1, 0, 600)
engine.feed(prompt)
engine.keep()
read = engine.feed(following).copy()
first = after(64)
# Another way to the same keys and values: the prompt is read as a sequence of its own, at each place.
api.llama_memory_clear(memory, False)
for start in (0, 64, 128):
    batch = api.llama_batch_init(64, 0, 1)
    batch.n_tokens = 64
    for i, token in enumerate(prompt[0].tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 1
        batch.logits[i] = i == 63
    assert api.llama_decode(engine._context, batch) == 0
    api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
    api.llama_memory_seq_rm(memory, 1, -1, -1)
api.llama_memory_seq_rm(memory, 0, 150, -1)
engine._llama.n_tokens = 150
other, placed = engine.feed(following).copy(), after(150)
print(json.dumps([float(abs(a - b).max()) for a, b in ((read, first), (other, placed), (first, placed))]))
"""


def llama_python() -> Path:
    found = interpreter()
    if found is None:
        pytest.skip("no llama-cpp-python here: make out/llama-cpp compiles it")
    return found


@pytest.mark.slow
def test_llama_cpp_is_measured_to_the_end(scripts, tmp_path: Path) -> None:
    python = llama_python()
    output, folder = tmp_path / "out.json", tmp_path / "models"
    command = [sys.executable, str(ROOT / "benchmarks" / "llama_cpp.py"), "--quick", "--llama-python", str(python)]
    command += ["--folder", str(folder), "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    document = json.loads(output.read_text())
    assert abs(document["parameters"]["llama.cpp"] / document["parameters"]["retnet"] - 1) < 0.01
    tests = ["pp64", *(f"tg4{depth}" for depth in ("", " @ d128", " @ d320"))]
    assert [row["test"] for row in document["results"]] == 2 * tests
    for row in document["results"]:
        assert not row["deviating"]
        assert min(row["times_as_fast"], *(row[side]["tokens_per_second"] for side in ("retnet", "llama.cpp"))) > 0
    assert "| int8 / q8_0 | pp64 |" in scripts("docs_script_tables").llama_cpp(document)
    # Attention reads all that is placed: logits after a prompt, and after it twice and a half in llama.cpp's own way.
    model, kept = folder / "base" / "q8_0.gguf", tmp_path / "kept"
    command = [str(python), "-P", "-c", PLACED, str(model), str(kept), str(ROOT / "benchmarks")]
    process = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    once, twice_and_a_half, between = json.loads(process.stdout)
    assert once < 1e-6
    assert twice_and_a_half < 0.1 * between
