"""The operator sets as graphs for CUDA use them: what has a kernel there, in the shapes that the kernels take.

They compute the same as those for the CPU, and run there too. Retention takes the form that meets the better of
LinearAttention's kernels.

K = head_k_dim, V = head_v_dim, H heads. From the source of onnxruntime 1.31
(contrib_ops/cuda/bert/linear_attention_impl.cu), one token or many:

    kernel        shapes                             state in memory     blocks of threads
    columns       K = 64, 128 and V % 32 == 0        read once, in order H * V / 32
    warps         K = 64, 128, 256, one token only   read once, strided  H * V / 4
    shared        4 (K V + K + max(K, V)) bytes      read once           H
                  of shared memory, max(K, V) <= 1024

`columns` also takes many tokens, where the device has more multiprocessors than B * H or `shared` does not fit.
Everything else is refused when it runs. One block has 227 KiB of shared memory at most on compute capability 9.0, 163
on 8.0, 99 on 8.6 and 8.9. RetNet's own heads (256 x 512, 256 x 432: 512 and 432 KiB) fit nowhere without splitting.

Keys can be split: a head of K is s heads of K / s that share v, and whose outputs are added,

    q S = sum_s q_s S_s,   S_s = gamma S_s + k_s^T v,

exactly, and `[B, H, K, V]` is `[B, H s, K/s, V]` in memory. Splitting values would need a transposed state, and leaves
K, which decides the kernel, as it is: it is not used.

    what          kernel that K, V meet      form               decided by
    one token     columns, K = 64 s, 128 s   operator, s parts  arithmetic: the state is read and written in order; with
                                                                s > 1 it is copied too (to be measured: 4 passes, 11 us
                                                                for 16 heads of 256 x 512 at 3 TB/s), four small nodes
                  warps                      operator           to be measured: 2 passes, each lane of a warp in another
                                                                line of memory, about 18 us for those heads
                  other                      matrix products    to be measured: 7 passes in order (20 us); `shared`
                                                                would leave all but H multiprocessors idle
    many tokens,  any                        chunks (Eq. 7)     measured on the CPU only
    gamma by head
    many tokens,  columns                    operator, s parts  arithmetic
    gamma by key  shared                     operator, parts    arithmetic: the fewest parts that fit
    dimension     other                      Scan over tokens   nothing else is left

`benchmarks/retention.py` measures every form for one token at the heads of published models. That these shapes are
taken and refused was checked with the operator of onnxruntime 1.31.1 itself, on a device that computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx_ir import Value

from retnet_tools.config import Activation
from retnet_tools.graph.decay import StepDecay
from retnet_tools.graph.nodes import GraphBuilder, Pair
from retnet_tools.graph.ops import FusedOps, StandardOps, head_sizes
from retnet_tools.graph.weight_tensors import BlockedMatrix

SHARED_BYTES = 99 * 1024
"""What exports ask of one block at most: every device since compute capability 8.0 has it."""
LARGEST_BLOCK = 1024
_COLUMN_KEYS = (128, 64)
_COLUMNS = 32
_WARP_KEYS = (64, 128, 256)

Kernel = Literal["columns", "warps", "shared"]


@dataclass(frozen=True)
class KernelForm:
    """The form of retention in a graph for CUDA.

    Attributes:
        kernel: of LinearAttention; None takes matrix products, or a Scan for many tokens.
        key_splits: s, parts of a head that LinearAttention takes for heads.
    """

    kernel: Kernel | None = None
    key_splits: int = 1


def step_form(head_k_dim: int, head_v_dim: int) -> KernelForm:
    """The form for one token."""
    if parts := _column_parts(head_k_dim, head_v_dim):
        return KernelForm("columns", parts)
    return KernelForm("warps") if head_k_dim in _WARP_KEYS else KernelForm()


def tokens_form(head_k_dim: int, head_v_dim: int) -> KernelForm:
    """The form for many tokens, one after another."""
    if parts := _column_parts(head_k_dim, head_v_dim):
        return KernelForm("columns", parts)
    for parts in range(1, head_k_dim + 1):
        if head_k_dim % parts == 0 and _fits(head_k_dim // parts, head_v_dim):
            return KernelForm("shared", parts)
    return KernelForm()


def step_kernel(head_k_dim: int, head_v_dim: int, shared_bytes: int = SHARED_BYTES) -> Kernel | None:
    """The kernel that LinearAttention meets for one token without splitting; None where it refuses to run.

    Args:
        shared_bytes: of shared memory that one block can have.
    """
    kernel = tokens_kernel(head_k_dim, head_v_dim, shared_bytes)
    return "warps" if kernel != "columns" and head_k_dim in _WARP_KEYS else kernel


def tokens_kernel(head_k_dim: int, head_v_dim: int, shared_bytes: int = SHARED_BYTES) -> Kernel | None:
    """The same for many tokens."""
    if _column_parts(head_k_dim, head_v_dim) == 1:
        return "columns"
    return "shared" if _fits(head_k_dim, head_v_dim, shared_bytes) else None


def _column_parts(head_k_dim: int, head_v_dim: int) -> int:
    """Parts of a head that each meet `columns`; 0 where there are none."""
    if head_v_dim % _COLUMNS:
        return 0
    return next((head_k_dim // size for size in _COLUMN_KEYS if head_k_dim % size == 0), 0)


def _fits(head_k_dim: int, head_v_dim: int, shared_bytes: int = SHARED_BYTES) -> bool:
    """Whether a head's state fits where `shared` keeps it."""
    widest = max(head_k_dim, head_v_dim)
    return widest <= LARGEST_BLOCK and 4 * (head_k_dim * head_v_dim + head_k_dim + widest) <= shared_bytes


