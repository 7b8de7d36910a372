"""Small SentencePiece models, trained on the spot on a part of the fixture's calibration text."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest

spm = pytest.importorskip("sentencepiece", reason="the [tokenizers] extra is not installed")
TEXT = Path(__file__).parents[2] / "fixtures" / "shakespeare" / "calibration.txt"
OTHER = ["naïve café Größe 水 🎭", "①② ﬁ", "x = 1 + 2; // a\\b_c"]


@functools.cache
def train(model_type: str = "bpe", vocab_size: int = 400, **options: Any) -> bytes:
    """A serialized model."""
    lines, model = TEXT.read_text(encoding="utf-8").splitlines()[:3000] + OTHER, io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def processor(model: bytes) -> Any:
    """What SentencePiece itself makes of a model."""
    return spm.SentencePieceProcessor(model_proto=model)
