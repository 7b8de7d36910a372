"""Bulk generation: a file of prompts in, a file of answers out, resumable at any point.

Prompts are JSON lines `{"prompt": "text"}` or `{"tokens": [ids]}`, with an `id` of the caller's choice (else the row's
number). Answers are JSON lines `{"index", "id", "key", "text", "tokens", "stop_reason", "prompt_tokens"}`, or
`{"index", "id", "key", "error"}` for a row that cannot be answered.

Rows run in batches of neighbours, and random numbers belong to the row's number: what a row gets is a function of the
prompts file, the model and the options. A run that was killed is continued by running it again: a batch of which any
answer is missing runs whole, so that it computes what it would have computed, and only missing answers are written.
`key` is a hash of the row, the model and the options; an answer with another key is refused, never mixed in. The output
is locked while a run writes to it. Errors are answers too; `retry_failed` takes them out first, and goes on then.

Memory: the prompts and states of one batch, and a few bytes for each answer that is there already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from retnet_tools.disk import flush
from retnet_tools.errors import InputError, OutputError, ProviderError, RetNetToolsError, UsageError
from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.inputs import MAX_DOCUMENT, open_input, parse_json
from retnet_tools.runtime.codec import Codec
from retnet_tools.runtime.decode import Stopping, generate_from
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.staging import appended_file, check_file, staged_file

DEFAULT_BATCH = 8
_BEGINNING = b'{"index": '
"""Of every answer, so that one that was cut short is told from a file of something else."""


@dataclass(frozen=True)
class BulkOptions:
    """How every row is answered, in batches of at least one."""

    stopping: Stopping
    sampling: Sampling
    batch: int = DEFAULT_BATCH
    chunk_size: int = PREFILL_CHUNK_SIZE

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch}", "at least 1")

    def digest(self, session: DecoderSession, codec: Codec) -> str:
        """A hash of everything but the prompts that decides what a row gets."""
        stopping = [self.stopping.max_tokens, sorted(self.stopping.end_ids), list(self.stopping.strings)]
        model = [session.manifest.fingerprint(), session.manifest.ops, session.manifest.opset, codec.fingerprint]
        how: list[Any] = [stopping, self.sampling.settings(), self.batch, self.chunk_size]
        if self.sampling.steps:
            how.append([_step_name(step) for step in self.sampling.steps])
        return hashlib.sha256(json.dumps([model, how]).encode()).hexdigest()


@dataclass(frozen=True)
class BulkSummary:
    """What a run did.

    Attributes:
        rows: in the prompts file.
        written: answers of this run, errors included.
        skipped: rows that were answered before.
        errors: rows among `written` that could not be answered.
        tokens: generated in this run.
    """

    rows: int
    written: int
    skipped: int
    errors: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _BulkRow:
    index: int
    line: str
    key: str


def check_bulk(prompts: Path, output: Path) -> None:
    """Check, before a model is opened, that there are prompts, and that answers can be written.

    Raises:
        InputError, UsageError, OutputError: as `generate_bulk`.
    """
    if not prompts.is_file():
        raise InputError(f"no file {prompts}", "a file of JSON lines with a prompt each")
    if output.exists() and prompts.samefile(output):
        raise UsageError(f"{output} for prompts and answers", "two files")
    check_file(output, force=True)
    if output.exists() and not os.access(output, os.W_OK):
        raise OutputError(f"cannot write {output}", "a file that can be written", "name another output")


def generate_bulk(
    session: DecoderSession,
    codec: Codec,
    prompts: Path,
    output: Path,
    options: BulkOptions,
    *,
    force: bool = False,
    retry_failed: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BulkSummary:
    """Answer every row of a file that has no answer yet.

    Args:
        force: start over, whatever answers the output holds.
        retry_failed: take rows again whose answer is an error.
        progress: called as `(what, rows done, rows in all)`.

    Raises:
        InputError: prompts that are missing or not UTF-8, an output of another kind.
        UsageError: an output of other prompts, another model or other options, or that another run writes to.
        OutputError: the output cannot be written.
        ProviderError: the device fails or has no memory; answers of the batches before stay.
    """
    began, digest = time.perf_counter(), options.digest(session, codec)
    check_bulk(prompts, output)
    written = errors = tokens = 0
    if retry_failed and output.exists() and not force:
        _forget_errors(prompts, digest, output)
    with appended_file(output) as file:
        done: dict[int, str] = {}
        size: int | None = 0
        if force:
            _check_replaced(output)
        else:
            done, _, size = _answers(output)
        total = _check(prompts, digest, done, output)
        rows = _rows(prompts, digest)
        while batch := list(islice(rows, options.batch)):
            if progress is not None:
                progress(f"{tokens} tokens", min(batch[0].index, total), total)
            if not (missing := [row for row in batch if row.index not in done]):
                continue
            answers = _answer(session, codec, batch, options)
            if size is not None:
                # What was there stays until there is something in its place.
                file.truncate(size)
                size = None
            for row in missing:
                answer = answers[row.index]
                _write(file, {"index": row.index, "id": _id(row), "key": row.key, **answer})
                written, errors = written + 1, errors + ("error" in answer)
                tokens += len(answer.get("tokens", ()))
            flush(file)
        if size is not None:
            file.truncate(size)
    return BulkSummary(total, written, total - written, errors, tokens, time.perf_counter() - began)


def _check_replaced(output: Path) -> None:
    """Check that a file that is to be written over begins as answers do, or is empty."""
    with open_input(output) as file:
        beginning = file.read(len(_BEGINNING))
    if beginning != _BEGINNING[: len(beginning)]:
        raise _no_answers(output)


def _no_answers(output: Path) -> InputError:
    return InputError(f"{output} holds something else than answers", "what generate --prompts wrote", "name another -o")


def _forget_errors(prompts: Path, digest: str, output: Path) -> None:
    """Take the answers that are errors out of the output, so that their rows, as they are now, are answered again."""
    done, failed, _ = _answers(output)
    _check(prompts, digest, {index: key for index, key in done.items() if index not in failed}, output)
    if failed:
        with staged_file(output, force=True) as partial, open_input(output) as answers, partial.open("wb") as kept:
            kept.writelines(line for line in answers if line.endswith(b"\n") and "error" not in parse_json(line))


def _answers(output: Path) -> tuple[dict[int, str], set[int], int]:
    """Key of each answer that is there, by row; rows whose answer is an error; and the bytes of all answers, without
    one that was cut short.
    """
    done: dict[int, str] = {}
    failed: set[int] = set()
    whole = 0
    with open_input(output) as file:
        while line := file.readline(MAX_DOCUMENT):
            cut = not line.endswith(b"\n")
            try:
                if cut and line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
                    raise ValueError("no beginning of an answer")
                if not cut:
                    answer = parse_json(line)
                    done[_index(answer)] = str(answer["key"])
                    if "error" in answer:
                        failed.add(_index(answer))
                    whole += len(line)
            except (ValueError, KeyError, TypeError) as error:
                raise _no_answers(output) from error
    return done, failed, whole


def _index(answer: dict[str, Any]) -> int:
    index = answer["index"]
    if type(index) is not int or index < 0:
        raise ValueError("no number of a row")
    return index


def _check(prompts: Path, digest: str, done: dict[int, str], output: Path) -> int:
    """Number of rows; every answer that is there must belong to its row."""
    count = 0
    for row in _rows(prompts, digest):
        count += 1
        if done.get(row.index, row.key) != row.key:
            raise UsageError(
                f"the answer to row {row.index} in {output} is of another prompt, model or options",
                "the run that it began with",
                "name another -o, or add --force to start over",
            )
    if any(index >= count for index in done):
        raise UsageError(f"{output} has answers past the {count} prompts", "the file that it began with")
    return count


def _rows(prompts: Path, digest: str) -> Iterator[_BulkRow]:
    """The lines of a file that are not blank."""
    try:
        with open_input(prompts) as file:
            for index, line in enumerate(_lines(prompts, file)):
                yield _BulkRow(index, line, hashlib.sha256(f"{digest}{line}".encode()).hexdigest()[:16])
    except UnicodeDecodeError as error:
        raise InputError(f"{prompts} is not UTF-8 ({error.reason})", "JSON lines in UTF-8") from error


def _lines(prompts: Path, file: IO[bytes]) -> Iterator[str]:
    """What is not blank, the ends of lines as Python reads a text."""
    encoding = "utf-8-sig"
    while line := file.readline(MAX_DOCUMENT + 1):
        if len(line) > MAX_DOCUMENT:
            raise InputError(f"{prompts} has a line of more than {MAX_DOCUMENT} bytes", "a prompt a line", "use --file")
        yield from (part for part in map(str.strip, line.decode(encoding).split("\r")) if part)
        encoding = "utf-8"


def _answer(
    session: DecoderSession, codec: Codec, batch: Sequence[_BulkRow], options: BulkOptions
) -> dict[int, dict[str, Any]]:
    """What is written for each row of a batch, by row."""
    answers: dict[int, dict[str, Any]] = {}
    good: dict[int, list[int]] = {}
    for row in batch:
        try:
            good[row.index] = _prompt(row, session, codec, options)
        except RetNetToolsError as error:
            answers[row.index] = {"error": str(error)}
    return answers | (_run(session, codec, good, options) if good else {})


def _run(
    session: DecoderSession, codec: Codec, prompts: Mapping[int, list[int]], options: BulkOptions
) -> dict[int, dict[str, Any]]:
    """The answers to prompts, by row; an error for a row that has none."""
    sequences = Sequences.start(session, len(prompts), options.sampling, rows=list(prompts))
    try:
        result = generate_from(
            sequences, list(prompts.values()), options.stopping, codec=codec, chunk_size=options.chunk_size
        )
    except ProviderError:
        # The device fails, not a row: what is answered stays, and the run can be continued.
        raise
    except RetNetToolsError as error:
        if len(prompts) == 1:
            return {index: {"error": str(error)} for index in prompts}
        # One of them cannot be answered; alone it shows which.
        alone = (_run(session, codec, {index: tokens}, options) for index, tokens in prompts.items())
        return {index: answer for answers in alone for index, answer in answers.items()}
    return {
        index: dataclasses.asdict(generation) | {"prompt_tokens": len(prompts[index])}
        for index, generation in zip(prompts, result.rows, strict=True)
    }


def _prompt(row: _BulkRow, session: DecoderSession, codec: Codec, options: BulkOptions) -> list[int]:
    """The token ids of a row; an error for a line that is no prompt, or none that the model takes."""
    try:
        document = parse_json(row.line)
    except ValueError as error:
        raise InputError(f"row {row.index} is not JSON ({error})", 'an object with a "prompt"') from error
    prompt = document.get("prompt") if isinstance(document, dict) else None
    tokens = document.get("tokens") if isinstance(document, dict) else None
    if isinstance(prompt, str) and tokens is None:
        tokens = codec.encode(prompt)
    elif not isinstance(tokens, list) or prompt is not None or not all(type(token) is int for token in tokens):
        raise InputError(f"row {row.index} has no prompt", 'a "prompt" of text, or "tokens" of integers')
    session.check_prompt(tokens)
    if len(tokens) + options.stopping.max_tokens > MAX_POSITION + 1:
        raise UsageError(f"{len(tokens)} tokens in row {row.index}", f"at most {MAX_POSITION + 1} with those to come")
    return tokens


def _id(row: _BulkRow) -> Any:
    """The id that a row has, or its number where it has none that JSON can hold."""
    try:
        document = parse_json(row.line)
        found = document.get("id", row.index) if isinstance(document, dict) else row.index
        json.dumps({"id": found})
    except (ValueError, RecursionError):
        return row.index
    return found


def _step_name(step: Any) -> str:
    """What tells a sampling step from another, in every process."""
    if isinstance(step, partial):
        return f"{_step_name(step.func)} {step.args} {step.keywords}"
    return f"{step.__module__}.{step.__qualname__}"


def _write(file: IO[bytes], document: dict[str, Any]) -> None:
    # Half a surrogate pair has no UTF-8; its backslash form is its JSON form too.
    file.write((json.dumps(document, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
