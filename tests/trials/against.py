"""verify --against at its default budget: random healthy models and all conformance cases pass, planted faults do not.

    python -m tests.trials.against --count 200 --seed 0 --faults --conformance

Prints what was wrongly judged, then one line; exit code 1 where there was anything.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.jobs.api import export, verify
from retnet_tools.paper import paper_rotary_frequencies
from tests.helpers import ABLATIONS, random_source
from tests.planted_exports import EDITS, GENAI, PREFILL, STEP, byte_places, changed_byte, other_tokenizer, plant

CONFORMANCE = Path(__file__).parent.parent / "data" / "conformance"
WEIGHTS = (".pt", ".bin", ".ckpt", ".safetensors")
TOKENS = 160
NEAREST: dict[str, float] = {}
"""By check, how much of its limit healthy exports took at most."""


def random_config(rng: np.random.Generator) -> RetNetConfig:
    """A model of one of the kinds that tests know, or one of random sizes and parts."""
    if rng.random() < 0.4:
        return ABLATIONS[list(ABLATIONS)[int(rng.integers(len(ABLATIONS)))]]
    heads, key, value = int(rng.choice([1, 2, 3, 4, 8])), 2 * int(rng.integers(1, 17)), int(rng.integers(2, 33))
    eps = float(10.0 ** rng.uniform(-6, -3))
    block = BlockNorm(_one(rng, "rms", "layer"), eps, bias=bool(rng.integers(2)))
    head = HeadNorm(_one(rng, "rms", "layer"), eps, _one(rng, "none", "shared", "channel"))
    order = _one(rng, "pre", "pre", "post", "branch")
    parallel = bool(rng.integers(4) == 0) and order == "pre"
    return RetNetConfig(
        vocab_size=int(rng.integers(11, 200)),
        hidden_size=8 * int(rng.integers(2, 17)),
        num_layers=int(rng.integers(1, 7)),
        num_heads=heads,
        key_dim=heads * key,
        value_dim=heads * value,
        decay=tuple(float(g) for g in np.log1p(-(2.0 ** -np.linspace(*sorted(rng.uniform(2, 13, 2)), heads)))),
        rotary_frequencies=paper_rotary_frequencies(key) if key > 2 else (1.0,),
        score_normalization=ScoreNormalization(key**-0.5, bool(rng.integers(2)), "none"),
        head_norm=head,
        block_norm=block,
        feed_forward=FeedForward(
            _one(rng, "glu", "plain"), 8 * int(rng.integers(1, 17)), _one(rng, "gelu", "silu", "relu")
        ),
        num_kv_groups=heads if rng.integers(5) == 0 else 1,
        gate=_one(rng, "silu", "silu", "gelu", None),
        norm_order=order,
        parallel_residual=parallel,
        shared_block_norm=parallel and bool(rng.integers(2)),
        residual_alpha=_one(rng, 1.0, 1.0, 1.5),
        embedding_scale=_one(rng, 1.0, 5.0),
        tie_word_embeddings=bool(rng.integers(3) == 0),
        projection_bias=bool(rng.integers(3) == 0),
    )


def random_options(rng: np.random.Generator, config: RetNetConfig) -> dict[str, Any]:
    """How to export it."""
    options: dict[str, Any] = {"dtype": _one(rng, "fp32", "fp32", "fp16"), "ops": _one(rng, "fused", "standard")}
    options["to"] = _one(rng, "onnx", "onnx", "genai") if config.has_vocabulary else "onnx"
    options["state_dtype"] = _one(rng, "fp32", "fp32", "fp32", "fp16")
    kind = _one(rng, None, "int8", "int4")
    if kind is not None:
        options |= {"quantize": kind, "block_size": _one(rng, 32, 64, 128), "symmetric": _one(rng, True, False)}
        if options["ops"] == "fused":
            options["accuracy_level"] = _one(rng, 4, 4, 0)
        if rng.integers(4) == 0:
            options["tensor_types"] = ("down_proj=int8",)
    return options


def _one(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def write_model(folder: Path, config: RetNetConfig, seed: int) -> Path:
    """A checkpoint with random weights and a tokenizer."""
    beside = folder / "tokenizer.json"
    folder.mkdir(parents=True)
    words = {f"t{number}": number for number in range(max(2, config.vocab_size))}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(beside))
    files = [beside] if config.has_vocabulary else []
    write_canonical(folder / "checkpoint", config, random_source(config, seed), extra_files=files)
    return folder / "checkpoint"


def verdict(out: Path, checkpoint: Path, *, healthy: bool) -> str | None:
    """None for an export that passes, else what is said of it."""
    try:
        result = verify(out, against=checkpoint, tokens=TOKENS, threads=1)
        for check in result.checks:
            NEAREST[check.name] = (
                max(NEAREST.get(check.name, 0.0), check.excess) if healthy else NEAREST.get(check.name, 0.0)
            )
        result.require()
    except RetNetToolsError as error:
        return f"exit {error.exit_code}: {error}"
    return None


class Tally:
    """What was judged, and what of it wrongly."""

    def __init__(self) -> None:
        self.healthy = self.faults = self.cases = 0
        self.alarms: list[str] = []
        self.missed: list[str] = []

    def healthy_export(self, name: str, out: Path, checkpoint: Path) -> None:
        self.healthy += 1
        if (said := verdict(out, checkpoint, healthy=True)) is not None:
            self.alarms.append(f"{name}: {said}")
            print(f"false alarm: {self.alarms[-1]}", flush=True)

    def planted(self, name: str, out: Path, checkpoint: Path) -> None:
        self.faults += 1
        if verdict(out, checkpoint, healthy=False) is None:
            self.missed.append(name)
            print(f"missed: {name}", flush=True)


def try_model(tally: Tally, work: Path, seed: int, *, faults: bool) -> None:
    """A random model healthy, and with each fault that it can have."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    options = random_options(rng, config)
    name = f"seed {seed}, {options}"
    folder = work / str(seed)
    checkpoint, out = write_model(folder, config, seed), folder / "out"
    try:
        export(checkpoint, out, **options)
    except RetNetToolsError as error:
        print(f"not exported: {name}: {error}", flush=True)
    else:
        tally.healthy_export(name, out, checkpoint)
        if faults:
            plant_all(tally, name, out, checkpoint, config, rng)
    shutil.rmtree(folder)


