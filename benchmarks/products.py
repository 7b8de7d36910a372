"""How close ONNX Runtime's products of one row come to the read limit: what bounds decoding on the CPU.

    python benchmarks/products.py -o benchmarks/products.json

For each way of storing a weight `[N, K]`: y = x W^T for one x, with a weight that stays in the cache and with 24 larger
ones that do not, and the read limit of `retnet-tools bench` before and after. A kernel that is fast from the cache and
slow from memory waits for memory without reaching its limit; `share` is what it reaches. Medians over `--rounds` of the
median of 30 products, ways in turns. Beside the ways that exports use (MatMul, and MatMulNBits at several blocks and
levels) stands DynamicQuantizeMatMul, the other int8 product that ONNX Runtime has.

`huge pages` is the first way again after the kernel was told to back the process's memory with 2 MB pages
(MADV_COLLAPSE), as numpy's buffers of the read limit are: Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from large_checkpoint import machine
from onnx import NodeProto, TensorProto, helper, numpy_helper

from retnet_tools.bench.floor import Reader, read_sizes

K = 2048
SIZES = {"cache": (1024, 1), "memory": (4096, 24)}
"""Rows of a weight, and how many of them a graph multiplies with in turn."""
HUGE_PAGES = "MatMulNBits 8 bits, blocks of 128, level 4, huge pages"
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
Weights = tuple[NodeProto, dict[str, np.ndarray]]
Way = Callable[[np.random.Generator, int, int], Weights]


def matmul_nbits(bits: int, block_size: int, level: int) -> Way:
    """The product of quantized exports."""

    def make(rng: np.random.Generator, rows: int, i: int) -> Weights:
        blocks = K // block_size
        weights = {
            f"codes{i}": rng.integers(0, 256, (rows, blocks, block_size * bits // 8), dtype=np.uint8),
            f"scales{i}": rng.random((rows, blocks), dtype=np.float32) / 100,
        }
        attributes = {"N": rows, "K": K, "bits": bits, "block_size": block_size, "accuracy_level": level}
        return helper.make_node(
            "MatMulNBits", ["x", *weights], [f"y{i}"], domain="com.microsoft", **attributes
        ), weights

    return make


def dynamic_quantize_matmul(rng: np.random.Generator, rows: int, i: int) -> Weights:
    """Int8 with a scale for each output."""
    weights = {
        f"codes{i}": rng.integers(-127, 128, (K, rows), dtype=np.int8),
        f"scales{i}": rng.random(rows, dtype=np.float32) / 100,
    }
    return helper.make_node("DynamicQuantizeMatMul", ["x", *weights], [f"y{i}"], domain="com.microsoft"), weights


def matmul(rng: np.random.Generator, rows: int, i: int) -> Weights:
    """Float32."""
    weights = {f"weight{i}": rng.standard_normal((K, rows), dtype=np.float32)}
    return helper.make_node("MatMul", ["x", *weights], [f"y{i}"]), weights


WAYS: dict[str, Way] = {
    "MatMul float32": matmul,
    **{f"MatMulNBits 8 bits, blocks of {size}, level 4": matmul_nbits(8, size, 4) for size in (32, 64, 128, 256)},
    **{f"MatMulNBits 4 bits, blocks of {size}, level 4": matmul_nbits(4, size, 4) for size in (32, 128)},
    "MatMulNBits 8 bits, blocks of 128, level 0": matmul_nbits(8, 128, 0),
    "MatMulNBits 4 bits, blocks of 128, level 0": matmul_nbits(4, 128, 0),
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
}


def open_way(way: Way, rows: int, count: int, threads: int) -> tuple[ort.InferenceSession, int]:
    """A graph of `count` products, and the bytes of its weights."""
    rng = np.random.default_rng(0)
    made = [way(rng, rows, i) for i in range(count)]
    weights = {name: array for _, arrays in made for name, array in arrays.items()}
    nodes = [node for node, _ in made]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, K])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, rows]) for node in nodes],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session, sum(array.nbytes for array in weights.values())


def seconds_of(session: ort.InferenceSession) -> float:
    """The median of 30 runs after 3."""
    x, times = np.ones((1, K), dtype=np.float32), []
    for _ in range(33):
        began = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def use_huge_pages() -> int:
    """Back all large private memory of this process with huge pages; bytes for which the kernel did."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *rest = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if rights.startswith("rw") and len(rest) == 3 and end - start >= 1 << 22:
            madvise(start, end - start, _MADV_HUGEPAGE)
            done += 0 if madvise(start, end - start, _MADV_COLLAPSE) else end - start
    return done


def measure(threads: int, rounds: int) -> dict[str, Any]:
    """All ways in turns, each opened anew in every round."""
    reader, limits = Reader(read_sizes(quick=False), threads), []
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    huge = 0
    for _ in range(rounds):
        for name, way in [*WAYS.items(), (HUGE_PAGES, matmul_nbits(8, 128, 4))]:
            for place, (rows, count) in SIZES.items():
                session, size = open_way(way, rows, count, threads)
                if name == HUGE_PAGES:
                    huge = max(huge, use_huge_pages())
                before = reader.bandwidth()
                rate = size / seconds_of(session)
                limit = (before + reader.bandwidth()) / 2
                limits.append(limit)
                seen.setdefault((name, place), []).append((rate, rate / limit))
                del session
    return {
        "threads": threads,
        "read_bandwidth": round(statistics.median(limits)),
        "huge_page_bytes": huge,
        "results": [
            {
                "way": name,
                "weights_in": place,
                "gb_per_second": round(statistics.median(rate for rate, _ in pairs) / 1e9, 1),
                "share": round(statistics.median(share for _, share in pairs), 3),
            }
            for (name, place), pairs in seen.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="a comma list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    runs = [measure(threads, arguments.rounds) for threads in map(int, arguments.threads.split(","))]
    text = json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
