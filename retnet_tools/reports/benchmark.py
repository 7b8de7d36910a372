"""How fast an exported model decodes: steps timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.reports.render import print_line, result_console, result_table
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.session import DecoderSession

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class DecodeSpeed:
    """One row: `test` steps of `batch` sequences, repeated.

    Attributes:
        test: `tgN`, N generated tokens for each sequence, as llama-bench names it.
        tokens_per_second: mean over repetitions, of all sequences together.
        tokens_per_second_std: its standard deviation.
        ms_per_token_p50, ms_per_token_p99: of single steps, over all repetitions.
        bytes_per_token: what one step must move: weights once, and the states of all sequences read and written.
    """

    test: str
    device: str
    dtype: str
    ops: str
    batch: int
    threads: int | None
    tokens_per_second: float
    tokens_per_second_std: float
    ms_per_token_p50: float
    ms_per_token_p99: float
    bytes_per_token: int
    state_bytes_per_sequence: int


def measure_decode(
    folder: Path,
    device: Device,
    *,
    tokens: int,
    batches: Sequence[int],
    threads: Sequence[int | None],
    repetitions: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[DecodeSpeed]:
    """Time the step graph of an export for every batch size and thread count.

    Raises:
        UsageError: a count below 1.
        InputError, ProviderError: as `DecoderSession`.
    """
    for name, values in (("-n", [tokens]), ("-b", batches), ("-r", [repetitions])):
        if min(values, default=0) < 1:
            raise UsageError(f"{name} {min(values, default=0)}", "at least 1")
    rows: list[DecodeSpeed] = []
    total = len(threads) * len(batches)
    for count in threads:
        session = DecoderSession(folder, device, count)
        for batch in batches:
            if progress is not None:
                progress(f"batch {batch}, {count or 'all'} threads", len(rows), total)
            seconds = [_time_steps(session, batch, tokens) for _ in range(repetitions)]
            rows.append(_row(session, batch, count, tokens, np.array(seconds)))
    return rows


def benchmark_document(model: str, rows: Sequence[DecodeSpeed]) -> dict[str, Any]:
    """The JSON document of `retnet-tools bench`."""
    return {"schema_version": 1, "model": model, "rows": [asdict(row) for row in rows]}


def render_benchmark(model: str, rows: Sequence[DecodeSpeed]) -> None:
    """Print the rows."""
    console = result_console()
    print_line(console, f"{model}: {rows[0].dtype}, {rows[0].ops} operators, {rows[0].device}")
    table = result_table("test", "batch", "threads", "tokens/s", "p50 ms", "p99 ms", "MB a step", "MB state a sequence")
    for row in rows:
        table.add_row(
            row.test,
            str(row.batch),
            "all" if row.threads is None else str(row.threads),
            f"{row.tokens_per_second:.1f} ± {row.tokens_per_second_std:.1f}",
            f"{row.ms_per_token_p50:.3f}",
            f"{row.ms_per_token_p99:.3f}",
            f"{row.bytes_per_token / 1e6:.2f}",
            f"{row.state_bytes_per_sequence / 1e6:.3f}",
        )
    console.print(table)


def _time_steps(session: DecoderSession, batch: int, tokens: int) -> list[float]:
    state = session.new_state(batch)
    ids = np.random.default_rng(0).integers(0, session.manifest.config.vocab_size, (tokens + WARM_UP_STEPS, batch))
    for step in ids[:WARM_UP_STEPS]:
        session.step(step, state)
    seconds = []
    for step in ids[WARM_UP_STEPS:]:
        began = time.perf_counter()
        session.step(step, state)
        seconds.append(time.perf_counter() - began)
    return seconds


def _row(session: DecoderSession, batch: int, threads: int | None, tokens: int, seconds: Any) -> DecodeSpeed:
    manifest = session.manifest
    rates = batch * tokens / seconds.sum(axis=1)
    state_bytes = sum(value.numpy().nbytes for value in session.new_state().current)
    weights = (session.folder / WEIGHTS_FILE).stat().st_size
    return DecodeSpeed(
        test=f"tg{tokens}",
        device=session.device.kind,
        dtype=manifest.dtype,
        ops=manifest.ops,
        batch=batch,
        threads=threads,
        tokens_per_second=float(rates.mean()),
        tokens_per_second_std=float(rates.std(ddof=1)) if len(rates) > 1 else 0.0,
        ms_per_token_p50=float(np.percentile(seconds, 50) * 1e3),
        ms_per_token_p99=float(np.percentile(seconds, 99) * 1e3),
        bytes_per_token=weights + 2 * batch * state_bytes,
        state_bytes_per_sequence=state_bytes,
    )
