"""What to measure: lengths, depths, batches, threads; one test for each combination."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")
WARM_UP_STEPS = 3
LEAST_FLAT_REPETITIONS = 3
"""Below, the interval of a slope says nothing."""
RETNET = "retnet"
ALTERNATIVES = ("torch", "transformer", "transformer-gqa")
"""Our torch recurrent form; a Transformer with a head of k and v for every query head; one with a quarter of them."""


@dataclass(frozen=True)
class Case:
    """One combination, named as llama-bench does: `pp512` reads a prompt, `tg128 @ d8192` generates after so many.

    Attributes:
        tokens: of each sequence.
        depth: tokens that each sequence holds before: its state or cache is placed, not computed.
        batch: sequences.
    """

    kind: Kind
    tokens: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        """Kind, tokens and depth."""
        name = f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def room(self) -> int:
        """Tokens that a sequence holds in the end, warm-up included."""
        return self.depth + self.tokens + WARM_UP_STEPS


@dataclass(frozen=True)
class BenchOptions:
    """All combinations of a run.

    Attributes:
        prompts: lengths of prompts to read; 0 reads none.
        tokens: numbers of tokens to generate; 0 generates none.
        threads: of the CPU; None leaves the choice to the runtime.
        repetitions: of every test. Tests and alternatives take turns.
        chunk_size: tokens of a prompt that RetNet reads at once.
        flat: decode at far positions too.
        cuda_graph: whether steps on CUDA are captured where they can be.
        quick: small buffers in the measurements of the machine.
        again: how many times repetitions that deviate are made again, at most.
    """

    prompts: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    repetitions: int = 5
    against: tuple[str, ...] = ()
    chunk_size: int = PREFILL_CHUNK_SIZE
    cuda_graph: bool = True
    flat: bool = False
    quick: bool = False
    again: int = 0

    def __post_init__(self) -> None:
        smallest = (("-p", self.prompts, 0), ("-n", self.tokens, 0), ("-d", self.depths, 0), ("-b", self.batches, 1))
        for name, values, least in (*smallest, ("-r", (self.repetitions,), 1), ("--chunk-size", (self.chunk_size,), 1)):
            if not values or min(values) < least:
                raise UsageError(f"{name} {min(values, default='nothing')}", f"at least {least}")
        for name in self.against:
            if name not in ALTERNATIVES:
                expected = f"any of {', '.join(ALTERNATIVES)}"
                raise UsageError(f"--against {name!r}", expected, did_you_mean(name, ALTERNATIVES))
        if self.flat and (self.repetitions < LEAST_FLAT_REPETITIONS or not max(self.tokens)):
            found = f"-r {self.repetitions} and -n {max(self.tokens)} with --flat"
            raise UsageError(found, f"at least {LEAST_FLAT_REPETITIONS} repetitions, and a token")
        if not any(self.tests(kind) for kind in KINDS):
            raise UsageError("-p 0 and -n 0: nothing to measure", "a prompt to read, or tokens to generate")
        if self.room > MAX_POSITION:
            raise UsageError(f"{self.room} tokens in a sequence", f"at most {MAX_POSITION}")

    def tests(self, kind: Kind) -> list[Case]:
        """The tests of a kind."""
        counts = self.prompts if kind == "prefill" else self.tokens
        found = product(dict.fromkeys(counts), dict.fromkeys(self.depths), dict.fromkeys(self.batches))
        return [Case(kind, count, depth, batch) for count, depth, batch in found if count]

    @property
    def copies(self) -> int:
        """How many models of one size are measured, each with weights on the disk."""
        return 1 + sum(name.startswith("transformer") for name in set(self.against))

    @property
    def room(self) -> int:
        """The longest sequence of all tests."""
        return max((test.room for kind in KINDS for test in self.tests(kind)), default=0)


QUICK = BenchOptions(prompts=(64,), tokens=(16,), repetitions=3, quick=True)
"""The options of `--quick`: the whole command in seconds on a small model."""
