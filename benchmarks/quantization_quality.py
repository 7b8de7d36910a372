"""What quantization costs the shipped model: size, perplexity and KL divergence by scheme, run by ONNX Runtime.

    python benchmarks/quantization_quality.py -o benchmarks/quantization_quality.json

Exports fixtures/shakespeare in float32 to a temporary folder, quantizes it in each way with `retnet-tools quantize`,
and scores the held-out play with `retnet-tools perplexity` against the float32 export. What learns from a text learns
from fixtures/shakespeare/calibration.txt: excerpts of the plays and poems that the model was trained on, none of the
held-out one. About 40 minutes on two busy cores; `--only` takes the cases whose names hold a word.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from large_checkpoint import machine

from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.quantize.budget import matrix_bytes
from retnet_tools.quantize.scheme import matrix_formats
from retnet_tools.weights import canonical_shapes

FIXTURE = Path(__file__).parent.parent / "fixtures" / "shakespeare"
COMMAND = [sys.executable, "-m", "retnet_tools.cli.app"]
TEXT = ["--calibration", str(FIXTURE / "calibration.txt")]
GPTQ = ["--method", "gptq", *TEXT]
FLOAT_PRODUCTS = ["--accuracy-level", "0"]
CASES: dict[str, list[str]] = {
    "fp16": ["fp16"],
    **{f"int8 rtn, {size}": ["int8", "--block-size", f"{size}"] for size in (128, 32)},
    **{f"int4 rtn, {size}": ["int4", "--block-size", f"{size}"] for size in (32, 64, 128)},
    **{f"int4 gptq, {size}": ["int4", "--block-size", f"{size}", *GPTQ] for size in (32, 64, 128)},
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
    formats = dict.fromkeys(shapes) if record is None else matrix_formats(record.scheme, manifest.config)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a case's name holds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "float32"
        command("export", FIXTURE, "-o", base)
        float_bytes = (base / WEIGHTS_FILE).stat().st_size
        results = {}
        for number, (case, options) in enumerate(CASES.items()):
            if arguments.only in case:
                results[case] = measure(base, folder / str(number), options, arguments.threads)
                print(f"{case}: {json.dumps(results[case]['mean_kld'])}", file=sys.stderr, flush=True)
    document = {"machine": machine(), "float32_weights_bytes": float_bytes, "results": results}
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
