"""An exported folder as text in, text out: a session with the codec that belongs to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, Unpack

from retnet_tools.errors import UsageError
from retnet_tools.runtime.codec import Codec, open_codec
from retnet_tools.runtime.decode import Generations, Stopping, generate_from, stream_from
from retnet_tools.runtime.providers import parse_device
from retnet_tools.runtime.sampling import Sampling, SamplingFields
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession


@dataclass(frozen=True)
class Decoder:
    """A model that continues texts: a session, and what turns text into its tokens and back.

    >>> with open_decoder("out") as decoder:
    ...     result = decoder.generate(["ROMEO. ", "To be, or not to be"], max_tokens=8, samples=2)
    ...     pieces = list(decoder.stream("ROMEO. ", max_tokens=8))
    >>> [len(row.tokens) for row in result.rows]
    [8, 8, 8, 8]
    >>> "".join(pieces) == result.rows[0].text
    True

    Attributes:
        session: runs the graphs: logits `[B, vocab]` and states.
        codec: encodes prompts and decodes tokens.
    """

    session: DecoderSession
    codec: Codec

    def stream(
        self, prompt: str, *, max_tokens: int = 128, stop: Collection[str] = (), **sampling: Unpack[SamplingFields]
    ) -> Iterator[str]:
        """Continue a prompt, a piece of text at a time: a token is computed when it is asked for.

        Args:
            prompt: the text to continue.
            max_tokens: to generate at most; the model's end-of-text token ends it before.
            stop: strings to stop before.
            sampling: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed`, as `Sampling` has them;
                the most likely tokens without.

        Raises:
            UsageError: an empty prompt, a value out of range; at once.
            InputError: logits that are not finite.
        """
        sequences, stopping = self._begin(1, max_tokens, stop, sampling)
        pieces = stream_from(sequences, [self._tokens(prompt)], stopping, codec=self.codec)
        return (piece.text for piece in pieces if piece.text)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 128,
        samples: int = 1,
        stop: Collection[str] = (),
        **sampling: Unpack[SamplingFields],
    ) -> Generations:
        """Continue one prompt or a batch of them, each `samples` times: as `stream`, all at once.

        Returns:
            A row for each sample of the first prompt, then of the second, and so on, with speeds in tokens a second.
        """
        prompts = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
        sequences, stopping = self._begin(len(prompts), max_tokens, stop, sampling)
        return generate_from(sequences, list(map(self._tokens, prompts)), stopping, samples=samples, codec=self.codec)

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(
        self, batch: int, max_tokens: int, stop: Collection[str], sampling: SamplingFields
    ) -> tuple[Sequences, Stopping]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stopping = Stopping(max_tokens, self.codec.end_ids, stops)
        return Sequences.start(self.session, batch, Sampling(**sampling)), stopping

    def _tokens(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt that is {type(prompt).__name__}", "text")
        tokens = self.codec.encode(prompt)
        self.session.check_prompt(tokens)
        return tokens


def open_decoder(
    folder: Path | str,
    device: str = "cpu",
    *,
    threads: int | None = None,
    token_ids: bool = False,
    cpu_fallback: bool = False,
    cuda_graph: bool | None = None,
    prompts: bool = True,
) -> Decoder:
    """Open an exported folder.

    >>> decoder = open_decoder("out", threads=1)
    >>> text = "".join(decoder.stream("ROMEO. ", max_tokens=40, temperature=0.8, seed=3))
    >>> decoder.close()

    Args:
        folder: what `retnet-tools export` wrote.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: of the CPU; None chooses by the size of the work.
        token_ids: read and write token ids as numbers, even where the folder has a tokenizer.
        cpu_fallback: run on the CPU what cannot run on CUDA; `CpuFallbackWarning` says so then.
        cuda_graph: capture steps on CUDA and replay them; None does where it can.
        prompts: whether prompts of several tokens will come, so that there must be room for both graphs.

    Raises:
        InputError: not an exported folder, or an incomplete one.
        ProviderError: the device cannot be had, or has no room.
        UsageError: no such device, or a stack without a vocabulary.
    """
    target = parse_device(device, cpu_fallback=cpu_fallback)
    session = DecoderSession(folder, target, threads, cuda_graph=cuda_graph, prompts=prompts)
    return Decoder(session, open_codec(session.folder, session.manifest.config.vocab_size, token_ids=token_ids))
