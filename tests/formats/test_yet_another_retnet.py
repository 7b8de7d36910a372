"""Other configurations than the conformance cases, against yet-another-retnet's own code where it is installed.

It is no requirement of this project:

    pip install --no-deps yet-another-retnet einops
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.formats.implementations import TOKENS, check, randomize
from tests.tolerances import GOLDEN_FLOAT32, GOLDEN_FLOAT64

package = pytest.importorskip("yet_another_retnet.retnet", reason="yet-another-retnet is not installed")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("heads", "norm_first", "activation"),
    [*itertools.product([1, 4], [True, False], ["swish", "gelu"]), (2, False, "relu")],
)
def test_yet_another_retnet(heads: int, norm_first: bool, activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    arguments = {"d_model": heads * 8, "nhead": heads, "num_layers": 2, "dim_feedforward": 24, "layer_norm_eps": 1e-4}
    arguments |= {"num_tokens": 31, "norm_first": norm_first, "activation": activation}
    model = package.RetNet(**arguments).eval()
    randomize(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    with torch.no_grad():
        expected = model.to(dtype).forward_parallel(TOKENS)
    check(tmp_path, expected, dtype, GOLDEN_FLOAT64 if dtype == torch.float64 else GOLDEN_FLOAT32)
