"""What quantization costs the shipped model: size, perplexity and KL divergence by scheme, run by ONNX Runtime.

    python benchmarks/quantization_quality.py -o benchmarks/quantization_quality.json
    python benchmarks/quantization_quality.py --check

Exports fixtures/shakespeare in float32 to a temporary folder, quantizes it in each way with `retnet-tools quantize`,
and scores the held-out play with `retnet-tools perplexity` against the float32 export. What learns from a text learns
from fixtures/shakespeare/calibration.txt: excerpts of the plays and poems that the model was trained on, none of the
held-out one. About 40 minutes on two busy cores. The file is written after each case; `--only` takes the cases whose
names hold a word, and leaves the other results in the file. `--check` judges the file by what the shipped model is held
to: float16 within 0.01% of float32's perplexity, int8 within 0.1% and with a mean KL divergence below 1e-3, int4 by
GPTQ within 3% and clearly below round to nearest at the same block size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from large_checkpoint import machine

from retnet_tools.graph.code_types import matrix_bytes
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.quantize.options import matrix_formats
from retnet_tools.weights import canonical_shapes

DOCUMENT = Path(__file__).with_suffix(".json")
FIXTURE = Path(__file__).parent.parent / "fixtures" / "shakespeare"
COMMAND = [sys.executable, "-m", "retnet_tools.cli.app"]
TEXT = ["--calibration", str(FIXTURE / "calibration.txt")]
GPTQ = ["--method", "gptq", *TEXT]
FLOAT_PRODUCTS = ["--accuracy-level", "0"]
SIZES = (32, 64, 128)
CASES: dict[str, list[str]] = {
    "fp16": ["fp16"],
    **{f"int8 rtn, {size}": ["int8", "--block-size", f"{size}"] for size in (128, 32)},
    **{f"int4 rtn, {size}": ["int4", "--block-size", f"{size}"] for size in SIZES},
    **{f"int4 gptq, {size}": ["int4", "--block-size", f"{size}", *GPTQ] for size in SIZES},
    "int4 gptq, 64, other draw": ["int4", *GPTQ, "--seed", "1"],
    "int4 gptq, 64, 8192 tokens": ["int4", *GPTQ, "--calibration-tokens", "8192"],
    "int4 rtn, 64, asymmetric": ["int4", "--asymmetric"],
    "int4 gptq, 64, asymmetric": ["int4", "--asymmetric", *GPTQ],
    "int4 rtn, 64, float products": ["int4", *FLOAT_PRODUCTS],
    "int4 gptq, 64, float products": ["int4", *FLOAT_PRODUCTS, *GPTQ],
    "int8 rtn, 128, float products": ["int8", *FLOAT_PRODUCTS],
    "int8 gptq, 128": ["int8", *GPTQ],
    "mixed rtn, 5 bits": ["int4", "--target-bits", "5", *TEXT],
    "mixed gptq, 5 bits": ["int4", "--target-bits", "5", *GPTQ],
    "mixed gptq, 5 bits, merged": ["int4", "--target-bits", "5", "--keep-merged", *GPTQ],
    "mixed gptq, 6 bits": ["int4", "--target-bits", "6", *GPTQ],
}

THRESHOLDS = {
    "fp16": (1e-4, math.inf),
    **{f"int8 rtn, {size}": (1e-3, 1e-3) for size in (128, 32)},
    **{f"int4 gptq, {size}": (0.03, math.inf) for size in SIZES},
}
"""The most that perplexity may change, and what the mean KL divergence has to be below."""


def command(*arguments: object) -> dict[str, Any]:
    """Run a command and give back its JSON document."""
    line = [*COMMAND, *map(str, arguments), "--json"]
    document: dict[str, Any] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return document


def bits_per_weight(folder: Path) -> float:
    """Over all matrices, scales and zero points included."""
    manifest = read_manifest(folder)
    float_size = ELEMENT_TYPES[manifest.dtype].numpy().itemsize
    shapes = {name: shape for name, shape in canonical_shapes(manifest.config).items() if len(shape) == 2}
    record = manifest.quantization
    blocks = None if record is None else record.blocks
    formats = dict.fromkeys(shapes) if blocks is None else matrix_formats(blocks, manifest.config)
    size = sum(matrix_bytes(shapes[name], format, float_size) for name, format in formats.items())
    return 8 * size / sum(int(np.prod(shape)) for shape in shapes.values())


def measure(base: Path, out: Path, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Quantize in one way and score."""
    began = time.perf_counter()
    written = command("quantize", base, "-o", out, "--quantize", *arguments)
    seconds = time.perf_counter() - began
    text = FIXTURE / "heldout.txt"
    report = command("perplexity", out, "--against", base, "--file", text, "--threads", threads)
    record = written["quantization"]
    return {
        "command": f"quantize --quantize {' '.join(arguments)}".replace(str(FIXTURE.parent.parent) + "/", ""),
        "scheme": None if record is None else record["summary"],
        "notes": written["notes"],
        "weights_bytes": (out / WEIGHTS_FILE).stat().st_size,
        "bits_per_weight": round(bits_per_weight(out), 3),
        "quantize_seconds": round(seconds, 1),
        "perplexity": report["model"]["mean_ppl"],
        "float_perplexity": report["baseline"]["mean_ppl"],
        **{name: report["divergence"][name] for name in ("mean_ppl_ratio", "mean_kld", "same_top_p")},
    }


