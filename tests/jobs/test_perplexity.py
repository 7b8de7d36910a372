"""How `perplexity` opens the two models that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retnet_tools.evaluate import logits
from retnet_tools.jobs.perplexity import PerplexityRequest, perplexity
from retnet_tools.runtime.providers import Device
from tests.exports import export
from tests.helpers import BASE, random_source


class OpenedError(Exception):
    """Both are opened."""


@pytest.mark.parametrize(("against", "place"), [("export", "cuda"), ("checkpoint", "cpu")])
def test_both_models_get_what_was_asked_for(
    against: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint runs in torch, on the CPU, whatever device the exports have."""
    export(BASE, random_source(BASE, 1), tmp_path / "export")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "text").write_text("1 2 3")
    opened: list[tuple[Any, ...]] = []

    def note(source: Any, *given: Any, **named: Any) -> None:
        opened.append((source.path.name, *given, named))
        if len(opened) == 2:
            raise OpenedError

    monkeypatch.setattr(logits, "open_logits", note)
    asked: dict[str, Any] = {"dtype": "half", "device": "cuda", "threads": 3, "no_cuda_graph": True}
    with pytest.raises(OpenedError):
        perplexity(PerplexityRequest(tmp_path / "export", tmp_path / "text", against=tmp_path / against, **asked))
    assert opened == [
        ("export", Device("cuda"), 3, "float16", {"cuda_graph": False}),
        (against, Device(place), 3, {"cuda_graph": False}),
    ]
