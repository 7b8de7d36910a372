"""A sampling step of one's own: a function in the list, which every way of generating then uses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.runtime import Sampling, generate
from retnet_tools.runtime.bulk import BulkOptions, generate_bulk
from retnet_tools.runtime.codec import IdCodec
from retnet_tools.runtime.decode import Stopping
from retnet_tools.runtime.decoder import Decoder
from retnet_tools.runtime.sampling import Candidates, Sampler
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state_file import capture, read_state, write_state
from tests.exports import export
from tests.helpers import BASE, random_source


def without(candidates: Candidates, banned: tuple[int, ...]) -> Candidates:
    """Tokens that must not come."""
    return candidates.keep(~np.isin(candidates.ids, banned))


def only_new(candidates: Candidates) -> Candidates:
    """Tokens that the sequence does not hold yet."""
    return candidates.keep(~candidates.seen[candidates.ids])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    return DecoderSession(export(BASE, random_source(BASE, 21), tmp_path_factory.mktemp("step") / "out"), threads=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_bans_tokens(temperature: float, session: DecoderSession) -> None:
    plain = generate(session, [[3, 1, 4]], max_tokens=30, sampling=Sampling(temperature)).rows[0].tokens
    banned = tuple(set(plain[:5]))
    sampling = Sampling(temperature, steps=(partial(without, banned=banned),))
    tokens = generate(session, [[3, 1, 4]], max_tokens=30, sampling=sampling).rows[0].tokens
    assert len(tokens) == 30
    assert not set(tokens) & set(banned)


def test_steps_run_in_their_order_before_temperature_and_see_the_tokens_so_far(session: DecoderSession) -> None:
    order: list[str] = []

    def note(candidates: Candidates, name: str) -> Candidates:
        order.append(f"{name} {len(candidates.ids)}")
        return candidates

    steps = (partial(note, name="first"), only_new, partial(note, name="second"))
    decoder = Decoder(session, IdCodec())
    texts = "".join(decoder.stream("3 1 4", max_tokens=20, temperature=1.0, top_k=30, steps=steps)).split()
    assert order[:2] == ["first 61", "second 58"]
    assert len({"3", "1", "4", *texts}) == 3 + 20


def test_a_step_is_given_logits_that_the_repetition_penalty_has_moved() -> None:
    given: list[list[float]] = []

    def note(candidates: Candidates) -> Candidates:
        given.append(candidates.logits.tolist())
        return candidates

    sampling = Sampling(temperature=2.0, repetition_penalty=4.0, steps=(note,))
    left = sampling.candidates(np.array([2.0, 2.0, -1.0]), np.array([True, False, True]))
    assert given == [[0.5, 2.0, -4.0]]
    assert left.logits.tolist() == [-0.75, 0.0, -3.0]


def test_a_step_that_leaves_nothing_is_refused() -> None:
    sampler = Sampler.for_rows(Sampling(steps=(partial(without, banned=(0, 1)),)), [0], 2)
    with pytest.raises(UsageError, match="a sampling step that leaves no token"):
        sampler.sample(np.zeros((1, 2)))


def test_files_know_which_steps_there_were_where_they_must(session: DecoderSession, tmp_path: Path) -> None:
    """Answers to a file of prompts are told apart by them; a state is of any steps, and keeps none."""
    (tmp_path / "in.jsonl").write_text('{"tokens": [1, 2]}\n')
    banning = BulkOptions(Stopping(4), Sampling(steps=(partial(without, banned=(5,)),)))
    assert generate_bulk(session, IdCodec(), tmp_path / "in.jsonl", tmp_path / "out", banning).written == 1
    assert generate_bulk(session, IdCodec(), tmp_path / "in.jsonl", tmp_path / "out", banning).skipped == 1
    other = BulkOptions(Stopping(4), Sampling(steps=(partial(without, banned=(6,)),)))
    with pytest.raises(UsageError, match="another prompt, model or options"):
        generate_bulk(session, IdCodec(), tmp_path / "in.jsonl", tmp_path / "out", other)
    sequences = Sequences.start(session, 1, other.sampling)
    sequences.feed([[1, 2]])
    write_state(tmp_path / "state", capture(sequences))
    assert read_state(tmp_path / "state").sampling == Sampling()