def read_document(output: Path | None) -> dict[str, Any]:
    """What an earlier run on this machine measured, or a document without results."""
    document: dict[str, Any] = {"machine": machine(), "float32_weights_bytes": None, "results": {}}
    if output is None or not output.is_file():
        return document
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    if found["machine"] != document["machine"]:
        sys.exit(f"{output} was measured on {found['machine']}, this is {document['machine']}: name another -o")
    return found


def write_document(document: dict[str, Any], output: Path) -> None:
    """Write a document, whole or not at all."""
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)


def measure_all(cases: Sequence[str], threads: int, output: Path | None) -> dict[str, Any]:
    """Measure some cases; others keep the results that they have, and the file is written after each."""
    document = read_document(output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "float32"
        command("export", FIXTURE, "-o", base)
        document["float32_weights_bytes"] = (base / WEIGHTS_FILE).stat().st_size
        for number, case in enumerate(cases):
            document["results"][case] = measure(base, folder / str(number), CASES[case], threads)
            print(f"{case}: {json.dumps(document['results'][case]['mean_kld'])}", file=sys.stderr, flush=True)
            found = document["results"]
            document["results"] = {name: found[name] for name in CASES if name in found}
            if output:
                write_document(document, output)
    return document


def missed(results: Mapping[str, Any]) -> list[str]:
    """Which of the thresholds that the shipped model is held to are not met, or not measured."""
    lines = [f"{case}: not measured" for case in THRESHOLDS if case not in results]
    for case, (most, largest_kl) in THRESHOLDS.items():
        if case in results:
            change = results[case]["perplexity"]["value"] / results[case]["float_perplexity"]["value"] - 1
            if not abs(change) <= most:
                lines.append(f"{case}: perplexity {change:+.4%} of float32's, allowed {most:.4%}")
            if not (kl := results[case]["mean_kld"]["value"]) < largest_kl:
                lines.append(f"{case}: mean KL divergence {kl:.2e}, allowed less than {largest_kl:.0e}")
    for size in SIZES:
        pair = [results.get(f"int4 {method}, {size}", {}).get("mean_kld") for method in ("gptq", "rtn")]
        if all(pair) and not _clearly_below(*pair):
            kls = [f"{found['value']:.2e}" for found in pair]
            lines.append(f"int4 gptq, {size}: mean KL divergence {kls[0]}, to nearest {kls[1]}: not clearly below")
        elif not all(pair) and f"int4 gptq, {size}" in results:
            lines.append(f"int4 rtn, {size}: not measured")
    return lines


def _clearly_below(found: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """By a tenth at least, and by more than two standard errors of both can explain."""
    apart = other["value"] - found["value"]
    return apart > max(0.1 * other["value"], 2 * (found["error"] + other["error"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a case's name holds; other results in -o stay")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="measure nothing: exit 1 where -o misses a threshold")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here, after each case")
    arguments = parser.parse_args()
    if arguments.check:
        document = json.loads((arguments.output or DOCUMENT).read_text(encoding="utf-8"))
        sys.exit("\n".join(missed(document["results"])) or 0)
    cases = [case for case in CASES if arguments.only in case]
    if not cases:
        parser.error(f"no case holds {arguments.only!r}; there are {'; '.join(CASES)}")
    document = measure_all(cases, arguments.threads, arguments.output)
    print(json.dumps(document, indent=1))
    for line in missed(document["results"]):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
