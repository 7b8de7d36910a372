"""What `verify --against` makes of graphs that are wrong in one way alone: each has to fail by its name, and no other.

The graphs are numbers made here: S_n = S_(n-1) / 2 + token and logits (S_n, -S_n, position), right but for what a test
spoils.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from retnet_tools.errors import VerificationError
from retnet_tools.evaluate.against import AgainstRuns, cost_checks
from retnet_tools.evaluate.budget_file import Cost
from retnet_tools.evaluate.checks import Check, worst
from retnet_tools.evaluate.folder_checks import check_config
from retnet_tools.evaluate.graph_runs import GraphRunError
from retnet_tools.evaluate.walks import FAR_LENGTHS, FAR_TOKENS, chunk_edges, far_positions, handoff_cuts, start_cuts
from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.jobs.against import PARTS, AgainstResult
from retnet_tools.jobs.verify_request import VerifyRequest
from retnet_tools.reports.junit import write_junit
from retnet_tools.weights import Array
from tests.helpers import ABLATIONS, BASE
from tests.reports.test_agreement import result as forms_result

LENGTH = 40


@dataclass(frozen=True)
class Stand:
    """Where rows stand, and what brought them there."""

    states: tuple[Array, ...]
    position: Array
    by: str


Spoil = Callable[[str, Stand, Array, bool], str]
"""What is wrong with a run of step or chunk, by where it begins, tokens of each row, and whether padding is blank."""


class Graphs:
    is_genai = False

    def __init__(self, spoil: Spoil) -> None:
        self._spoil = spoil

    def zeros(self, rows: int) -> Stand:
        return stand(np.zeros(rows), np.zeros(rows, dtype=np.int64))

    def sums(self, at: Stand) -> list[Array]:
        return list(at.states)

    def step(self, tokens: Array, at: Stand) -> tuple[Array, Stand]:
        return self._run("step", tokens[:, None], at, np.ones(len(tokens), dtype=np.int64), False)

    def chunk(
        self, tokens: Array, at: Stand, lengths: Array | None = None, *, blank: bool = False
    ) -> tuple[Array, Stand]:
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        return self._run("chunk", tokens, at, counts, blank)

    def _run(self, kind: str, tokens: Array, at: Stand, counts: Array, blank: bool) -> tuple[Array, Stand]:
        sums = at.states[0][:, 0, 0, 0].copy()
        for row, count in enumerate(counts):
            for token in tokens[row, :count]:
                sums[row] = sums[row] / 2 + token
        wrong = self._spoil(kind, at, counts, blank)
        if wrong == "raises":
            raise GraphRunError("no kernel")
        logits = logits_of(sums, at.position + counts - 1)
        logits[-1, 1] += {"logits": 1.0, "nan": np.nan}.get(wrong, 0.0)
        sums[-1 if wrong == "last state" else 0] += "state" in wrong
        return logits, replace(stand(sums, at.position + counts), by=kind)


def stand(sums: Array, position: Array) -> Stand:
    return Stand((sums.astype(np.float64)[:, None, None, None],), position, "start")


def logits_of(sums: Array, position: Array) -> Array:
    return np.stack([sums, -sums, position % 97], -1).astype(np.float64)


def expectation(tokens: Array, at: Stand, cuts: tuple[int, ...]) -> Any:
    graphs, logits, states = Graphs(lambda *_: ""), [], {}
    for n in range(tokens.shape[1]):
        found, at = graphs.step(tokens[:, n], at)
        logits.append(found)
        if n + 1 in cuts:
            states[n + 1] = list(at.states)
    rows, length = tokens.shape
    limits = {cut: [[np.full((rows, 1), 1e-9)]] for cut in cuts}
    return SimpleNamespace(
        logits=np.stack(logits, 1), logits_apart=[np.full((rows, length), 1e-9)], states=states, states_apart=limits
    )


def failures(spoil: Spoil, config=BASE) -> tuple[set[str], set[str]]:
    """The checks that failed, and all."""
    limits = {"state_relative": 0.0, "state_absolute": np.zeros(1), "margin": 1.0}
    judge = AgainstRuns(config, Graphs(spoil), **limits, noise=0, written=0, suffix="")
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 9, (1, LENGTH))
    judge.start(tokens, expectation(tokens, Graphs(spoil).zeros(1), start_cuts(LENGTH)))
    rows, begin = rng.integers(1, 9, (4, FAR_TOKENS)), stand(rng.standard_normal(4), far_positions())
    judge.far(rows, begin, expectation(rows, begin, (*FAR_LENGTHS, FAR_TOKENS)))
    assert judge.stepped is None or judge.stepped.shape == (1, LENGTH, 3)
    return {check.name for check in judge.checks if not check.passed}, {check.name for check in judge.checks}


WALKS = (
    *("step by step", "in one piece", "in chunks", "prompt, then steps", "steps, then prompt"),
    *("far positions, step by step", "far positions, in one piece", "ragged batch"),
)


def test_graphs_that_are_right_pass_every_check() -> None:
    failed, every = failures(lambda *_: "")
    assert failed == set()
    assert {f"{name}: {what}" for name in WALKS for what in ("logits", "states", "top 1")} <= every
    assert every >= {"padding changes nothing", "padding alone keeps the state"}


@pytest.mark.parametrize("wrong", ["logits", "nan", "state", "last state"])
@pytest.mark.parametrize(
    ("names", "where"),
    [
        ({"prompt, then steps"}, lambda kind, at, counts, blank: (kind, at.by, len(counts)) == ("step", "chunk", 1)),
        ({"steps, then prompt"}, lambda kind, at, counts, blank: (kind, at.by, len(counts)) == ("chunk", "step", 1)),
        ({"in one piece"}, lambda kind, at, counts, blank: counts.tolist() == [LENGTH]),
        (
            {"far positions, in one piece"},
            lambda kind, at, counts, blank: counts.tolist() == [FAR_TOKENS] * 4,
        ),
        (
            {"far positions, step by step"},
            lambda kind, at, counts, blank: kind == "step" and len(counts) == 4 and at.by != "chunk",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, set) else "",
)
def test_what_is_wrong_on_one_way_alone_fails_by_its_name(wrong: str, names: set[str], where: Any) -> None:
    failed, _ = failures(lambda *run: wrong if where(*run) else "")
    assert failed
    assert {name.partition(": ")[0] for name in failed} == names


@pytest.mark.parametrize("wrong", ["logits", "nan", "state", "last state"])
def test_a_ragged_batch_that_is_wrong_in_one_row_fails(wrong: str) -> None:
    failed, _ = failures(lambda kind, at, counts, blank: wrong if counts.tolist() == list(FAR_LENGTHS) else "")
    assert any(name.startswith("ragged batch") for name in failed)


def test_padding_that_changes_something_fails() -> None:
    failed, _ = failures(lambda kind, at, counts, blank: "state" if blank and 0 not in counts else "")
    assert failed == {"padding changes nothing"}
    failed, _ = failures(lambda kind, at, counts, blank: "state" if 0 in counts else "")
    assert failed == {"padding alone keeps the state"}


def test_hidden_states_that_are_no_numbers_fail_where_there_is_no_top_1() -> None:
    failed, _ = failures(lambda kind, *_: "nan" if kind == "chunk" else "", ABLATIONS["stack"])
    assert "in one piece: logits" in failed


def test_a_graph_that_does_not_run_fails() -> None:
    failed, _ = failures(lambda kind, at, counts, blank: "raises" if kind == "chunk" and len(counts) == 1 else "")
    assert failed == {
        f"{name}: runs" for name in ("in one piece", "in chunks", "prompt, then steps", "steps, then prompt")
    }


def check(measured: float = 0.5, limit: float = 1.0, part: str = "graphs", name: str = "x", where: str = "") -> Check:
    return Check(part, name, measured, limit, "logits", where)


@pytest.mark.parametrize(("measured", "limit"), [(1.01, 1.0), (np.nan, 1.0), (0.0, np.nan), (np.inf, 1.0), (1e-9, 0.0)])
def test_what_is_over_its_limit_or_no_number_fails_and_is_the_worst(measured: float, limit: float) -> None:
    bad = check(measured, limit, where="here")
    assert not bad.passed
    for others in ([check()] * 3, [check(0.0, 0.0), check(99.0, 100.0)]):
        for place in range(len(others) + 1):
            found = worst([*others[:place], bad, *others[place:]])
            assert (found.passed, found.where, found.count) == (False, "here", len(others) + 1)


def test_limits_are_reached_and_the_worst_is_by_its_own_limit() -> None:
    assert check(1.0, 1.0).passed
    assert check(0.0, 0.0).passed
    assert worst([check(5.0, 100.0), check(0.9, 1.0, where="here")]).where == "here"


def against(checks: list[Check]) -> AgainstResult:
    return AgainstResult(VerifyRequest("a", against="b"), Path("out"), Path("ckpt"), "cpu", "", "", tuple(checks), ())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("place", range(4))
def test_one_check_that_fails_fails_all_and_is_named(part: str, place: int, tmp_path: Path) -> None:
    checks = [check(name=f"healthy {n}") for n in range(3)]
    assert against(checks).passed
    against(checks).require()
    checks.insert(place, check(2.0, 1.0, part, "wrong", "layer 3"))
    result = against(checks)
    assert not result.passed
    with pytest.raises(VerificationError, match=rf"{part}, wrong: 2 logits \(layer 3\); 1 of 4 checks failed"):
        result.require()
    write_junit(result, tmp_path / "junit.xml", force=False)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("4", "1")
    (failed,) = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert (failed.get("name"), failed.get("classname")) == ("wrong", f"verify.{part}")


def test_the_check_furthest_over_its_limit_is_named() -> None:
    result = against([check(3.0, 1.0, name="less"), check(2.0, 0.1, name="most"), check(9.0, 8.0, name="least")])
    with pytest.raises(VerificationError, match="graphs, most"):
        result.require()
    with pytest.raises(VerificationError, match="weights, bytes"):
        against([*result.checks, check(1.0, 0.0, "cost"), check(1.1, 1.0, "weights", "bytes")]).require()


def test_junit_has_a_failure_for_each_comparison_and_handoff_that_failed(tmp_path: Path) -> None:
    write_junit(forms_result(), tmp_path / "junit.xml", force=False)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    failed = [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed == ["parallel and recurrent", "7 tokens in parallel, continued in recurrent"]
    assert (root.get("tests"), root.get("failures")) == ("4", "2")


def test_one_field_that_differs_is_another_configuration_but_the_clamp_is_not() -> None:
    assert check_config(BASE, BASE).passed
    clamp = replace(BASE, score_normalization=replace(BASE.score_normalization, clamp="none"))
    assert check_config(clamp, BASE).passed
    found = check_config(replace(BASE, residual_alpha=1.5), BASE)
    assert (found.passed, found.where) == (False, "residual_alpha")


def test_costs_follow_their_definitions() -> None:
    rng = np.random.default_rng(2)
    base = 3 * rng.standard_normal((1, 50, 7))
    found = base + 0.3 * rng.standard_normal(base.shape)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (base, found))
    kl, logits, top = cost_checks(base, found, Cost(1.0, 0.01, 0.0))
    assert kl.measured == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert logits.measured == pytest.approx(np.sqrt(((base - found) ** 2).mean() / (base**2).mean()))
    assert top.count == 50


def test_near_ties_are_told_from_real_flips() -> None:
    """Logits up to 10 of a type that may move each by 1 %: margins of up to 0.2 are near-ties."""
    base = np.array([[[10.0, 9.9, 0.0], [10.0, 9.81, 0.0], [10.0, 9.7, 0.0], [10.0, 0.0, 9.0]]])
    found = base[:, :, [1, 0, 2]].copy()
    found[0, 3] = base[0, 3]
    (*_, top) = cost_checks(base, found, Cost(1.0, 0.01, 0.3))
    assert (top.measured, top.where, top.passed) == (0.25, "2 near-ties", True)
    (*_, top) = cost_checks(base, found, Cost(1.0, 0.01, 0.2))
    assert not top.passed


def test_walks_cross_what_they_are_there_for() -> None:
    positions = far_positions()
    assert positions[-1] + FAR_TOKENS - 1 == MAX_POSITION
    assert all(first < p < first + FAR_TOKENS - 1 for first, p in zip(positions, (1000, 4096, 10**6), strict=False))
    for tokens in (8, 40, 64, 200, 256):
        edges, cuts = chunk_edges(tokens), handoff_cuts(tokens)
        assert edges == sorted(set(edges))
        assert (edges[0], edges[-1]) == (1, tokens)
        assert {1, tokens - 1} <= set(cuts) <= set(range(1, tokens))
        assert all({edge - 1, edge, edge + 1} & set(range(1, tokens)) <= set(cuts) for edge in edges[2:])