class CudaStandardOps(StandardOps):
    """ai.onnx operators that have CUDA kernels in every type."""

    def wide_features(self, g: GraphBuilder, feature_map: Activation | None, x: Value, dtype: str) -> Value:
        """In float32 from the start, since LeakyRelu has no bfloat16 there; Elu, which has no kernel, in parts.

        Elu(x) = Relu(x) + e^min(x, 0) - 1.
        """
        x = g.cast(x, dtype, "float32")
        if feature_map == "elu":
            zero, one = g.float32("elu_0", 0), g.float32("elu_1", 1)
            return g.op("Add", g.op("Relu", x), g.op("Sub", g.op("Exp", g.op("Min", x, zero)), one))
        return x if feature_map is None else self.activate(g, feature_map, x)

    def dequantize(self, g: GraphBuilder, matrix: BlockedMatrix, codes: Value, *others: Value) -> Value:
        """(code - zero point) * scale, whose whole numbers every float type holds: DequantizeLinear knows no blocks of
        bytes there, and no bfloat16.
        """
        (columns, size), (scales, *zeros) = (matrix.shape[1], matrix.format.block_size), others
        block = g.constant(f"blocks_{columns}_{size}", np.arange(columns, dtype=np.int64) // size)
        steps = g.cast(codes, "int8", matrix.dtype)
        for points in zeros:
            steps = g.op("Sub", steps, g.op("Gather", g.cast(points, "uint8", matrix.dtype), block, axis=-1))
        return g.op("Mul", steps, g.op("Gather", scales, block, axis=-1))


class CudaFusedOps(FusedOps, CudaStandardOps):
    """With ONNX Runtime's contrib operators; retention in the forms of this file."""

    def retention_step(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: StepDecay) -> Pair:
        """LinearAttention over one token, with split keys where that meets a better kernel, or matrix products."""
        form = step_form(*head_sizes(past)[1:])
        if form.kernel is None:
            return StandardOps.retention_step(self, g, q, k, v, past, decay)
        # A gamma of each key dimension is cut up as it stands.
        own = decay.log_gamma if decay.log_gamma.ndim == 2 else np.repeat(decay.log_gamma, form.key_splits)
        log_gamma = StepDecay(own, decay.position_ids).rows(g)
        return self.split_keys(g, q, k, v, past, log_gamma, form.key_splits)

    def retention_tokens(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, log_gamma: Value) -> Pair:
        """LinearAttention, with split keys where the shape would be refused, or a Scan.

        `log_gamma` is of each key dimension, `[B, T, H*K]`, which splits with the keys as it stands.
        """
        form = tokens_form(*head_sizes(past)[1:])
        if form.kernel is None:
            return StandardOps.retention_tokens(self, g, q, k, v, past, log_gamma)
        return self.split_keys(g, q, k, v, past, log_gamma, form.key_splits)

    def split_keys(
        self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, log_gamma: Value, parts: int
    ) -> Pair:
        """q S = sum_s q_s S_s: each head is `parts` heads of K / parts that share v.

        Of q, k `[B, T, H*K]`, v `[B, T, H*V]`, the past S `[B, H, K, V]` and log(gamma) `[B, T, H*parts]` or
        `[B, T, H*K]`: o `[B, T, H*V]` and the last S.
        """
        heads, head_k_dim, head_v_dim = head_sizes(past)
        if parts == 1:
            return self.linear_attention(g, (q, k, v, past, log_gamma), heads)
        value = g.reshape(v, 0, 0, heads, 1, head_v_dim)  # [B, T, H*V] -> [B, T, H, 1, V]
        value = g.op("Expand", value, g.integers(1, 1, 1, parts, 1))
        value = g.reshape(value, 0, 0, heads * parts * head_v_dim)
        state = g.reshape(past, 0, heads * parts, head_k_dim // parts, head_v_dim)
        output, present = self.linear_attention(g, (q, k, value, state, log_gamma), heads * parts)
        output = g.reshape(output, 0, 0, heads, parts, head_v_dim)  # [B, T, H*parts*V] -> [B, T, H, parts, V]
        sizes = g.integers(*[1] * parts)
        output = g.op("Sum", *g.node("Split", output, sizes, outputs=parts, axis=3))  # [B, T, H, 1, V]
        return g.reshape(output, 0, 0, heads * head_v_dim), g.reshape(present, 0, heads, head_k_dim, head_v_dim)
