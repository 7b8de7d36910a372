"""What states of fewer bits cost and save: the study behind `--state-dtype`, which offers fp32 and fp16.

    python benchmarks/state_precision.py -o benchmarks/state_precision.json

Three parts, each with states that are rounded after every token:

- `fixture`: the held-out play through fixtures/shakespeare in torch's recurrent form, in rows of `--context` tokens;
  KL divergence from float32 states, by how many tokens came before.
- `decay`: S_n = gamma S_(n-1) + k_n^T v_n (Eq. 6) with random k and v for 4 / (1 - gamma) tokens, at most 16384;
  relative error of S against float64 by gamma. The published models' slowest head has gamma = 1 - 2^-12.
- `speed`: one layer of the 1.3b size in ONNX Runtime, states in two buffers; `int8 rows` is built from the operators it
  has (LinearAttention reads no int8 states). `step_share` is what 24 layers of it take of one step at 40 ms.

`rows`: a scale for each key dimension, max |S_k| / 127 over the values; `columns`: for each value dimension;
`stochastic`: rounded up with the probability of the fraction, which keeps the mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from large_checkpoint import machine
from onnx import TensorProto, helper, save
from torch import Tensor

from retnet_tools.distributions import compare_logits
from retnet_tools.formats import open_checkpoint
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.paper import MODEL_SIZES, VOCABULARY_SIZE, paper_decay
from retnet_tools.tokenizing.files import load_tokenizer

FIXTURE = Path(__file__).parent.parent / "fixtures" / "shakespeare"
BINS = (0, 64, 256, 1024, 4096, 1 << 30)
LAYERS = 24
INT8_STEP_MS = 40.0
Rounding = Callable[[Tensor], Tensor]


def integers(dim: int, bits: int, *, stochastic: bool = False) -> Rounding:
    """To integers of so many bits with a float32 scale, shared along a dimension of `[..., K, V]`."""
    generator = torch.Generator().manual_seed(0)

    def apply(state: Tensor) -> Tensor:
        scale = state.abs().amax(dim, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        codes = state / scale
        if stochastic:
            codes = (codes + torch.rand(codes.shape, generator=generator, dtype=codes.dtype)).floor()
        return codes.round() * scale

    return apply


ROUNDINGS: dict[str, Rounding] = {
    "float32": lambda state: state,
    "float16": lambda state: state.half().to(state.dtype),
    "int8 rows": integers(-1, 8),
    "int8 columns": integers(-2, 8),
    "int8 rows, stochastic": integers(-1, 8, stochastic=True),
    "int16 rows": integers(-1, 16),
}


@torch.inference_mode()
def fixture_divergence(context: int) -> dict[str, Any]:
    """Every rounding beside float32 on the same tokens."""
    checkpoint = open_checkpoint(FIXTURE)
    model = load_model(checkpoint.config, checkpoint.weights, torch.float32)
    ids = np.array(load_tokenizer(FIXTURE / "tokenizer.json").encode((FIXTURE / "heldout.txt").read_text()).ids)
    rows = (len(ids) - 1) // context
    inputs = torch.from_numpy(ids[: rows * context].reshape(rows, context))
    targets = ids[1 : rows * context + 1].reshape(rows, context)
    states: dict[str, list[Tensor] | None] = dict.fromkeys(ROUNDINGS)
    kl: dict[str, list[np.ndarray]] = {name: [] for name in ROUNDINGS}
    nll: dict[str, list[np.ndarray]] = {name: [] for name in ROUNDINGS}
    for position in range(context):
        baseline = None
        for name, rounding in ROUNDINGS.items():
            token = inputs[:, position : position + 1]
            output = model(token, form=retention_recurrent, states=states[name], position=position)
            states[name] = [rounding(state) for state in output.states]
            logits = output.logits[:, -1].numpy()
            baseline = logits if baseline is None else baseline
            found = compare_logits(baseline, logits, targets[:, position])
            kl[name].append(found.kl)
            nll[name].append(found.nll)
    edges = [edge for edge in BINS if edge < context] + [context]
    floor = np.mean(nll["float32"])
    return {
        "rows": rows,
        "context": context,
        "results": {
            name: {
                "mean_kld": float(np.mean(values)),
                "ppl_ratio": float(np.exp(np.mean(nll[name]) - floor)),
                "mean_kld_by_tokens_before": {
                    f"{a}-{b}": float(np.mean(values[a:b])) for a, b in itertools.pairwise(edges)
                },
            }
            for name, values in kl.items()
            if name != "float32"
        },
    }


def decay_error(log_gamma: float, rounding: Rounding, k: int = 64, v: int = 64) -> float:
    """|S - S_float64| / |S_float64| after a walk."""
    gamma, generator = float(np.exp(log_gamma)), torch.Generator().manual_seed(1)
    exact = torch.zeros(k, v, dtype=torch.float64)
    state = torch.zeros(k, v)
    for _ in range(min(16384, int(4 / (1 - gamma)))):
        outer = torch.randn(k, 1, generator=generator) * torch.randn(1, v, generator=generator)
        exact = gamma * exact + outer
        state = rounding(gamma * state + outer)
    return float((state - exact).norm() / exact.norm())


def layer_graph(path: Path, heads: int, k: int, v: int, *, int8: bool) -> None:
    """One token's retention with float32 states, or with int8 ones that are read and written as such."""
    f32, i8 = TensorProto.FLOAT, TensorProto.INT8
    nodes, state_type = [], i8 if int8 else f32
    inputs = [
        helper.make_tensor_value_info(name, f32, shape)
        for name, shape in (("q", [1, 1, heads * k]), ("k", [1, 1, heads * k]), ("v", [1, 1, heads * v]))
    ]
    inputs.append(helper.make_tensor_value_info("past", state_type, [1, heads, k, v]))
    outputs = [
        helper.make_tensor_value_info("o", f32, [1, 1, heads * v]),
        helper.make_tensor_value_info("present", state_type, [1, heads, k, v]),
    ]
    decay = np.array(paper_decay(heads), dtype=np.float32).reshape(1, 1, heads)
    initializers = [helper.make_tensor("decay", f32, decay.shape, decay)]
    past, present = ("wide_past", "wide_present") if int8 else ("past", "present")
    if int8:
        inputs.append(helper.make_tensor_value_info("past_scale", f32, [1, heads, k, 1]))
        outputs.append(helper.make_tensor_value_info("present_scale", f32, [1, heads, k, 1]))
        initializers += [helper.make_tensor("limit", f32, [], [127.0]), helper.make_tensor("tiny", f32, [], [1e-30])]
        nodes += [
            helper.make_node("Cast", ["past"], ["past_codes"], to=f32),
            helper.make_node("Mul", ["past_codes", "past_scale"], [past]),
        ]
    nodes.append(
        helper.make_node(
            "LinearAttention",
            ["q", "k", "v", past, "decay"],
            ["o", present],
            domain="com.microsoft",
            update_rule="gated",
            scale=1.0,
            q_num_heads=heads,
            kv_num_heads=heads,
        )
    )
    if int8:
        initializers.append(helper.make_tensor("axis", TensorProto.INT64, [1], [3]))
        nodes += [
            helper.make_node("Abs", [present], ["size"]),
            helper.make_node("ReduceMax", ["size", "axis"], ["largest"]),
            helper.make_node("Max", ["largest", "tiny"], ["bounded"]),
            helper.make_node("Div", ["bounded", "limit"], ["present_scale"]),
            helper.make_node("Div", [present, "present_scale"], ["scaled"]),
            helper.make_node("Round", ["scaled"], ["codes"]),
            helper.make_node("Cast", ["codes"], ["present"], to=i8),
        ]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)


