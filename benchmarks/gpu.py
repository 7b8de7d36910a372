"""Everything that needs a GPU, as one command: checks, tests, and the measurements that the README speaks of.

    make bench-gpu            or: python benchmarks/gpu.py
    python benchmarks/gpu.py --only doctor,tests        some steps
    python benchmarks/gpu.py --quick                    small models: whether everything runs
    python benchmarks/gpu.py --table                    the README's table from what was measured

Each step's result is written to `benchmarks/gpu/STEP.json` as soon as it ends, with its command, time and exit code and
the machine; a step that has one is left out unless `--again`. A step that fails does not stop the others; the exit code
says whether any did. smoke.py and probe.py come with the onnxruntime-gpu of the GPU host (`--ort`), and are left out
where they are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retnet_tools.machine import this_machine
from retnet_tools.runtime.diagnosis import diagnose

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "gpu"
ORT = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT) / "ort-gpu"
CLI = (sys.executable, "-m", "retnet_tools.cli.app")
OUTPUT_LIMIT = 4000


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: `{out}` in them is a file for its JSON, which otherwise is what it prints.
        quick: what is put in their place with `--quick`; None leaves the step as it is.
        minutes: after which it is stopped.
    """

    name: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | None = None
    minutes: int = 10
    needs: Path | None = field(default=None)


def bench(name: str, size: str, *options: str, minutes: int = 15) -> Step:
    """`retnet-tools bench` of random weights."""
    command = (*CLI, "bench", "--device", "cuda", "--json")
    return Step(name, (*command, "--size", size, *options), (*command, "--quick", *_kept(options)), minutes)


def _kept(options: tuple[str, ...]) -> tuple[str, ...]:
    """Types and alternatives, without lengths and batches."""
    kept = ("--dtype", "--quantize", "--against")
    return tuple(word for i, option in enumerate(options) if option in kept for word in options[i : i + 2])


def steps(ort: Path) -> list[Step]:
    """All steps, in order: first whether it works, then how fast."""
    half = ("--dtype", "fp16")
    one = (*half, "-b", "1", "-p", "0", "-n", "128")
    return [
        Step("doctor", (*CLI, "doctor", "--device", "cuda", "--json")),
        Step("smoke", (sys.executable, str(ort / "smoke.py")), needs=ort / "smoke.py"),
        Step("tests", (sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"), minutes=30),
        Step(
            "retention",
            (sys.executable, "benchmarks/retention.py", "-o", "{out}"),
            (sys.executable, "benchmarks/retention.py", "--heads", "2x128x64", "--steps", "5", "-o", "{out}"),
        ),
        Step(
            "probe",
            (sys.executable, str(ort / "probe.py"), "--out", "{out}"),
            (sys.executable, str(ort / "probe.py"), "--quick", "--out", "{out}"),
            needs=ort / "probe.py",
        ),
        bench("decode-1.3b-fp16", "1.3b", *half, "-b", "1,8,32,128", "-p", "0", "-n", "128"),
        bench("decode-1.3b-fp32", "1.3b", "-b", "1", "-p", "0", "-n", "128"),
        bench("decode-1.3b-int8", "1.3b", *one, "--quantize", "int8"),
        bench("decode-1.3b-int4", "1.3b", *one, "--quantize", "int4"),
        bench("prefill-1.3b-fp16", "1.3b", *half, "-b", "1", "-p", "512,2048,8192", "-n", "0"),
        bench("decode-6.7b-fp16", "6.7b", *half, "-b", "1,8,32", "-p", "0", "-n", "128", minutes=40),
        bench("decode-6.7b-int8", "6.7b", *one, "--quantize", "int8", minutes=40),
        bench("decode-6.7b-int4", "6.7b", *one, "--quantize", "int4", minutes=40),
        bench("transformer-6.7b-8k", "6.7b", *half, "--against", "transformer", "-d", "8192", "-b", "1,32", minutes=60),
    ]


def run(step: Step, results: Path, *, quick: bool) -> dict[str, Any]:
    """Run a step and say what came of it."""
    out = results / f".{step.name}.json"
    words = step.quick if quick and step.quick is not None else step.arguments
    command = [word.replace("{out}", str(out)) for word in words]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * step.minutes)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, stdout, stderr = None, _text(error.stdout), _text(error.stderr)
    result: dict[str, Any] = {
        "step": step.name,
        "command": [word if word != sys.executable else "python" for word in words],
        "quick": quick,
        "exit_code": code,
        "seconds": round(time.perf_counter() - began, 1),
        "result": _json(out.read_text()) if out.is_file() else _json(stdout),
    }
    if result["result"] is None:
        result["stdout"] = stdout[-OUTPUT_LIMIT:]
    if code != 0:
        result["stderr"] = stderr[-OUTPUT_LIMIT:]
    out.unlink(missing_ok=True)
    return result


def machine() -> dict[str, Any]:
    """The machine and its devices."""
    found = diagnose()
    return {
        **asdict(this_machine()),
        "packages": found.packages,
        "driver_cuda": found.driver_cuda,
        "devices": [asdict(row.device) for row in found.devices],
    }


def table(results: Path) -> str:
    """What was measured in full, as Markdown."""
    lines = [
        "| model | test | batch | tokens/s | ms a token | of the memory floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file in sorted(results.glob("*.json")):
        document = json.loads(file.read_text())
        rows = document["result"].get("rows", ()) if isinstance(document["result"], dict) else ()
        if document["quick"] or document["exit_code"] != 0:
            continue
        for row in rows:
            if "tokens_per_second" not in row:
                continue
            size = document["command"][document["command"].index("--size") + 1]
            weights = row["quantization"] or row["dtype"]
            name = f"{size}, {weights}" + ("" if row["implementation"] == "retnet" else f", {row['implementation']}")
            share = "" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
            test = row["test"] + (f" @ {row['depth']}" if row["depth"] else "")
            time_ = "" if row["ms_per_token_p50"] is None else f"{row['ms_per_token_p50']:.2f}"
            lines.append(f"| {name} | {test} | {row['batch']} | {row['tokens_per_second']:.0f} | {time_} | {share} |")
    return "\n".join(lines)


def _json(text: str) -> Any:
    """A document; None where a text is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("--ort", type=Path, default=ORT, help="folder of smoke.py and probe.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="run steps that have a result, too")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.results))
        return
    known = {step.name: step for step in steps(arguments.ort)}
    names = list(known) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(known)}")
    description, failed = machine(), []
    if not description["devices"]:
        sys.exit("error: no GPU; run `retnet-tools doctor --device cuda` for the reason")
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for step in (known[name] for name in names):
        file = results / f"{step.name}.json"
        if step.needs is not None and not step.needs.is_file():
            print(f"{step.name}: left out, no {step.needs}", flush=True)
            continue
        if file.is_file() and not arguments.again:
            print(f"{step.name}: there already", flush=True)
            continue
        print(f"{step.name}: ...", end=" ", flush=True)
        result = run(step, results, quick=arguments.quick)
        file.write_text(json.dumps({"machine": description, **result}, indent=1) + "\n")
        print(f"exit code {result['exit_code']}, {result['seconds']} s", flush=True)
        if result["exit_code"] != 0:
            failed.append(step.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
