"""The first onnxruntime that runs opset 27, in a process of its own: this one may hold an older version.

It is the folder of a `pip install --no-deps --target`: out/onnxruntime-1.32, which `make test` makes, or what
RETNET_TOOLS_ONNXRUNTIME names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from retnet_tools.graph.contract import (
    ATTENTION_MASK,
    DECODER_FILE,
    LOGITS_INDICES,
    POSITION_IDS,
    PREFILL_FILE,
    STEP_FILE,
)
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.weights import Array
from tests.exports import cpu_runner, run_prefill, run_steps, zero_states

Feeds = dict[str, Array]
Run = Callable[[Feeds], list[Array]]
WAYS = ("two graphs", "one graph")
ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("RETNET_TOOLS_ONNXRUNTIME") or ROOT / "out" / "onnxruntime-1.32")


def why_not() -> str | None:
    """The reason why that onnxruntime cannot be used; None where it can."""
    if (FOLDER / "onnxruntime" / "__init__.py").is_file():
        return None
    return f"no onnxruntime in {FOLDER}: make {FOLDER.relative_to(ROOT) if ROOT in FOLDER.parents else FOLDER}"


def run_module(*words: object) -> subprocess.CompletedProcess[str]:
    """`python -m ...` with it."""
    paths = [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def run_graphs(folders: list[Path]) -> str:
    """Run the `ids.npy` `[B, T]` of each exported folder through its graphs; gives the version that ran them.

    `ran.npz` is then in each, for each of `WAYS`: logits of every step `[T, B, vocab]`, of the prompt `[B, vocab]`, and
    the states after both.
    """
    done = run_module("tests.later_runtime", json.dumps([str(folder) for folder in folders]))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def runners(folder: Path, open_graph: Callable[[Path], Run]) -> Iterator[tuple[Run, Run]]:
    """What runs steps and what runs prompts, in each of `WAYS`."""
    yield open_graph(folder / STEP_FILE), open_graph(folder / PREFILL_FILE)
    decoder = open_graph(folder / DECODER_FILE)

    def prompt(feeds: Feeds) -> list[Array]:
        return decoder({**feeds, LOGITS_INDICES: np.full((len(feeds[POSITION_IDS]), 1), -1)})

    yield lambda feeds: prompt({**feeds, ATTENTION_MASK: np.ones_like(feeds[POSITION_IDS])}), prompt


def main() -> None:
    for folder in map(Path, json.loads(sys.argv[1])):
        run_folder(folder)
    print(onnxruntime.__version__)


def run_folder(folder: Path) -> None:
    """The same of one folder, with the onnxruntime of this process."""
    config, ids = read_manifest(folder).config, np.load(folder / "ids.npy")
    half, ran = ids.shape[1] // 2, {}
    for way, (step, prefill) in zip(WAYS, runners(folder, partial(cpu_runner, exact=True)), strict=True):
        steps = list(run_steps(step, ids, zero_states(config, len(ids))))
        # In two pieces, so that the second continues a state.
        _, between = run_prefill(prefill, ids[:, :half], zero_states(config, len(ids)))
        ran[f"{way} prompt"], after = run_prefill(prefill, ids[:, half:], between, position=half)
        ran[f"{way} steps"] = np.stack([logits for logits, _ in steps])
        ran[f"{way} states of steps"], ran[f"{way} states"] = np.stack(steps[-1][1]), np.stack(after)
    np.savez(folder / "ran.npz", **ran)


if __name__ == "__main__":
    main()
