"""What `perplexity` reports, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from retnet_tools.console import ResultTable, print_line, result_console
from retnet_tools.evaluate.estimates import INDEPENDENCE, Divergence, Estimate
from retnet_tools.evaluate.perplexity import Perplexity, PerplexityReport
from retnet_tools.evaluate.positions import CONFIDENCE, LEAST_CLUSTERS, ByPosition, PositionBin, Trend
from retnet_tools.jobs.perplexity import PerplexityResult

SCHEMA_VERSION = 1
_SHOWN_KLD = {1.0: "Maximum KLD", 0.999: "99.9% KLD", 0.99: "99% KLD", 0.9: "90% KLD", 0.5: "Median KLD"}


def perplexity_document(result: PerplexityResult) -> dict[str, Any]:
    """The JSON document of `retnet-tools perplexity`; nats unless a name says bits, probabilities as parts of 1."""
    report = result.report
    return {
        "schema_version": SCHEMA_VERSION,
        "request": result.request.to_dict(),
        "model": {"name": report.name, "description": report.description, **_perplexity_fields(report.model)},
        "baseline": None
        if report.baseline is None
        else {
            "name": report.baseline_name,
            "description": report.baseline_description,
            **_perplexity_fields(report.baseline),
        },
        "text": {
            "tokens": report.text_tokens,
            "scored_tokens": report.scored_tokens,
            "scored_bytes": report.scored_bytes,
        },
        "context": report.context,
        "stride": report.stride,
        "rows": report.rows,
        "divergence": None if report.divergence is None else divergence_fields(report.divergence),
        "by_position": None if report.by_position is None else _position_fields(report.by_position),
        "tokens_per_second": report.tokens_per_second,
        "notes": [INDEPENDENCE, *report.notes],
    }


def divergence_fields(d: Divergence) -> dict[str, Any]:
    """A divergence as JSON, for this document and for a model's card."""
    return {
        "mean_kld": asdict(d.mean_kld),
        "median_kld": d.median_kld,
        "kld_quantiles": _quantile_fields(d.kld),
        "mean_delta_p": asdict(d.mean_delta_p),
        "rms_delta_p": asdict(d.rms_delta_p),
        "delta_p_quantiles": _quantile_fields(d.delta_p),
        "same_top_p": asdict(d.same_top),
        "mean_ln_ppl_ratio": asdict(d.log_ppl_ratio),
        "mean_ppl_ratio": asdict(d.ppl_ratio),
        "mean_ppl_difference": asdict(d.ppl_difference),
        "ln_ppl_correlation": d.correlation,
    }


def render_perplexity(report: PerplexityReport) -> None:
    """Print what `retnet-tools perplexity` found, under the names of llama-perplexity."""
    console = result_console()
    print_line(console, f"{report.name}: {report.description}")
    if report.baseline_name is not None:
        print_line(console, f"against {report.baseline_name}: {report.baseline_description}")
    size = "" if report.scored_bytes is None else f" ({report.scored_bytes:,} bytes)"
    print_line(
        console,
        f"{report.text_tokens:,} tokens, {report.scored_tokens:,} scored{size}; context {report.context}, "
        f"stride {report.stride}, {report.rows} row{'' if report.rows == 1 else 's'}",
    )
    console.print()
    table = ResultTable("", "")
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    if report.by_position is not None:
        _render_positions(console, report.by_position)
    console.print()
    print_line(console, f"{report.tokens_per_second:.1f} tokens/s; {INDEPENDENCE}")
    for note in report.notes:
        print_line(console, f"note: {note}")


def estimate_text(estimate: Estimate, unit: str = "") -> str:
    """A number with its standard error, to two digits of the error; below 1e-3 with an exponent."""
    value, error = estimate.value, estimate.error
    if math.isfinite(value) and math.isfinite(error) and error > 0 and max(abs(value), error) >= 1e-3:
        digits = min(12, max(0, 1 - math.floor(math.log10(error))))
        return f"{value:,.{digits}f} ± {error:,.{digits}f}{unit}"
    shown = number_text(value)
    return f"{shown} ± {error:.1e}{unit}" if error > 0 else f"{shown}{unit}"


