"""The verdict of `verify` as JUnit XML: one test case a check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from retnet_tools.staging import staged_file

if TYPE_CHECKING:
    from retnet_tools.jobs.against import AgainstResult
    from retnet_tools.jobs.verify import VerifyResult

_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SUITE = "retnet-tools verify"


class JUnitCase(NamedTuple):
    """A check: what it is about, its name, and why it failed, or None."""

    part: str
    name: str
    failure: str | None


def write_junit(result: VerifyResult | AgainstResult, target: Path, *, force: bool) -> None:
    """Write the report, whole or not at all.

    Raises:
        UsageError, OutputError: as `staged_file`.
    """
    from retnet_tools.jobs.verify import VerifyResult

    cases = list(_of_forms(result) if isinstance(result, VerifyResult) else _of_export(result))
    failures = sum(case.failure is not None for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts})
    for case in cases:
        node = ElementTree.SubElement(suite, "testcase", {"classname": f"verify.{case.part}", "name": _xml(case.name)})
        if case.failure is not None:
            ElementTree.SubElement(node, "failure", {"message": _xml(case.failure)}).text = _xml(case.failure)
    ElementTree.indent(root)
    with staged_file(target, force=force) as file:
        ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)


def _of_export(result: AgainstResult) -> Iterator[JUnitCase]:
    for check in result.checks:
        where = f" ({check.where})" if check.where else ""
        said = f"{check.measured:.6g} {check.unit}{where}, at most {check.limit:.6g}"
        yield JUnitCase(check.part, check.name, None if check.passed else said)


def _of_forms(result: VerifyResult) -> Iterator[JUnitCase]:
    report = result.report
    for pair in report.comparisons:
        said = f"{pair.run.max_abs:.6g} in logits, {pair.exceeded}"
        yield JUnitCase("forms", f"{pair.a} and {pair.b}", None if pair.passed else said)
    for handoff in report.handoffs:
        name = f"{handoff.prefix_length} tokens in {handoff.prefix_form}, continued in {handoff.continue_form}"
        said = f"{handoff.max_abs:.6g} in logits (float64, epsilon 0), at most {report.budget.logic:.6g}"
        yield JUnitCase("handoffs", name, None if handoff.passed else said)


def _xml(text: str) -> str:
    """Text without characters that XML has not."""
    return _NO_XML.sub("?", text)
