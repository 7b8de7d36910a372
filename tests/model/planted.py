"""Small comparisons of forms, and forms with an error planted in them."""

import numpy as np
import torch

from retnet_tools.model.agreement import compare_forms, select_forms
from retnet_tools.model.position_terms import decay_matrix, gamma_powers
from retnet_tools.model.retention import retention_recurrent
from tests.helpers import BASE, random_source, random_tokens

LENGTH = 30
LARGE_EPSILON = BASE.with_head_norm_eps(1e-2)


def compare(config=BASE, forms=None, seed=1, **options):
    forms = forms or select_forms(["parallel", "recurrent", "chunkwise"], chunk_size=7)
    return compare_forms(config, random_source(config, seed), random_tokens(config, 2, LENGTH, seed), forms, **options)


def by_pair(report):
    return {(c.a, c.b): c for c in report.comparisons}


def eq7(zeta_exponent, chunk_size=7):
    """Eq. 7 with `zeta_j = gamma^zeta_exponent(B, j)`; None leaves zeta out, as the published text does."""

    def form(q, k, v, decay, *, initial_state=None, score_clamp="none"):
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
        outputs = []
        for start in range(0, q.shape[2], chunk_size):
            q_i, k_i, v_i = (x[:, :, start : start + chunk_size] for x in (q, k, v))
            size = q_i.shape[2]
            j = torch.arange(size)
            xi = gamma_powers(decay, j + 1, q.dtype)[..., None]
            zeta = 1.0 if zeta_exponent is None else gamma_powers(decay, zeta_exponent(size, j), q.dtype)[..., None]
            inner = (q_i @ k_i.transpose(-1, -2)) * decay_matrix(decay, size, q.dtype)
            outputs.append(inner @ v_i + (q_i @ state) * xi)
            carry = gamma_powers(decay, torch.tensor([size]), q.dtype)[..., None]
            state = k_i.transpose(-1, -2) @ (v_i * zeta) + carry * state
        return torch.cat(outputs, 2), state

    return form


def scaled_in_call(number, factor, layers=BASE.num_layers):
    """The recurrent form, but the call of this number (counted over the layers) is off by a factor per position."""
    calls = -1

    def form(q, k, v, decay, *, initial_state=None, score_clamp="none"):
        nonlocal calls
        calls += 1
        output, state = retention_recurrent(q, k, v, decay, initial_state=initial_state)
        return (output + factor * v if calls % layers == number else output), state

    return form


def noisy_in_float32(q, k, v, decay, *, initial_state=None, score_clamp="none"):
    output, state = retention_recurrent(q, k, v, decay, initial_state=initial_state)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(output.shape)) if q.dtype == torch.float32 else 0
    return (output * (1 + 3e-5 * noise)).to(q.dtype), state
