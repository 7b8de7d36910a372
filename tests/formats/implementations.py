"""For tests against models of other implementations, run where those are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from retnet_tools.formats import open_checkpoint
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import load_model

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 31, (2, 19)))


def randomize(model: nn.Module) -> None:
    """Weights of unit gain, norm weights around 1, biases of 0.1: nothing that a test could miss."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def check(folder: Path, expected: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint.config, checkpoint.weights, dtype)
    for form in FORMS.values():
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS, form=form).logits, expected, rtol=0, atol=tolerance)
