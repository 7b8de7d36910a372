"""Sequences in progress: what has to be kept to go on with a text, in memory or in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.sampling import Sampler, Sampling
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.weights import Array

NO_TOKENS = hashlib.sha256(b"retnet-tools tokens").digest()
"""The hash of a sequence without tokens."""


@dataclass
class Sequences:
    """A batch of sequences in progress. Its size does not depend on how many tokens they hold.

    Attributes:
        session: the model.
        state: recurrent states and positions.
        logits: `[B, vocab]` float32 after the last token of each row; None before the first.
        token_hashes: for each row h_n = sha256(h_(n-1) + token n as 8 bytes, little-endian; an embedding as float32),
            which says whether two sequences hold the same tokens, however they were fed.
        sampler: how the next tokens are chosen, with what each row needs for it.
    """

    session: DecoderSession
    state: RecurrentState
    logits: Array | None
    token_hashes: list[bytes]
    sampler: Sampler

    @classmethod
    def start(
        cls,
        session: DecoderSession,
        batch: int = 1,
        sampling: Sampling | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> Sequences:
        """Sequences without tokens.

        Args:
            rows: the numbers of these rows in a job that runs in several batches: a row's number decides its stream of
                random numbers. None numbers them from 0.
        """
        numbers = range(batch) if rows is None else rows
        sampler = Sampler.for_rows(sampling or Sampling(), numbers, session.manifest.config.vocab_size)
        return cls(session, session.new_state(batch), None, [NO_TOKENS] * batch, sampler)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.state.batch

    def feed(self, prompts: Sequence[Any], *, chunk_size: int = PREFILL_CHUNK_SIZE) -> None:
        """Feed a prompt to each row, by chunks."""
        self.logits = self.session.prefill(prompts, self.state, chunk_size=chunk_size)
        for row, tokens in enumerate(prompts):
            self._note(row, tokens)

    def append(self, tokens: Array) -> None:
        """Feed one token to each row."""
        self.logits = self.session.step(tokens, self.state)
        for row, token in enumerate(tokens):
            self._note(row, [token])

    def sample(self, rows: Sequence[int] | None = None) -> Array:
        """The next token of each of these rows (None: all); nothing is fed."""
        if self.logits is None:
            raise UsageError("an empty prompt", "at least one token")
        return self.sampler.sample(self.logits, rows)

    def select(self, rows: Sequence[int]) -> Sequences:
        """A copy of these rows, in this order; a row that comes several times is forked (`Sampler.select`)."""
        return Sequences(
            self.session,
            self.state.select(rows),
            None if self.logits is None else self.logits[np.asarray(rows, dtype=np.int64)],
            [self.token_hashes[row] for row in rows],
            self.sampler.select(rows),
        )

    @classmethod
    def join(cls, parts: Sequence[Sequences]) -> Sequences:
        """The rows of several batches of one model as one batch; all must hold tokens."""
        first = parts[0]
        states = [np.concatenate(layer) for layer in zip(*(part.state.numpy() for part in parts), strict=True)]
        position = np.concatenate([part.state.position for part in parts])
        return cls(
            first.session,
            RecurrentState(states, position, first.session.device),
            np.concatenate([np.asarray(part.logits) for part in parts]),
            [digest for part in parts for digest in part.token_hashes],
            Sampler(
                first.sampler.sampling,
                [stream for part in parts for stream in part.sampler.streams],
                np.concatenate([part.sampler.seen for part in parts]),
            ),
        )

    def _note(self, row: int, tokens: Any) -> None:
        self.token_hashes[row] = hash_tokens(self.token_hashes[row], tokens)
        if self.session.manifest.config.has_vocabulary:
            self.sampler.observe(row, tokens)


def hash_tokens(digest: bytes, tokens: Iterable[Any]) -> bytes:
    """The hash of a sequence whose hash was `digest`, after these token ids or embeddings `[D]`."""
    for token in tokens:
        data = np.asarray(token, "<f4").tobytes() if np.ndim(token) else int(token).to_bytes(8, "little")
        digest = hashlib.sha256(digest + data).digest()
    return digest