def layer_times(threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Float32 and int8 in turns; milliseconds of one layer and token."""
    config = MODEL_SIZES["1.3b"].config(VOCABULARY_SIZE)
    heads, k, v = config.num_heads, config.head_k_dim, config.head_v_dim
    rng, options = np.random.default_rng(0), ort.SessionOptions()
    options.intra_op_num_threads = threads
    bindings = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, int8 in (("float32", False), ("int8 rows", True)):
            path = Path(folder) / f"{int8}.onnx"
            layer_graph(path, heads, k, v, int8=int8)
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            sets = []
            for past_set in range(2):
                binding = session.io_binding()
                for letter, size in (("q", k), ("k", k), ("v", v)):
                    binding.bind_cpu_input(letter, rng.standard_normal((1, 1, heads * size), dtype=np.float32))
                sets.append((binding, past_set))
            dtype = np.int8 if int8 else np.float32
            states = [ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, k, v), dtype)) for _ in range(2)]
            scales = [ort.OrtValue.ortvalue_from_numpy(np.ones((1, heads, k, 1), np.float32)) for _ in range(2)]
            for binding, past_set in sets:
                binding.bind_ortvalue_input("past", states[past_set])
                binding.bind_ortvalue_output("present", states[1 - past_set])
                if int8:
                    binding.bind_ortvalue_input("past_scale", scales[past_set])
                    binding.bind_ortvalue_output("present_scale", scales[1 - past_set])
                binding.bind_output("o")
            bindings[name] = (session, [binding for binding, _ in sets], (states, scales))
    times: dict[str, list[float]] = {name: [] for name in bindings}
    for _ in range(rounds + 1):
        for name, (session, sets, _) in bindings.items():
            began = time.perf_counter()
            for n in range(steps):
                session.run_with_iobinding(sets[n % 2])
            times[name].append(1e3 * (time.perf_counter() - began) / steps)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    elements = heads * k * v
    return {
        "heads": [heads, k, v],
        "threads": threads,
        "results": {
            name: {
                "ms_per_layer": round(ms, 4),
                "step_share": round(LAYERS * ms / INT8_STEP_MS, 3),
                "bytes_per_layer": elements + 4 * heads * k if name != "float32" else 4 * elements,
            }
            for name, ms in medians.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gammas = [float(np.log1p(-(2.0**-n))) for n in (5, 8, 10, 12)]
    document = {
        "machine": machine(),
        "fixture": fixture_divergence(arguments.context),
        "decay": {
            f"1 - 2^-{n}": {name: decay_error(gamma, rounding) for name, rounding in ROUNDINGS.items()}
            for n, gamma in zip((5, 8, 10, 12), gammas, strict=True)
        },
        "speed": layer_times(arguments.threads, arguments.rounds, 50),
    }
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
