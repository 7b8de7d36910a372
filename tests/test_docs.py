"""What docs/ says of formats is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from retnet_tools.formats import FORMATS

FORMATS_PAGE = Path(__file__).parent.parent / "docs" / "formats.md"


def test_every_layout_is_in_the_table_with_what_is_done_with_it() -> None:
    rows = {}
    for line in FORMATS_PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `([a-z][a-z-]+)` \|.*\| (\S[^|]*) \| (\S[^|]*) \|", line):
            rows[match[1]] = match[2].strip(), match[3].strip()
    assert set(rows) == {spec.name for spec in FORMATS}
    for spec in FORMATS:
        read, written = rows[spec.name]
        assert read == "yes"
        assert (spec.write is not None) == written.startswith("yes")
