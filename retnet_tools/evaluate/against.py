"""An exported folder's graphs against their model in float64: logits and states, however tokens are fed.

The model has the weights of the folder, decoded, so that what is left is what graphs do. What is run is in
`retnet_tools.evaluate.walks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.evaluate.budget_file import Cost
from retnet_tools.evaluate.checks import Check, Expectation, worst
from retnet_tools.evaluate.graph_runs import GraphRunError, GraphRuns, Standing
from retnet_tools.evaluate.walks import FAR_LENGTHS, chunk_edges, handoff_cuts
from retnet_tools.weights import Array

AFTER_HANDOFF = 3
"""Tokens that are stepped after a prompt."""
_NOWHERE = np.iinfo(np.int64).max // 2
"""A position of padding."""


class AgainstRuns:
    """Runs the graphs, and judges each result where it comes.

    Args:
        runs: the graphs.
        state_relative: what a state may lose each time that it is written, in parts of the largest element of a head.
        state_absolute: the same of its smallest numbers, for each head.
        margin: how many times as far as the furthest copy a graph may be from the model.
        noise: which of the noises of the expectations stands for what these graphs compute with.
        written: which of them where states were written often on the way.
        suffix: of the names of the checks.

    Attributes:
        checks: what was found, by name.
        stepped: the logits of the first walk, step by step, `[1, T, vocab]`.
    """

    def __init__(
        self,
        config: RetNetConfig,
        runs: GraphRuns,
        *,
        state_relative: float,
        state_absolute: Array,
        margin: float,
        noise: int,
        written: int,
        suffix: str,
    ) -> None:
        self._config, self._runs, self._margin = config, runs, margin
        self._relative, self._absolute = state_relative, state_absolute
        self._noise, self._written, self._suffix = noise, written, suffix
        self._found: dict[str, list[Check]] = {}
        self.stepped: Array | None = None

    @property
    def checks(self) -> list[Check]:
        """The worst of each."""
        return [worst(found) for found in self._found.values()]

    def start(self, tokens: Array, expected: Expectation) -> None:
        """One row `[1, T]` from position 0."""
        length = tokens.shape[1]
        cuts, edges, zeros = handoff_cuts(length), chunk_edges(length), self._runs.zeros(1)
        stood: dict[int, Standing] = {}

        def steps() -> None:
            at, logits = zeros, []
            for n in range(length):
                found, at = self._runs.step(tokens[:, n], at)
                logits.append(found)
                self._logits("step by step", found, expected, np.array([n]), at)
                if n + 1 in (*cuts, length):
                    stood[n + 1] = at
                    self._states("step by step", at, expected, n + 1, writes=n + 1)
            self.stepped = np.stack(logits, 1)

        def chunks(name: str, edges: Sequence[int]) -> None:
            at = zeros
            for writes, (begin, end) in enumerate(pairwise([0, *edges]), start=1):
                found, at = self._runs.chunk(tokens[:, begin:end], at)
                self._logits(name, found, expected, np.array([end - 1]), at)
                self._states(name, at, expected, end, writes=writes)

        def prompt_then_steps() -> None:
            for cut in cuts:
                found, at = self._runs.chunk(tokens[:, :cut], zeros)
                self._logits("prompt, then steps", found, expected, np.array([cut - 1]), at)
                self._states("prompt, then steps", at, expected, cut, writes=1)
                for n in range(cut, min(cut + AFTER_HANDOFF, length)):
                    found, at = self._runs.step(tokens[:, n], at)
                    self._logits("prompt, then steps", found, expected, np.array([n]), at)

        def steps_then_prompt() -> None:
            for cut in cuts:
                found, at = self._runs.chunk(tokens[:, cut:], stood[cut])
                self._logits("steps, then prompt", found, expected, np.array([length - 1]), at)
                self._states("steps, then prompt", at, expected, length, writes=cut + 1)

        self._run("step by step", steps)
        self._run("in one piece", lambda: chunks("in one piece", [length]))
        self._run("in chunks", lambda: chunks("in chunks", edges))
        self._run("prompt, then steps", prompt_then_steps)
        if stood:
            self._run("steps, then prompt", steps_then_prompt)

    def far(self, tokens: Array, begin: Standing, expected: Expectation) -> None:
        """Rows `[4, T]` from states and positions of their own."""
        rows, length = tokens.shape[:2]
        lengths = np.array(FAR_LENGTHS)

        def steps() -> None:
            at = begin
            for n in range(length):
                found, at = self._runs.step(tokens[:, n], at)
                self._logits("far positions, step by step", found, expected, np.full(rows, n), at)
                if n + 1 in expected.states:
                    self._states("far positions, step by step", at, expected, n + 1, writes=n + 1)

        def piece() -> None:
            found, at = self._runs.chunk(tokens, begin)
            self._logits("far positions, in one piece", found, expected, np.full(rows, length - 1), at)
            self._states("far positions, in one piece", at, expected, length, writes=1)

        def ragged() -> None:
            name = "ragged batch"
            found, at = self._runs.chunk(tokens, begin, lengths)
            self._logits(name, found, expected, lengths - 1, at)
            for row, cut in enumerate(lengths):
                self._states(name, at, expected, int(cut), writes=1, rows=[row])
            found, after = self._runs.step(tokens[np.arange(rows), lengths], at)
            self._logits(name, found, expected, lengths, after)

        def padding() -> None:
            self._padding(tokens, begin, lengths)

        self._run("far positions, step by step", steps)
        self._run("far positions, in one piece", piece)
        self._run("ragged batch", ragged)
        self._run("padding", padding)

    def _padding(self, tokens: Array, begin: Standing, lengths: Array) -> None:
        """What stands in padding changes nothing, and a row of padding alone keeps its state, bit for bit."""
        filled, at = self._runs.chunk(tokens, begin, lengths)
        other, at_other = self._runs.chunk(tokens, begin, lengths, blank=True)
        pairs = [(filled, other), *zip(at.states, at_other.states, strict=True)]
        apart = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
        self._add(Check("graphs", "padding changes nothing", apart, 0, "numbers"))
        if not self._runs.is_genai:
            _, kept = self._runs.chunk(tokens, begin, np.array([0, *lengths[1:]]), blank=True)
            pairs = [(a[:1], b[:1]) for a, b in zip(begin.states, kept.states, strict=True)]
            apart = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
            self._add(Check("graphs", "padding alone keeps the state", apart, 0, "numbers"))

    def _run(self, name: str, run: Callable[[], None]) -> None:
        """Run, and take a graph that does not for one that fails."""
        try:
            run()
        except GraphRunError as error:
            self._add(Check("graphs", f"{name}: runs", np.inf, 0, "failures", str(error)[:200]))

    def _logits(self, name: str, found: Array, expected: Expectation, places: Array, at: Standing) -> None:
        """Logits `[B, vocab]` of the tokens `places` `[B]`, after which the rows stand `at`."""
        for row, n in enumerate(places):
            own = expected.logits[row, n]
            limit = self._margin * float(expected.logits_apart[self._noise_of(name)][row, n])
            apart = float(np.abs(found[row] - own).max())
            where = f"row {row}, position {at.position[row] - 1}"
            self._add(Check("graphs", f"{name}: logits", apart, limit, "logits", where))
            if self._config.has_vocabulary:
                best, chosen = int(own.argmax()), int(found[row].argmax())
                margin = float(own[best] - own[chosen])
                self._add(Check("graphs", f"{name}: top 1", margin, 2 * limit, "margin of a flip", where))

    def _states(
        self,
        name: str,
        at: Standing,
        expected: Expectation,
        cut: int,
        *,
        writes: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        """States after `cut` tokens, which were written so many times."""
        for layer, found in enumerate(self._runs.sums(at)):
            own, allowed = expected.states[cut][layer], expected.states_apart[cut][layer][self._noise_of(name)]
            for row in range(len(own)) if rows is None else rows:
                largest = np.abs(own[row]).max((1, 2))
                unit = np.where(largest > 0, largest, 1.0)
                apart = np.abs(found[row] - own[row]).max((1, 2)) / unit
                written = writes * (self._relative * largest + self._absolute)
                limit = (self._margin * allowed[row] + written) / unit
                for head, figures in enumerate(zip(apart.tolist(), limit.tolist(), strict=True)):
                    where = f"layer {layer}, head {head}, row {row}, position {at.position[row] - 1}"
                    self._add(Check("graphs", f"{name}: states", *figures, "of the largest", where))

    def _noise_of(self, name: str) -> int:
        """In one piece a state is written once, when all is done."""
        return self._noise if name.endswith("in one piece") else self._written

    def _add(self, check: Check) -> None:
        name = f"{check.name}{self._suffix}"
        self._found.setdefault(name, []).append(
            Check(check.part, name, check.measured, check.limit, check.unit, check.where)
        )


def cost_checks(base: Array, found: Array, cost: Cost) -> list[Check]:
    """What types and quantization cost: logits `[1, T, vocab]` of the export against the checkpoint's in float64.

    A top 1 that changes is a near-tie where the checkpoint's margin between both tokens is within twice what the type
    may move a logit, and a real flip elsewhere.
    """
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (base, found))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    lost = np.sqrt(np.square(base - found).mean() / (np.square(base).mean() or 1.0))
    best, chosen = base.argmax(-1), found.argmax(-1)
    margins = base.max(-1) - np.take_along_axis(base, chosen[..., None], -1)[..., 0]
    real = margins > 2 * cost.logits * np.abs(base).max(-1)
    near = int(((best != chosen) & ~real).sum())
    count, at = kl.size, f"worst at position {int(kl.argmax())}"
    return [
        Check("cost", "mean KL divergence", float(kl.mean()), cost.mean_kl, "nats", at, count),
        Check("cost", "logits", float(lost), cost.logits, "of logits, rms", "", count),
        Check("cost", "top 1", float(real.mean()), cost.flips, "real flips a token", f"{near} near-ties", count),
    ]


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
