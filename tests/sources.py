"""A model that knows the last token only, to test what is computed from logits without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from retnet_tools.weights import Array


class MarkovLogits:
    """Logits are a row of a table, plus noise of a size that may depend on the place in the row."""

    description = "table"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        vocab: int,
        *,
        seed: int = 0,
        noise: Callable[[Array], Array] = lambda place: place * 0.0,
        tokenizer_files: tuple[Path, ...] = (),
        name: str = "table",
    ) -> None:
        self.name, self.vocab_size, self.tokenizer_files = name, vocab, tokenizer_files
        self.table = np.random.default_rng(seed).standard_normal((vocab, vocab)).astype(np.float32)
        self.noise = noise
        self.shapes: list[tuple[int, ...]] = []
        self.rows: list[Array] = []

    def stream(self, rows: Array, block: int) -> Iterator[Array]:
        self.rows.append(rows.copy())
        rng = np.random.default_rng(len(self.rows))
        for start in range(0, rows.shape[1], block):
            logits = self.table[rows[:, start : start + block]]
            size = self.noise(start + np.arange(logits.shape[1]))[:, None]
            self.shapes.append(logits.shape)
            yield logits + (size * rng.standard_normal(logits.shape)).astype(np.float32)
