"""onnxruntime-genai on the quantized fixture: the logits that our own runtime gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.runtime.session import DecoderSession
from tests.quantized import quantize
from tests.test_genai_runtime import PROMPTS, export, generator, logits, open_genai, padded
from tests.tolerances import GRAPH_FLOAT32


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_logits_of_a_ragged_batch_are_ours(kind, tmp_path: Path) -> None:
    options = {"accuracy_level": 0, "symmetric": False}
    folder = quantize(export(tmp_path, "genai", "fused", "float32"), tmp_path / "genai-out", kind, **options)
    ours = quantize(export(tmp_path, "onnx", "fused", "float32"), tmp_path / "onnx-out", kind, **options)
    session, ids = DecoderSession(ours, threads=1), padded(PROMPTS[:3])
    running = generator(open_genai(folder), 3, ids.shape[1] + 4)
    running.append_tokens(ids)
    sequences = [list(prompt) for prompt in PROMPTS[:3]]
    for _ in range(3):
        found = logits(running)
        for row, sequence in zip(found, sequences, strict=True):
            expected = session.prefill([sequence], session.new_state())[0]
            np.testing.assert_allclose(row, expected, rtol=0, atol=GRAPH_FLOAT32)
        running.generate_next_token()
        for i, sequence in enumerate(sequences):
            sequence.append(int(running.get_sequence(i)[-1]))
