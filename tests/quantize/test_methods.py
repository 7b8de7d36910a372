"""The table of methods: found by name, and refused where a text is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.quantization import Calibration
from retnet_tools.quantize import methods
from retnet_tools.quantize.blockwise import quantize_rows
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.methods import MethodSpec, MethodTask, find_method, round_to_nearest
from retnet_tools.quantize.unfinished import Workplace
from tests.helpers import BASE, random_source

TEXT = CalibrationText(Calibration("text", "00" * 32, 8), np.arange(8)[None])


def test_round_to_nearest_rounds_each_piece(tmp_path: Path) -> None:
    work = Workplace(tmp_path)
    task = MethodTask(BASE, random_source(BASE, 1), {}, np.dtype(np.float16), None, work, lambda *step: None)
    method = find_method("rtn", None).make(task)
    weight, format = np.random.default_rng(0).standard_normal((5, 40), np.float32), BlockFormat(4, 32, True)
    found = method("layers.0.ffn.up_proj.weight", weight, format, np.dtype(np.float16))
    expected = quantize_rows(weight, format, np.dtype(np.float16))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--method 'rtm'; expected one of rtn, gptq; did you mean 'rtn'\?"):
        find_method("rtm", None)


def test_a_calibrated_method_needs_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MethodSpec("learned", calibrated=True, make=lambda task: round_to_nearest)
    monkeypatch.setitem(methods.METHODS, "learned", spec)
    with pytest.raises(UsageError, match="--method learned without a text to calibrate on; expected --calibration"):
        find_method("learned", None)
    assert find_method("learned", TEXT) is spec
