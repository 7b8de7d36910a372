"""Retention in its three forms: pure functions of one signature.

    parallel   (Eq. 5)  O = (Q K^T * D) V
    recurrent  (Eq. 6)  S_n = gamma S_(n-1) + k_n^T v_n,  o_n = q_n S_n
    chunkwise  (Eq. 7)  R_i = K_i^T (V_i * zeta) + gamma^B R_(i-1),
                        O_i = (Q_i K_i^T * D) V_i + (Q_i R_(i-1)) * xi

with D_nm = gamma^(n-m) for n >= m, zeta_j = gamma^(B-1-j) (the last row of D; the published Eq. 7 misplaces it) and
xi_j = gamma^(j+1). gamma is one number a head, or one for each key dimension (xPos): S_n = diag(gamma) S_(n-1) + ...,
and the scores are sum_k q_nk k_mk gamma_k^(n-m).

Every form takes and returns the recurrent state S `[B, H, K, V]`, the plain sum of Eq. 6, so any form can continue any
other. q, k, v are `[B, H, T, K]`, `[B, H, T, K]`, `[B, H, T, V]` in float32 or float64 and already carry rotation and
score scales: k is multiplied by 1/sqrt(K), q by 1/sqrt(sum_i gamma^i) of its position where the model normalises D.

`score_clamp` divides each row of scores by a number that depends on all scores of that row (see
`ScoreNormalization.clamp`). Only the parallel form knows that number; the recurrence and the chunks leave it out, as
torchscale's recurrence does, and the head norm cancels it up to its epsilon. With an initial state the parallel form
sees the scores of this call only.

Source: Sun et al. 2023, arXiv 2307.08621.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from retnet_tools.config import ScoreClamp
from retnet_tools.model.position_terms import decay_matrix, gamma_powers


class RetentionForm(Protocol):
    """The signature that the three forms share."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        *,
        initial_state: Tensor | None = None,
        score_clamp: ScoreClamp = "none",
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, H, T, V]` and final state `[B, H, K, V]` for `decay` = log(gamma), `[H]` or `[H, K]`."""
        ...


def retention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    score_clamp: ScoreClamp = "none",
) -> tuple[Tensor, Tensor]:
    """O = (Q K^T * D) V (Eq. 5), memory T^2: output `[B, H, T, V]` and state `[B, H, K, V]`."""
    scores = _decayed_scores(q, k, decay)  # [B, H, T, T]
    output = scores @ v
    if initial_state is not None:
        output = output + _cross_output(q, decay, initial_state)
    if score_clamp == "abs_of_sum":
        output = output / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
    elif score_clamp == "sum_of_abs":
        output = output / scores.detach().abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)
    return output, _final_state(k, v, decay, initial_state)


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    score_clamp: ScoreClamp = "none",
) -> tuple[Tensor, Tensor]:
    """S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6), memory independent of T."""
    gamma = _powers(decay, torch.ones(1, device=decay.device), q.dtype).transpose(-1, -2)  # [H, 1 or K, 1]
    state = _zero_state(k, v) if initial_state is None else initial_state
    outputs = []
    for n in range(q.shape[-2]):
        state = gamma * state + k[:, :, n, :, None] * v[:, :, n, None, :]
        outputs.append(q[:, :, n, None, :] @ state)  # [B, H, 1, V]
    return torch.cat(outputs, dim=-2), state


def retention_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    score_clamp: ScoreClamp = "none",
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """R_i = K_i^T (V_i * zeta) + gamma^B R_(i-1), O_i = (Q_i K_i^T * D) V_i + (Q_i R_(i-1)) * xi (Eq. 7, corrected).

    The last chunk may be shorter than the rest. Memory is chunk_size^2.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    state = _zero_state(k, v) if initial_state is None else initial_state
    outputs = []
    for start in range(0, q.shape[-2], chunk_size):
        q_i, k_i, v_i = (x[:, :, start : start + chunk_size] for x in (q, k, v))
        outputs.append(_decayed_scores(q_i, k_i, decay) @ v_i + _cross_output(q_i, decay, state))
        state = _final_state(k_i, v_i, decay, state)
    return torch.cat(outputs, dim=-2), state


FORMS: dict[str, RetentionForm] = {
    "parallel": retention_parallel,
    "recurrent": retention_recurrent,
    "chunkwise": retention_chunkwise,
}


def _powers(decay: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma^n for n in `[T]` as `[H, T, 1]`, or `[H, T, K]` for a decay of each key dimension."""
    return gamma_powers(decay.view(decay.shape[0], -1), exponents, dtype).transpose(-1, -2)


def _decayed_scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """sum_k q_nk k_mk gamma_k^(n-m) for n >= m, `[B, H, T, T]`.

    With a decay of each key dimension the sum runs dimension by dimension: factors gamma^n on q and gamma^-m on k
    would overflow.
    """
    length = q.shape[-2]
    if decay.dim() == 1:
        return (q @ k.transpose(-1, -2)) * decay_matrix(decay, length, q.dtype)
    scores = q.new_zeros(*q.shape[:2], length, length)
    for i in range(q.shape[-1]):
        scores += q[..., i, None] * k[..., None, :, i] * decay_matrix(decay[:, i], length, q.dtype)
    return scores


def _cross_output(q: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    return (q * _powers(decay, torch.arange(1, q.shape[-2] + 1, device=q.device), q.dtype)) @ state


def _final_state(k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> Tensor:
    length = k.shape[-2]
    zeta = _powers(decay, torch.arange(length - 1, -1, -1, device=k.device), k.dtype)
    update = (k * zeta).transpose(-1, -2) @ v
    if state is None:
        return update
    carried = _powers(decay, torch.tensor([length], device=k.device), k.dtype).transpose(-1, -2)  # [H, 1 or K, 1]
    return update + carried * state


def _zero_state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
