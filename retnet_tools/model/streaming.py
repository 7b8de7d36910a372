"""A checkpoint's logits of token rows, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import UsageError
from retnet_tools.formats.spec import Checkpoint
from retnet_tools.machine import torch_threads
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import load_model
from retnet_tools.weights import Array, FiniteWeights, parameter_count


def use_threads(config: RetNetConfig, tokens: int, count: int | None = None) -> None:
    """Let torch use this many CPU threads from now on; None takes what a model shown `tokens` at once is worth."""
    torch.set_num_threads(count or torch_threads(parameter_count(config), tokens))


class CheckpointLogits:
    """A checkpoint in torch on the CPU, in the chunkwise form (Eq. 7) with states carried from block to block.

    Args:
        checkpoint: an opened checkpoint.
        dtype: to compute in.
        threads: of torch while it streams and from then on; None chooses by the size of the work.

    Raises:
        UsageError: a stack without a vocabulary.
        InputError: weights that do not fit the configuration or are not finite.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: FloatName = "float32", threads: int | None = None) -> None:
        if not checkpoint.config.has_vocabulary:
            raise UsageError(f"{checkpoint.path} is a stack without embedding and head", "a model with a vocabulary")
        self.name = str(checkpoint.path)
        self.description = f"{checkpoint.format} checkpoint, {dtype}"
        self.vocab_size = checkpoint.config.vocab_size
        self.tokenizer_files = tuple(checkpoint.tokenizer_files)
        self.notes = tuple(checkpoint.notes)
        self._threads = threads
        self._model = load_model(checkpoint.config, FiniteWeights(checkpoint.weights), getattr(torch, dtype))

    def stream(self, rows: Array, block: int) -> Iterator[Array]:
        """Logits after every token of the rows, from zero states and position 0.

        Args:
            rows: token ids `[B, T]`.
            block: tokens at a time.

        Yields:
            `[B, block, vocab]` float32 (float64 of a float64 model), in order; the last block may be shorter.
        """
        use_threads(self._model.config, len(rows) * min(block, rows.shape[1]), self._threads)
        states = None
        for start in range(0, rows.shape[1], block):
            ids = torch.from_numpy(rows[:, start : start + block])
            with torch.inference_mode():
                output = self._model(ids, form=retention_chunkwise, states=states, position=start)
                logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
            states = output.states
            yield logits.numpy()
