"""The first onnxruntime that runs opset 27, in a process of its own: this one may hold an older version.

It is the folder of a `pip install --no-deps --target`: out/onnxruntime-1.32, which `make test` makes, or what
RETNET_TOOLS_ONNXRUNTIME names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from tests.exports import cpu_runner, run_prefill, run_steps, zero_states

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
    """Run the `ids.npy` `[B, T]` of each exported folder through both of its graphs; gives the version that ran them.

    `ran.npz` is then in each: logits of every step `[T, B, vocab]`, of the prompt `[B, vocab]`, and the states after
    both.
    """
    done = run_module("tests.later_runtime", json.dumps([str(folder) for folder in folders]))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def main() -> None:
    for folder in map(Path, json.loads(sys.argv[1])):
        run_folder(folder)
    print(onnxruntime.__version__)


def run_folder(folder: Path) -> None:
    """The same of one folder, with the onnxruntime of this process."""
    from retnet_tools.graph.manifest import read_manifest

    config, ids = read_manifest(folder).config, np.load(folder / "ids.npy")
    half = ids.shape[1] // 2
    prefill = cpu_runner(folder / "prefill.onnx", exact=True)
    steps = list(run_steps(cpu_runner(folder / "step.onnx", exact=True), ids, zero_states(config, len(ids))))
    # In two pieces, so that the second continues a state.
    _, between = run_prefill(prefill, ids[:, :half], zero_states(config, len(ids)))
    prompt, after = run_prefill(prefill, ids[:, half:], between, position=half)
    np.savez(
        folder / "ran.npz",
        steps=np.stack([logits for logits, _ in steps]),
        prompt=prompt,
        step_states=np.stack(steps[-1][1]),
        prompt_states=np.stack(after),
    )


if __name__ == "__main__":
    main()
