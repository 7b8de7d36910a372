"""The steps of `benchmarks/gpu.py`: what is worth a GPU's time, the most valuable first."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable,)
CLI = (*PYTHON, "-m", "retnet_tools.cli.app")
PYTEST = (*PYTHON, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider")
MODULES = (
    *("numpy", "ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "rich", "safetensors", "tokenizers", "torch", "typer"),
    *("pytest", "hypothesis"),
)
"""What retnet-tools and its tests import."""
TESTS = tuple(
    f"tests/test_cuda.py::test_{name}"
    for name in (
        "the_self_test_passes",
        "steps_and_prompts_are_those_of_torch[base-fused-float32]",
        "steps_and_prompts_are_those_of_torch[base-fused-float16]",
        "steps_and_prompts_are_those_of_torch[base-fused-bfloat16]",
        "steps_and_prompts_are_those_of_torch[base-standard-float32]",
        "head_sizes[(256, 512)-fused-float32]",
        "head_sizes[(256, 432)-fused-float32]",
        "head_sizes[(256, 512)-fused-float16]",
        "head_sizes[(64, 128)-fused-float32]",
        "a_gamma_of_each_key_dimension[(256, 512)]",
        "replayed_steps_are_bit_equal_to_eager_ones_over_1000_steps[(256, 512)-float16-float32]",
        "replayed_steps_are_bit_equal_to_eager_ones_over_1000_steps[(256, 432)-float32-float32]",
        "states_take_turns_in_captured_graphs",
        "batch_sizes_mixed_in_one_captured_session_are_what_they_are_eagerly[float32]",
        "weights_that_both_graphs_share_are_those_that_each_loads[float16]",
        "a_row_of_a_ragged_batch_is_what_it_is_alone[float16]",
        "states_go_from_device_to_file_to_device[float32]",
        "rows_are_chosen_on_the_device",
        "quantized_weights_are_what_they_decode_to[base-fused-int8-False]",
        "quantized_weights_are_what_they_decode_to[base-fused-int4-False]",
        "quantized_weights_with_half_activations[float16-int4]",
        "the_trained_model_writes_what_it_writes_on_the_cpu",
        "no_node_of_a_step_is_on_the_cpu[float16-fused]",
    )
)
"""The first to know of, of all that are marked `cuda`."""


@dataclass(frozen=True)
class Model:
    """Random weights of a published size, written as an export for CUDA.

    Attributes:
        options: that `retnet-tools bench --size` would take for the same.
        minutes: that writing takes, about.
    """

    size: str
    dtype: str
    quantize: str | None = None
    block_size: int | None = None
    minutes: float = 1.0

    @property
    def options(self) -> str:
        words = ["--size", self.size, "--dtype", self.dtype]
        for name, value in (("--quantize", self.quantize), ("--block-size", self.block_size)):
            words += [] if value is None else [name, str(value)]
        return shlex.join(words)


SCRIPTS = ROOT / ".ort"
"""What a host without a network is carried, where nothing else is said."""

MODELS = {
    "6.7b-fp16": Model("6.7b", "fp16", minutes=3.0),
    "1.3b-fp16": Model("1.3b", "fp16"),
    "1.3b-fp32": Model("1.3b", "fp32"),
    "1.3b-int8": Model("1.3b", "fp16", "int8"),
    "1.3b-int4": Model("1.3b", "fp16", "int4", 128),
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: in it `{out}` is a file for its JSON, which otherwise is what it prints, `{model}` the folder of its
            model, and `{scratch}` one that is emptied before every step.
        minutes: that it takes, about; it is not begun with less time left.
        quick: what `--quick` runs in its place; None leaves the step as it is.
        model: of `MODELS`.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    quick: tuple[str, ...] | None = None
    model: str | None = None

    @property
    def record(self) -> str | None:
        """The command as docs/benchmarks.md shows it, for a step that is a `retnet-tools bench`."""
        if self.model is None:
            return None
        words = [word for word in self.command[len(CLI) + 2 :] if word not in ("--json", "--folder", "{scratch}")]
        return f"retnet-tools bench {MODELS[self.model].options} {shlex.join(words)}"


def bench(name: str, model: str, options: str, minutes: float) -> Step:
    """`retnet-tools bench` of a model."""
    words = shlex.split(options)
    start, end = (*CLI, "bench", "{model}"), ("--device", "cuda", "--folder", "{scratch}", "--json")
    kept = [i for i, word in enumerate(words) if word in ("--against", "--chunk-size", "--no-cuda-graph")]
    short = [word for i in kept for word in words[i : i + 1 + (words[i] != "--no-cuda-graph")]]
    return Step(name, (*start, *words, *end), minutes, (*start, "--quick", *short, *end), model)


def script(name: str, minutes: float, quick: str) -> Step:
    """A script of benchmarks/ that measures operators."""
    command = (*PYTHON, f"benchmarks/{name.replace('-', '_')}.py", "-o", "{out}")
    return Step(name, command, minutes, (*command, *shlex.split(quick)))


def steps(scripts: Path = SCRIPTS) -> list[Step]:
    """All steps, in order.

    Args:
        scripts: a folder of scripts that a host is given beside these: of smoke.py and probe.py those that are there
            are steps.
    """
    parallel = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    smoke, probe = ((*PYTHON, str(scripts / name)) for name in ("smoke.py", "probe.py"))
    probe = (*probe, "--out", "{out}")
    given = [name for name in ("smoke.py", "probe.py") if (scripts / name).is_file()]
    once, long = "-p 0 -n 128", "-p 0 -n 32 -r 3"
    return [
        Step("imports", (*PYTHON, "-c", f"import json, {', '.join(MODULES)}, retnet_tools.cli.app\n{_VERSIONS}"), 0.5),
        Step("doctor", (*CLI, "doctor", "--device", "cuda", "--json"), 0.5),
        *([Step("smoke", smoke, 0.5)] if "smoke.py" in given else []),
        Step("tests-first", (*PYTEST, *parallel, *TESTS), 2.0),
        bench("6.7b-float16", "6.7b-fp16", once, 1.5),
        bench("float16", "1.3b-fp16", "-p 512,2048 -n 128 --profile", 1.5),
        bench("eager", "1.3b-fp16", f"{once} --no-cuda-graph", 0.7),
        bench("int8", "1.3b-int8", "-p 512,2048 -n 128 --profile", 1.5),
        bench("int4", "1.3b-int4", "-p 512,2048 -n 128 --profile", 1.5),
        bench("float32", "1.3b-fp32", "-p 512,2048 -n 128 --profile", 1.5),
        bench("transformer", "6.7b-fp16", f"{long} -d 8192 -b 1,4,8,32 --against transformer,transformer-gqa", 8.0),
        *(bench(f"prefill-{n}", "1.3b-fp16", f"-p 2048 -n 0 --chunk-size {n}", 0.7) for n in (256, 512, 1024)),
        script("retention-prompt", 1.5, "--heads 2x128x64 --tokens 128 --chunk-sizes 64 --steps 2"),
        bench("6.7b-batches", "6.7b-fp16", f"{long} -b 1,8,32,64", 2.0),
        bench("batches", "1.3b-fp16", f"{long} -b 1,8,32,128", 1.5),
        script("retention", 4.0, "--heads 2x128x64 --layers 2 --steps 5"),
        *([Step("probe", probe, 5.0, (*probe, "--quick"))] if "probe.py" in given else []),
        Step("tests", (*PYTEST, *parallel), 9.0),
    ]


_VERSIONS = (
    "print(json.dumps({name: getattr(module, '__version__', None) for name, module in list(globals().items())"
    " if hasattr(module, '__file__') and not name.startswith('_')}))"
)
