"""What `generate` reports."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retnet_tools.runtime.bulk import BulkSummary
    from retnet_tools.runtime.decode import Generations

SCHEMA_VERSION = 1


def generation_document(result: Generations) -> dict[str, Any]:
    """A generation as a JSON document: the first sample at the top, all of them in `samples`."""
    samples = [{"text": row.text, "tokens": list(row.tokens), "stop_reason": row.stop_reason} for row in result.rows]
    return {
        "schema_version": SCHEMA_VERSION,
        **samples[0],
        "prompt_tokens": result.prompt_tokens,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "tokens_per_second": result.tokens_per_second,
        "samples": samples,
    }


def generation_speed(result: Generations) -> str:
    """The speed of a generation in one line."""
    reasons = ", ".join(sorted({row.stop_reason for row in result.rows}))
    return (
        f"prompt {result.prompt_tokens} tokens, {result.prompt_tokens_per_second:.1f} tokens/s; "
        f"generated {sum(len(row.tokens) for row in result.rows)} tokens, {result.tokens_per_second:.1f} tokens/s; "
        f"stopped at {reasons}"
    )


def bulk_document(summary: BulkSummary, output: Path) -> dict[str, Any]:
    """A bulk run as a JSON document."""
    return {"schema_version": SCHEMA_VERSION, "output": str(output), **asdict(summary)}


def bulk_text(summary: BulkSummary, output: Path) -> str:
    """The same in a line."""
    rate = summary.tokens / summary.seconds if summary.seconds else 0.0
    return (
        f"{output}: {summary.written} answers written, {summary.errors} of them errors, {summary.skipped} were there; "
        f"{summary.tokens} tokens, {rate:.1f} tokens/s"
    )
