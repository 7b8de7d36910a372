"""Bulk generation: every row answered once and as it would be alone, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.runtime import bulk
from retnet_tools.runtime.bulk import BulkOptions, BulkSummary, generate_bulk
from retnet_tools.runtime.codec import IdCodec
from retnet_tools.runtime.decode import Stopping, generate, generate_from
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.staging import appended_file
from tests.exports import export
from tests.helpers import BASE, random_source

SAMPLED = BulkOptions(Stopping(9, {7}), Sampling(1.1, seed=2), batch=4)
GREEDY = BulkOptions(Stopping(9), Sampling(), batch=4)
FIXTURE = Path(__file__).parents[2] / "fixtures" / "shakespeare"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    out = export(BASE, random_source(BASE, seed=71), tmp_path_factory.mktemp("bulk") / "out")
    return DecoderSession(out, threads=1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """22 prompts of 1 to 15 tokens."""
    rng = np.random.default_rng(72)
    rows = [{"id": f"row-{i}", "tokens": rng.integers(0, 61, rng.integers(1, 16)).tolist()} for i in range(22)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(session: DecoderSession, prompts: Path, out: Path, options: BulkOptions = SAMPLED, **more: bool) -> BulkSummary:
    return generate_bulk(session, IdCodec(), prompts, out, options, **more)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_gets_what_it_would_get_alone(session: DecoderSession, prompts: Path, tmp_path: Path) -> None:
    summary = run(session, prompts, tmp_path / "out.jsonl", GREEDY)
    answers = read(tmp_path / "out.jsonl")
    assert (summary.rows, summary.written, summary.skipped, summary.errors) == (22, 22, 0, 0)
    assert summary.tokens == sum(len(answer["tokens"]) for answer in answers)
    for i, (answer, row) in enumerate(zip(answers, read(prompts), strict=True)):
        alone = generate(session, [row["tokens"]], max_tokens=9, codec=IdCodec()).rows[0]
        assert (answer["index"], answer["id"]) == (i, row["id"])
        assert (answer["tokens"], answer["text"]) == (list(alone.tokens), alone.text)
        assert (answer["stop_reason"], answer["prompt_tokens"]) == ("length", len(row["tokens"]))


def test_random_numbers_belong_to_the_number_of_a_row(session: DecoderSession, prompts: Path, tmp_path: Path) -> None:
    run(session, prompts, tmp_path / "out.jsonl")
    for i, (answer, row) in enumerate(zip(read(tmp_path / "out.jsonl"), read(prompts), strict=True)):
        alone = Sequences.start(session, 1, SAMPLED.sampling, rows=[i])
        assert answer["tokens"] == list(generate_from(alone, [row["tokens"]], SAMPLED.stopping).rows[0].tokens)


@pytest.mark.parametrize("lines", [0, 1, 3, 4, 9, 21, 22])
def test_a_run_cut_anywhere_goes_on_to_the_same_answers(
    lines: int, session: DecoderSession, prompts: Path, tmp_path: Path
) -> None:
    run(session, prompts, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    part = b"".join(whole.splitlines(keepends=True)[:lines])
    for rest in (b"", b'{"index": 5, "i'):
        (tmp_path / "out.jsonl").write_bytes(part + rest)
        summary = run(session, prompts, tmp_path / "out.jsonl")
        assert (summary.written, summary.skipped) == (22 - lines, lines)
        assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_answers_of_a_batch_are_in_the_file_before_the_next_one_begins(
    session: DecoderSession, prompts: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out.jsonl", []
    generate_bulk(
        session, IdCodec(), prompts, out, GREEDY, progress=lambda what, done, total: seen.append((done, len(read(out))))
    )
    assert seen == [(n, n) for n in range(0, 22, 4)]


def test_answers_lost_from_the_middle_are_made_again(session: DecoderSession, prompts: Path, tmp_path: Path) -> None:
    run(session, prompts, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:6] + lines[7:15] + lines[20:]))
    run(session, prompts, tmp_path / "out.jsonl")
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


def test_bad_rows_are_answered_with_their_error(session: DecoderSession, tmp_path: Path) -> None:
    lines = [
        '{"tokens": [1, 2]}',
        '{"tokens": [1, 2',
        '{"prompt": "4 5", "id": "x"}',
        '{"prompt": "four", "id": {"n": 3}}',
        "",
        '{"tokens": [61]}',
        '{"tokens": []}',
        '{"tokens": [1], "prompt": "1"}',
        '{"text": "1"}',
        "[1]",
        '{"tokens": [true]}',
        '{"tokens": [99999999999999999999]}',
        '{"tokens": [3]}',
        "[" * 100_000,
        '{"prompt": "\\ud800", "id": "\\ud800"}',
        '{"tokens": [5], "id": NaN}',
        '{"tokens": [5], "id": 1e999}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    summary = run(session, tmp_path / "in.jsonl", tmp_path / "out.jsonl", GREEDY)
    answers = read(tmp_path / "out.jsonl")
    assert [answer["index"] for answer in answers] == list(range(16))
    assert (summary.rows, summary.errors) == (16, 13)
    assert [i for i, answer in enumerate(answers) if "error" not in answer] == [0, 2, 11]
    assert [answers[i]["id"] for i in (2, 3, 13, 14, 15)] == ["x", {"n": 3}, "\ud800", 14, 15]
    for index, message in {1: "not JSON", 3: "'four'", 4: "token id 61", 5: "an empty prompt", 7: "no prompt"}.items():
        assert message in answers[index]["error"]
    assert run(session, tmp_path / "in.jsonl", tmp_path / "out.jsonl", GREEDY).written == 0


def test_a_row_that_fails_while_it_runs_does_not_take_its_batch_along(
    session: DecoderSession, prompts: Path, tmp_path: Path, monkeypatch
) -> None:
    bad, real = tuple(read(prompts)[5]["tokens"]), bulk.generate_from

    def fail(sequences, rows, *arguments, **options):
        if any(tuple(row) == bad for row in rows):
            raise InputError("logits that are not finite")
        return real(sequences, rows, *arguments, **options)

    monkeypatch.setattr(bulk, "generate_from", fail)
    summary = run(session, prompts, tmp_path / "out.jsonl", GREEDY)
    answers = read(tmp_path / "out.jsonl")
    assert summary.errors == 1
    assert [answer["index"] for answer in answers if "error" in answer] == [5]
    assert all(len(answer["tokens"]) == 9 for answer in answers if "error" not in answer)


def test_a_device_that_fails_ends_the_run_and_the_next_one_goes_on(
    session: DecoderSession, prompts: Path, tmp_path: Path, monkeypatch
) -> None:
    run(session, prompts, tmp_path / "whole.jsonl")
    bad, real = tuple(read(prompts)[9]["tokens"]), bulk.generate_from

    def fail(sequences, rows, *arguments, **options):
        if any(tuple(row) == bad for row in rows):
            raise ProviderError("a run of 4 x 1 tokens needs more memory")
        return real(sequences, rows, *arguments, **options)

    monkeypatch.setattr(bulk, "generate_from", fail)
    with pytest.raises(ProviderError, match="needs more memory"):
        run(session, prompts, tmp_path / "out.jsonl")
    assert [answer["index"] for answer in read(tmp_path / "out.jsonl")] == list(range(8))
    monkeypatch.setattr(bulk, "generate_from", real)
    run(session, prompts, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_that_failed_are_retried_alone_and_become_what_they_would_have_been(
    session: DecoderSession, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(session, prompts, whole)
    answers = whole.read_bytes().splitlines(keepends=True)
    failed = (2, 9, 10)
    lines = [
        json.dumps({**json.loads(line), "error": "x"}).encode() + b"\n" if i in failed else line
        for i, line in enumerate(answers)
    ]
    for cut in (b"", b'{"index": 3'):
        out.write_bytes(b"".join(lines) + cut)
        # An ordinary run keeps errors; one of other options is refused and changes nothing.
        assert run(session, prompts, out).written == 0
        assert out.read_bytes() == b"".join(lines)
        with pytest.raises(UsageError, match="the answer to row 0"):
            run(session, prompts, out, GREEDY, retry_failed=True)
        assert out.read_bytes() == b"".join(lines)
        summary = run(session, prompts, out, retry_failed=True)
        assert (summary.written, summary.skipped, summary.errors) == (3, 19, 0)
        assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(answers)
        assert run(session, prompts, out, retry_failed=True).written == 0
    # Killed in between, it goes on without the option too.
    out.write_bytes(b"".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(session, prompts, out, retry_failed=True)
    assert run(session, prompts, out).written == 3
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(answers)
    out.write_bytes(b"".join(lines))
    with appended_file(out), pytest.raises(UsageError, match="another process writes to"):
        run(session, prompts, out, retry_failed=True)
    assert out.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "options",
    [
        BulkOptions(Stopping(8, {7}), Sampling(1.1, seed=2), batch=4),
        BulkOptions(Stopping(9, {7}), Sampling(1.1, seed=3), batch=4),
        BulkOptions(Stopping(9, {7}), Sampling(1.1, seed=2), batch=5),
        BulkOptions(Stopping(9, {7}, ["x"]), Sampling(1.1, seed=2), batch=4),
        BulkOptions(Stopping(9, {8}), Sampling(1.1, seed=2), batch=4),
        BulkOptions(Stopping(9, {7}), Sampling(1.1, seed=2), batch=4, chunk_size=5),
    ],
)
def test_answers_of_other_options_are_never_mixed(
    options: BulkOptions, session: DecoderSession, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(session, prompts, out)
    with out.open("ab") as file:
        file.write(b'{"index": 22, "i')
    before = out.read_bytes()
    with pytest.raises(UsageError, match=r"the answer to row 0 in .* is of another prompt, model or options"):
        run(session, prompts, out, options)
    assert out.read_bytes() == before
    run(session, prompts, out, options, force=True)
    assert len(read(out)) == 22


def test_answers_of_other_operators_are_of_another_model(session: DecoderSession, tmp_path: Path) -> None:
    """They round otherwise, and a token may be another one."""
    other = DecoderSession(export(BASE, random_source(BASE, seed=71), tmp_path / "out", ops="standard"), threads=1)
    assert SAMPLED.digest(other, IdCodec()) != SAMPLED.digest(session, IdCodec())


def test_prompts_that_changed_are_noticed_and_more_at_the_end_are_answered(
    session: DecoderSession, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    whole = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(whole[:12]))
    run(session, prompts, out)
    prompts.write_text("".join(whole))
    assert run(session, prompts, out).written == 10
    prompts.write_text("".join([*whole[:3], '{"tokens": [1]}\n', *whole[4:]]))
    with pytest.raises(UsageError, match="the answer to row 3"):
        run(session, prompts, out)
    prompts.write_text("".join(whole[:5]))
    with pytest.raises(UsageError, match="answers past the 5 prompts"):
        run(session, prompts, out)


def test_files_that_cannot_be_used_are_refused(session: DecoderSession, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        run(session, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="two files"):
        run(session, prompts, prompts)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="something else than answers"):
        run(session, prompts, tmp_path / "other.jsonl")
    for text in ('{"a": 1}', "notes", '{"index": 5}\n', '{"index": 0, "key": "x"}\n{"a": 1}', "[" * 100_000 + "\n"):
        (tmp_path / "mine").write_text(text)
        with pytest.raises(InputError, match="something else than answers"):
            run(session, prompts, tmp_path / "mine")
        assert (tmp_path / "mine").read_text() == text
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        run(session, tmp_path / "latin.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UsageError, match="--batch 0"):
        BulkOptions(Stopping(1), Sampling(), batch=0)


def test_an_output_that_another_run_writes_to_is_refused(
    session: DecoderSession, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(session, prompts, out)
    before = out.read_bytes()
    with appended_file(out):
        for force in (False, True):
            with pytest.raises(UsageError, match="another process writes to"):
                run(session, prompts, out, force=force)
    assert out.read_bytes() == before
    assert run(session, prompts, out).written == 0


def test_force_keeps_what_is_there_until_there_is_an_answer_and_takes_no_file_of_another_kind(
    session: DecoderSession, prompts: Path, tmp_path: Path, monkeypatch
) -> None:
    out, thesis = tmp_path / "out.jsonl", tmp_path / "thesis.tex"
    run(session, prompts, out)
    before = out.read_bytes()
    thesis.write_text("mine")
    with pytest.raises(InputError, match="holds something else than answers"):
        run(session, prompts, thesis, force=True)
    assert thesis.read_text() == "mine"

    def fail(*arguments: object) -> None:
        raise ProviderError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_answer", fail)
        with pytest.raises(ProviderError):
            run(session, prompts, out, force=True)
    assert out.read_bytes() == before
    run(session, prompts, out, force=True)
    assert out.read_bytes() == before


@pytest.mark.slow
def test_hundreds_of_prompts_killed_again_and_again_are_each_answered_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURE)
    folder = export(checkpoint.config, checkpoint.weights, tmp_path / "out")
    for file in checkpoint.tokenizer_files:
        (folder / file.name).write_bytes(file.read_bytes())
    words = (FIXTURE / "heldout.txt").read_text(encoding="utf-8").split()
    rng = np.random.default_rng(73)
    lines = []
    for i in range(300):
        start, count = rng.integers(0, len(words) - 40), rng.integers(1, 40)
        lines.append(json.dumps({"id": f"p{i}", "prompt": " ".join(words[start : start + count])}))
    lines[150] = "{"
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "retnet_tools.cli.app", "generate", str(folder), "-n", "12", "-t", "1"]
    command += ["--temperature", "0.9", "--seed", "5", "--batch", "16", "--prompts", str(tmp_path / "in.jsonl"), "-o"]
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    out, kills = tmp_path / "killed.jsonl", 0
    for wanted in (1, 60, 150):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3
    assert out.read_bytes().count(b"\n") < 300
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    answers = read(out)
    assert [answer["index"] for answer in answers] == list(range(300))
    assert sum("error" in answer for answer in answers) == 1
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert os.path.getsize(out) > 1000
