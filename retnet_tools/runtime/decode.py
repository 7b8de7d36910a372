"""Generation: a prompt in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from retnet_tools.errors import UsageError
from retnet_tools.runtime.prompts import DEFAULT_CHUNK_SIZE
from retnet_tools.runtime.sampling import Sampler, Sampling
from retnet_tools.runtime.session import DecoderSession


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        tokens: without the prompt and without the token that ended the text.
        stop_reason: `end-of-text` or `length`.
        prompt_seconds: until the logits after the prompt were there.
        decode_seconds: from then to the end.
    """

    tokens: tuple[int, ...]
    stop_reason: Literal["end-of-text", "length"]
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Rate of reading the prompt."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate of generating, over the steps that were run."""
        steps = len(self.tokens) - (self.stop_reason == "length")
        return steps / self.decode_seconds if steps > 0 else 0.0


def generate(
    session: DecoderSession,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    end_ids: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Generation:
    """Continue a prompt until an end token or `max_tokens`.

    Args:
        session: an opened export.
        prompt: token ids.
        max_tokens: how many to generate at most.
        sampling: how to choose.
        end_ids: tokens that end the text; not part of the result.
        on_token: called with each token as it is chosen.
        chunk_size: tokens of the prompt to run at once.

    Raises:
        UsageError: an empty prompt, a token outside the vocabulary, or `max_tokens` or `chunk_size` below 1.
    """
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}", "at least 1")
    sampler = Sampler(sampling)
    state = session.new_state()
    if min(len(prompt), chunk_size) > 1:
        session.open_prefill()
    began = time.perf_counter()
    logits = session.prefill([prompt], state, chunk_size=chunk_size)
    prefilled = time.perf_counter()
    tokens: list[int] = []
    reason: Literal["end-of-text", "length"] = "length"
    while True:
        token = int(sampler.sample(logits)[0])
        if token in end_ids:
            reason = "end-of-text"
            break
        tokens.append(token)
        if on_token is not None:
            on_token(token)
        if len(tokens) == max_tokens:
            break
        logits = session.prefill([[token]], state)
    ended = time.perf_counter()
    return Generation(tuple(tokens), reason, len(prompt), prefilled - began, ended - prefilled)
