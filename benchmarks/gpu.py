"""Everything that needs a GPU, in steps ordered by what they are worth: first whether it works, then how fast.

    make bench-gpu                                    all of it
    python benchmarks/gpu.py --list                   the steps, and about how long each takes
    python benchmarks/gpu.py --minutes 9              what fits into 9 minutes; once more for what is left
    python benchmarks/gpu.py --only doctor,float16    some steps
    python benchmarks/gpu.py --from prefill-256       a step and those behind it
    python benchmarks/gpu.py --quick                  small models: whether everything runs
    python benchmarks/gpu.py --unpack gpu.json        records for docs/benchmarks.md out of results from another machine

A step is a process of its own. What came of it is written to STATE/steps/ as soon as it ends, and all of that so far to
one file, RESULTS/gpu.json; what succeeded is not run again by a later call. Models are written once to STATE/models/,
by the first step that needs them. A step that fails or runs out of time stops none behind it; the exit code says
whether any did. Results of `retnet-tools bench` are also written to benchmarks/bench/, whose records
`benchmarks/docs_tables.py` reads.

Where commands end after some minutes, `--minutes` less than those, again and again while the machine stays. Scripts
that a host is given beside these lie in .ort, or where `--scripts` says. This file needs no package itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_steps import MODELS, MODULES, PYTHON, ROOT, SCRIPTS, Step, steps

RESULTS = ROOT / "benchmarks" / "gpu"
RECORDS = ROOT / "benchmarks" / "bench"
STATE = Path("/tmp/retnet-gpu")
PACK = "gpu.json"
OUTPUT_LIMIT = 6000
LONGEST_MINUTES = 60
_MACHINE = """
import json
from dataclasses import asdict
from retnet_tools.machine import this_machine
from retnet_tools.runtime.diagnosis import diagnose
found = diagnose()
used = {"packages": found.packages, "onnxruntime": found.onnxruntime, "driver_cuda": found.driver_cuda}
print(json.dumps({**asdict(this_machine()), **used, "devices": [asdict(row.device) for row in found.devices]}))
"""


class Runner:
    """Runs steps and keeps what came of them.

    Args:
        state: where results and models stay between calls.
        results: where they are packed to.
        deadline: `time.monotonic` after which nothing may run; None for none.
    """

    def __init__(
        self, state: Path, results: Path, machine: dict[str, Any], deadline: float | None, quick: bool
    ) -> None:
        self._state, self._results, self._machine = state, results, machine
        self._deadline, self._quick = deadline, quick
        for folder in (state / "steps", state / "models", results):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Minutes until the deadline."""
        return LONGEST_MINUTES if self._deadline is None else (self._deadline - time.monotonic()) / 60

    def settled(self, step: Step) -> dict[str, Any] | None:
        """What came of a step before; None where it has not run, or ran out of time and has more of it now.

        A model that could not be written fails whatever needs it.
        """
        missing = step.model is not None and not self._model(step.model).is_dir()
        file = self._file(f"model-{step.model}") if missing else self._file(step.name)
        if not file.is_file():
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        more = result["timed_out"] and 60 * self.left > 1.5 * result["seconds"]
        return None if more else result

    def needed(self, step: Step) -> Iterator[Step]:
        """The step, after the one that writes its model where nobody has."""
        if step.model is not None and not self._model(step.model).is_dir():
            command = (*PYTHON, "benchmarks/gpu.py", "--write", step.model, "--state", str(self._state))
            yield Step(f"model-{step.model}", command, MODELS[step.model].minutes, (*command, "--quick"))
        yield step

    def run(self, step: Step) -> bool:
        """Run a step and keep its result; whether it succeeded."""
        print(f"{step.name}: ...", end=" ", flush=True)
        out, scratch = self._state / f"{step.name}.out.json", self._state / "scratch"
        # A step that was killed leaves what it wrote.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        places = {"{out}": str(out), "{scratch}": str(scratch)}
        if step.model is not None:
            places["{model}"] = str(self._model(step.model))
        words = step.quick if self._quick and step.quick is not None else step.command
        limit, began = self.left, time.monotonic()
        code, stdout, stderr = _finished([places.get(word, word) for word in words], 60 * limit)
        result: dict[str, Any] = {
            "step": step.name,
            "command": [word if word != sys.executable else "python" for word in words],
            "quick": self._quick,
            "exit_code": code,
            "timed_out": code is None,
            "recorded": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.monotonic() - began, 1),
            "result": _json(out.read_text()) if out.is_file() else _json(stdout),
            "record": step.record,
        }
        if result["result"] is None:
            result["stdout"] = stdout[-OUTPUT_LIMIT:]
        if code != 0:
            result["stderr"] = stderr[-OUTPUT_LIMIT:]
        out.unlink(missing_ok=True)
        _write(self._file(step.name), result)
        self.pack()
        print(f"exit code {code}, {result['seconds']} s", flush=True)
        return code == 0

    def pack(self) -> None:
        """All results so far as one file."""
        found = [json.loads(file.read_text()) for file in sorted((self._state / "steps").glob("*.json"))]
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        _write(self._results / PACK, {"machine": self._machine, "commit": commit or None, "steps": found})

    def _file(self, name: str) -> Path:
        return self._state / "steps" / f"{name}.json"

    def _model(self, name: str) -> Path:
        return self._state / "models" / name / "retnet"