def number_text(value: float) -> str:
    """A number to four digits."""
    return f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"


def trend_text(trend: Trend) -> str:
    """Whether the error grows with the context, in one line."""
    if math.isnan(trend.slope):
        return "KLD with the context: all predictions have the same context"
    slope = f"KLD with the context: {trend.slope:+.2e} nats for each doubling"
    if trend.verdict == "unknown":
        return f"{slope}; too short a text to tell a trend ({trend.clusters} pieces, at least {LEAST_CLUSTERS} needed)"
    relative = f"{trend.slope / trend.mean:+.1%} of its mean; " if trend.mean else ""
    interval = f"{CONFIDENCE:.0%} interval {trend.low:+.2e} to {trend.high:+.2e}"
    found = {"grows": "the error grows", "shrinks": "the error shrinks"}.get(trend.verdict, trend.verdict)
    return f"{slope} ({relative}{interval}): {found}"


def _rows(report: PerplexityReport) -> Iterator[tuple[str, str]]:
    d, base = report.divergence, report.baseline
    of_model = "" if base is None else "(Q)"
    yield f"Mean PPL{of_model}", estimate_text(report.model.ppl)
    if base is not None and d is not None:
        yield "Mean PPL(base)", estimate_text(base.ppl)
        yield "Mean ln(PPL(Q)/PPL(base))", estimate_text(d.log_ppl_ratio)
        yield "Mean PPL(Q)/PPL(base)", estimate_text(d.ppl_ratio)
        yield "Mean PPL(Q)-PPL(base)", estimate_text(d.ppl_difference)
        yield "Cor(ln(PPL(Q)), ln(PPL(base)))", f"{d.correlation:.4%}"
    else:
        yield "Mean NLL", estimate_text(report.model.nll, " nats a token")
    if report.model.bits_per_byte is not None:
        yield f"Bits per byte{of_model}", estimate_text(report.model.bits_per_byte)
    if base is not None and base.bits_per_byte is not None:
        yield "Bits per byte(base)", estimate_text(base.bits_per_byte)
    if d is not None:
        yield "Mean KLD", estimate_text(d.mean_kld, " nats a token")
        yield from ((name, number_text(d.kld[fraction])) for fraction, name in _SHOWN_KLD.items())
        yield "Mean Δp", estimate_text(d.mean_delta_p.scaled(100), " %")
        yield "RMS Δp", estimate_text(d.rms_delta_p.scaled(100), " %")
        yield "Same top p", estimate_text(d.same_top.scaled(100), " %")


def _render_positions(console: Console, positions: ByPosition) -> None:
    against = positions.trend is not None
    table = ResultTable("context", "tokens", "mean NLL", *(("mean NLL(base)", "mean KLD") if against else ()))
    for bin in positions.bins:
        cells = [bin.nll] + ([bin.baseline_nll, bin.kld] if against else [])
        table.add_row(context_text(bin), f"{bin.tokens:,}", *(estimate_text(cell) for cell in cells if cell))
    console.print()
    console.print(table)
    if positions.trend is not None:
        print_line(console, trend_text(positions.trend))


def context_text(bin: PositionBin) -> str:
    """`5-8`, or one number."""
    return str(bin.first) if bin.first == bin.last else f"{bin.first}-{bin.last}"


def _perplexity_fields(p: Perplexity) -> dict[str, Any]:
    return {
        "mean_ppl": asdict(p.ppl),
        "mean_nll": asdict(p.nll),
        "bits_per_byte": None if p.bits_per_byte is None else asdict(p.bits_per_byte),
    }


def _quantile_fields(quantiles: dict[float, float]) -> dict[str, float]:
    return {f"{fraction:g}": value for fraction, value in quantiles.items()}


def _position_fields(positions: ByPosition) -> dict[str, Any]:
    trend = positions.trend
    return {
        "bins": [asdict(bin) for bin in positions.bins],
        "kld_trend": None if trend is None else {**asdict(trend), "unit": "nats a doubling", "verdict": trend.verdict},
    }
