"""How retention runs on CUDA: which of LinearAttention's kernels a shape meets, and the form that is exported for it.

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
