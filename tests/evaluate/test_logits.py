"""Logits of an exported folder, stepped side by side, against the numpy model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.evaluate.logits import ExportLogits, is_export
from tests.exports import export
from tests.helpers import ABLATIONS, OTHER_LAYERS, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT32


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("name", ["base", "key_decay", "torchscale_2023", *OTHER_LAYERS])
def test_rows_side_by_side_equal_the_numpy_model(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    source, ids = random_source(config, 1), random_tokens(config, 3, 17, 1)
    logits = ExportLogits(export(config, source, tmp_path / "out", ops=ops), threads=1)
    blocks = list(logits.stream(ids, 5))
    assert [block.shape for block in blocks] == [(3, n, config.vocab_size) for n in (5, 5, 5, 2)]
    np.testing.assert_allclose(
        np.concatenate(blocks, 1), reference_logits(config, source, ids), rtol=0, atol=GRAPH_FLOAT32
    )
    (whole,) = logits.stream(ids, 17)
    np.testing.assert_allclose(whole, reference_logits(config, source, ids), rtol=0, atol=GRAPH_FLOAT32)


def test_blocks_that_were_given_out_stay_as_they_were(tmp_path: Path) -> None:
    config = ABLATIONS["base"]
    logits = ExportLogits(export(config, random_source(config, 1), tmp_path / "out"), threads=1)
    first, *rest = kept = list(logits.stream(random_tokens(config, 2, 6, 1), 2))
    copies = [block.copy() for block in kept]
    list(logits.stream(random_tokens(config, 2, 6, 2), 2))
    assert all((block == copy).all() for block, copy in zip([first, *rest], copies, strict=True))


def test_a_stack_is_refused_and_a_checkpoint_is_no_export(tmp_path: Path) -> None:
    config = ABLATIONS["stack"]
    folder = export(config, random_source(config, 1), tmp_path / "out")
    assert is_export(folder)
    assert not is_export(tmp_path)
    with pytest.raises(UsageError, match="stack without embedding and head"):
        ExportLogits(folder, threads=1)