def plant_all(
    tally: Tally, name: str, out: Path, checkpoint: Path, config: RetNetConfig, rng: np.random.Generator
) -> None:
    """Every fault, one at a time; those of graphs in one of the two alone too."""
    bad = out.with_name("bad")

    def fresh() -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(out, bad)

    for fault, edit in EDITS.items():
        for graphs in ((STEP, PREFILL, GENAI), (STEP,), (PREFILL,)):
            fresh()
            if plant(bad, edit, config, graphs):
                tally.planted(f"{name}: {fault} in {', '.join(graphs)}", bad, checkpoint)
    for kind, (place, flip) in byte_places(out, rng).items():
        fresh()
        changed_byte(bad, place, flip)
        tally.planted(f"{name}: {kind}, byte {place} ^ {flip}", bad, checkpoint)
    fresh()
    if other_tokenizer(bad):
        tally.planted(f"{name}: another tokenizer", bad, checkpoint)


def checkpoints(folder: Path) -> Iterator[Path]:
    """Every checkpoint in a folder, in folders of it and in files."""
    try:
        open_checkpoint(folder)
    except RetNetToolsError:
        below = sorted(folder.iterdir()) if folder.is_dir() else []
        yield from (found for path in below if path.is_dir() or path.suffix in WEIGHTS for found in checkpoints(path))
    else:
        yield folder


def try_conformance(tally: Tally, work: Path) -> None:
    """Checkpoints of the public implementations, exported as they are and in int8."""
    for case in checkpoints(CONFORMANCE):
        tally.cases += 1
        for quantize in (None, "int8"):
            for target in ("onnx", "genai"):
                out, name = work / "out", f"{case.relative_to(CONFORMANCE)} {quantize} {target}"
                try:
                    export(case, out, to=target, quantize=quantize)
                except UsageError as error:
                    # A stack cannot be exported for onnxruntime-genai.
                    print(f"not exported: {name}: {error}", flush=True)
                    continue
                tally.healthy_export(name, out, case)
                shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="random models")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next ones follow")
    parser.add_argument("--faults", action="store_true", help="plant every fault in each")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further model after this long")
    parser.add_argument("--conformance", action="store_true", help="also the checkpoints of tests/data/conformance")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tally, began = Tally(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="against-") as scratch:
        for seed in range(given.seed, given.seed + given.count):
            if time.perf_counter() - began > 60 * given.minutes:
                break
            print(f"seed {seed}, {time.perf_counter() - began:.0f} s", end="\r", file=sys.stderr, flush=True)
            try_model(tally, Path(scratch), seed, faults=given.faults)
        if given.conformance:
            try_conformance(tally, Path(scratch))
    for name, part in sorted(NEAREST.items(), key=lambda item: -item[1])[:12]:
        print(f"{part:8.3f} of the limit: {name}")
    print(
        f"against: {tally.healthy} healthy exports ({tally.cases} conformance cases), {len(tally.alarms)} false "
        f"alarms; {tally.faults} faults, {len(tally.missed)} missed; {time.perf_counter() - began:.0f} s"
    )
    return int(bool(tally.alarms or tally.missed))


if __name__ == "__main__":
    sys.exit(main())
