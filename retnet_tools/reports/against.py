"""What `verify` reports of an exported folder and its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retnet_tools.console import ResultTable, print_line, result_console, verdict

if TYPE_CHECKING:
    from retnet_tools.evaluate.checks import Check
    from retnet_tools.jobs.against import AgainstResult

SCHEMA_VERSION = 1


def against_document(result: AgainstResult) -> dict[str, Any]:
    """The JSON document of `retnet-tools verify` with an export."""
    return {
        "schema_version": SCHEMA_VERSION,
        "request": result.request.to_dict(),
        "export": str(result.export),
        "checkpoint": str(result.checkpoint),
        "device": result.device,
        "kind": result.kind,
        "tokens": result.tokens,
        "checks": [_fields(check) for check in result.checks],
        "notes": list(result.notes),
        "passed": result.passed,
    }


def render_against(result: AgainstResult) -> None:
    """Print what was found: a line for each check, of its worst figure."""
    console = result_console()
    print_line(console, f"{result.export} ({result.kind}) against {result.checkpoint}")
    print_line(console, f"{result.tokens}, on {result.device}")
    table = ResultTable("part", "check", "worst", "limit", "unit", "result", "where", keys=2)
    for check in result.checks:
        figures = (f"{figure:.3g}" for figure in (check.measured, check.limit))
        table.add_row(check.part, check.name, *figures, check.unit, verdict(check.passed), _plain(check.where))
    console.print(table)
    for note in result.notes:
        print_line(console, note)
    failed = sum(not check.passed for check in result.checks)
    print_line(console, f"{len(result.checks) - failed} of {len(result.checks)} checks passed")
    console.print(verdict(result.passed))


def _fields(check: Check) -> dict[str, Any]:
    return {
        "part": check.part,
        "name": check.name,
        "measured": check.measured,
        "limit": check.limit,
        "unit": check.unit,
        "where": check.where,
        "figures": check.count,
        "passed": check.passed,
    }


def _plain(text: str) -> str:
    """Text in which a table takes nothing for its own markup."""
    return text.replace("[", r"\[")
