"""Ways of running an exported model, each in a process of its own, in turns: shared by decode.py and prefill.py."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from large_checkpoint import machine, print_document, random_weights, write_exports

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.code_types import CODE_TYPES
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.paper import MODEL_SIZES, VOCABULARY_SIZE

Case = TypeVar("Case", bound=Hashable)


def parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """A command line with the options that every such benchmark has."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    result.add_argument("--ops", default="fused", choices=["fused", "standard"])
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--rounds", type=int, default=rounds)
    result.add_argument("--folder", type=Path, help="where the temporary folder is made")
    result.add_argument("--exports", type=Path, help="a folder to keep the exports in, or that has them already")
    result.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    result.add_argument("--time", help=argparse.SUPPRESS)
    return result


def main(
    arguments: argparse.Namespace,
    time_one: Callable[[argparse.Namespace], Any],
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
) -> None:
    """Measure, or, in a process that `in_turns` starts, time one way."""
    if arguments.time:
        print(json.dumps(time_one(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        document = measure(arguments, arguments.exports or Path(folder))
    print_document(document, arguments.output)


def in_turns(
    arguments: argparse.Namespace, folder: Path, cases: Mapping[Case, tuple[str, Sequence[str]]]
) -> dict[Case, list[Any]]:
    """What `time_one` gives for each case, `--rounds` times.

    Args:
        folder: of the exports.
        cases: the way that a case times, and further options of its process.
    """
    results: dict[Case, list[Any]] = {case: [] for case in cases}
    shared = ["--size", arguments.size, "--threads", str(arguments.threads), "--folder", str(folder)]
    for _ in range(arguments.rounds):
        for case, (way, options) in cases.items():
            command = [sys.executable, sys.argv[0], *shared, "--time", way, *options]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[case].append(json.loads(process.stdout))
    return results


def exports(arguments: argparse.Namespace, folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Write the exports that are to be timed; how a document on them begins."""
    sizes = write_exports(folder, arguments.size, arguments.ops, kinds)
    return {
        "size": arguments.size,
        "ops": arguments.ops,
        "threads": arguments.threads,
        "machine": machine(),
        "weight_bytes": sizes,
        "schemes": {kind: scheme for kind in kinds if (scheme := _scheme(folder / kind)) is not None},
    }


def torch_model(size: str, threads: int) -> tuple[RetNetConfig, Any]:
    """The random model of a size in torch, float32, and its configuration."""
    import torch

    from retnet_tools.model.retnet import load_model

    torch.set_num_threads(threads)
    config = MODEL_SIZES[size].config(VOCABULARY_SIZE)
    return config, load_model(config, random_weights(config), torch.float32)


def _scheme(folder: Path) -> dict[str, Any] | None:
    """What decides the speed of a quantized export."""
    record = read_manifest(folder).quantization
    scheme = None if record is None else record.blocks
    if scheme is None:
        return None
    return {
        "bits": CODE_TYPES[scheme.type].bits,
        "block_size": scheme.block_size,
        "symmetric": scheme.symmetric,
        "accuracy_level": scheme.accuracy_level,
    }