def write_model(name: str, state: Path, *, quick: bool) -> None:
    """Export a model of `MODELS` to a folder that stays; with `quick` the shipped checkpoint in its types."""
    from retnet_tools.bench.models import ModelOptions, make_model
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.jobs.request import shipped_checkpoint
    from retnet_tools.quantize.options import options_of

    model, scratch = MODELS[name], state / "models" / name
    scratch.mkdir(parents=True, exist_ok=True)
    path, size = (CheckpointSource(shipped_checkpoint()), None) if quick else (None, model.size)
    dtype = parse_dtype(model.dtype, ("float32", "float16"))
    quantize = options_of(model.quantize, block_size=None if quick else model.block_size)
    options = ModelOptions(path, size, dtype, quantize, None, "cuda")
    print(make_model(options, scratch, lambda what, done, total: None).folder)


def unpack(pack: Path, records: Path) -> list[Path]:
    """Write the benchmarks among results as records that `docs_tables.py` reads; what was quick or failed is left."""
    document, written = json.loads(pack.read_text()), []
    records.mkdir(parents=True, exist_ok=True)
    for result in document["steps"]:
        if result["record"] is None or result["quick"] or result["exit_code"] != 0 or result["result"] is None:
            continue
        origin = {
            "command": result["record"],
            "recorded": result["recorded"],
            "commit": document["commit"],
            "seconds": round(result["seconds"]),
        }
        written.append(records / f"cuda-{result['step']}.json")
        _write(written[-1], {**origin, **result["result"]})
    return written


def missing_modules() -> list[str]:
    """What this Python cannot import."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def machine() -> dict[str, Any]:
    """The machine and its devices, seen by a process of its own, so that this one holds no memory of a GPU."""
    code, stdout, stderr = _finished([*PYTHON, "-c", _MACHINE], 120)
    found = _json(stdout)
    if code != 0 or not isinstance(found, dict):
        sys.exit(f"error: retnet-tools cannot be imported ({' '.join(stderr.split())[-300:]})")
    return found


def _finished(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None where it ran out of time, and was ended with all that it started), stdout and stderr."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        return None, stdout, stderr
    return process.returncode, stdout, stderr


def _json(text: str) -> Any:
    """A document; None where a text is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _write(file: Path, document: Any) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def chosen(known: list[Step], arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Step]:
    """The steps of `--only` and `--from`, in order."""
    names = [step.name for step in known]
    wanted = names if arguments.only is None else arguments.only.split(",")
    first = names[0] if arguments.first is None else arguments.first
    if unknown := [name for name in (*wanted, first) if name not in names]:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(names)}")
    return [step for step in known[names.index(first) :] if step.name in wanted]


def run_all(wanted: list[Step], runner: Runner, *, again: bool, timed: bool) -> tuple[list[str], list[str]]:
    """Try every step; names of those that failed, and of those for which there was no time."""
    failed, postponed = [], []
    for step in wanted:
        if not again and (before := runner.settled(step)) is not None:
            print(f"{step.name}: there already, exit code {before['exit_code']}", flush=True)
            failed += [step.name] if before["exit_code"] != 0 else []
            continue
        parts = list(runner.needed(step))
        minutes = sum(part.minutes for part in parts)
        if timed and minutes > runner.left:
            print(f"{step.name}: takes {minutes:.1f} minutes, and {runner.left:.1f} are left", flush=True)
            postponed.append(step.name)
            continue
        if not all(runner.run(part) for part in parts):
            failed.append(step.name)
    return failed, postponed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("--from", dest="first", help="the step to begin with")
    parser.add_argument("--minutes", type=float, help="after which nothing runs; steps that do not fit are left")
    parser.add_argument(
        "--scripts", type=Path, default=SCRIPTS, help="folder with smoke.py or probe.py, which are steps too"
    )
    parser.add_argument("--state", type=Path, default=STATE, help="where results and models stay between calls")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file with all results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="run steps that have a result, too")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="make records of the results in a file")
    parser.add_argument("--write", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = chosen(steps(arguments.scripts), arguments, parser)
    if arguments.list:
        for step in wanted:
            print(f"{step.name:<17} {step.minutes:>4.1f} min  {step.record or shlex.join(step.command)[:90]}")
        return
    if arguments.unpack is not None:
        print(*unpack(arguments.unpack, RECORDS), sep="\n")
        return
    if missing := missing_modules():
        sys.exit(f"error: {sys.executable} has no {', '.join(missing)}; install them, or carry them as wheels")
    if arguments.write is not None:
        write_model(arguments.write, arguments.state, quick=arguments.quick)
        return
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    description = machine()
    if not description["devices"]:
        sys.exit("error: no GPU; run `retnet-tools doctor --device cuda` for the reason")
    state, results = (path.resolve() for path in (arguments.state, arguments.results))
    if arguments.quick:
        state = state / "quick"
    runner = Runner(state, results, description, deadline, arguments.quick)
    failed, postponed = run_all(wanted, runner, again=arguments.again, timed=deadline is not None)
    if (results / PACK).is_file():
        unpack(results / PACK, RECORDS)
    if postponed:
        print(f"for another call: {', '.join(postponed)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
