"""Readers of documents, for hypothesis: whole ones, of which some values are others, or gone, or there twice."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from retnet_tools.errors import RetNetToolsError
from tests.hostile.judge import MAX_BYTES, MAX_SECONDS, ceilings
from tests.hostile.material import Files, put, reader, repickled, whole
from tests.hostile.tensor_cases import SIZES
from tests.trials.fuzz_bytes import check_refusal

Change = tuple[int, str, Any]
_NUMBERS = (0, -1, 1, 2, 255, 1 << 31, 1 << 62, (1 << 63) - 1, -(1 << 63), 1 << 64, 10**40, 1e-320, 1e308, 0.5, -0.0)
_WORDS = (
    "",
    "a",
    "float32",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "\x1b[31m",
    "x" * 300,
    "None",
    "1",
    "NaN",
    "bfloat16",
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(_NUMBERS)
    | st.sampled_from(_WORDS)
    | st.integers()
    | st.text(max_size=9)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.sampled_from(["set", "remove", "copy", "swap", "add"]), VALUES), max_size=4
)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container of a document with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting and len(found) < 5000:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        for key in keys:
            found.append((inside, key))
            waiting.append(inside[key])
    return found


def changed(content: Any, changes: list[Change]) -> Any:
    """A document with some changes at places that they draw."""
    for draw, how, value in changes:
        places = _places(content)
        if not places:
            return value
        owner, key = places[draw % len(places)]
        other, at = places[(draw // 7) % len(places)]
        if how == "set":
            owner[key] = value
        elif how == "remove":
            del owner[key]
        elif how == "add" and isinstance(owner, dict):
            owner[str(value)[:20]] = value
        elif how == "copy":
            owner[key] = json.loads(json.dumps(other[at]))
        elif how == "swap":
            owner[key], other[at] = other[at], owner[key]
    return content


def _document(kind: str, file: str) -> Callable[[list[Change]], Files]:
    def make(changes: list[Change]) -> Files:
        files = whole(kind)
        files[file] = json.dumps(changed(json.loads(files[file]), changes)).encode()
        return files

    return make


def _lines(kind: str, file: str) -> Callable[[list[Change]], Files]:
    def make(changes: list[Change]) -> Files:
        files = whole(kind)
        rows = changed([json.loads(line) for line in files[file].splitlines()], changes)
        lines = rows if isinstance(rows, list) else [rows]
        files[file] = b"".join(json.dumps(row).encode() + b"\n" for row in lines)
        return files

    return make


def _state(changes: list[Change]) -> Files:
    """The documents in the metadata of a state file."""
    files = whole("state")
    data, length = files["a.state"], int.from_bytes(files["a.state"][:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = {}
    for key, text in header["__metadata__"].items():
        inner[key] = json.loads(text) if text[:1] in "[{" else text
    found = changed({"header": header, "inner": inner}, changes)
    found = found if isinstance(found, dict) else {}
    inner, header = found.get("inner", inner), found.get("header", header)
    if isinstance(inner, dict) and isinstance(header, dict):
        header["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in inner.items()}
    text = json.dumps(header).encode()
    files["a.state"] = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return files


def _metadata(changes: list[Change]) -> Files:
    """The fields of DCP's objects."""

    def change(metadata: Any) -> None:
        objects = [metadata, *metadata.state_dict_metadata.values(), *metadata.storage_data.values()]
        objects += [chunk for tensor in metadata.state_dict_metadata.values() for chunk in tensor.chunks]
        for draw, how, value in changes:
            owner = objects[draw % len(objects)]
            names = sorted(vars(owner))
            name = names[(draw // 7) % len(names)]
            if how == "remove":
                object.__delattr__(owner, name)
                return
            picked = vars(objects[(draw // 11) % len(objects)]).get(name, value) if how in ("copy", "swap") else value
            object.__setattr__(owner, name, tuple(picked) if isinstance(picked, list) else picked)

    files = whole("dcp")
    files[".metadata"] = repickled(files[".metadata"], change)
    return files


DOCUMENTS: dict[str, tuple[str, Callable[[list[Change]], Files]]] = {
    **{f"config {layout}": (f"config {layout}", _document(f"config {layout}", "config.json")) for layout in SIZES},
    "args": ("zip", _document("zip", "args.json")),
    "index": ("shards", _document("shards", "model.safetensors.index.json")),
    "dcp objects": ("dcp", _metadata),
    "retnet.json": ("export", _document("export", "retnet.json")),
    "doctor": ("doctor", _document("doctor", "retnet.json")),
    "state metadata": ("state", _state),
    "generation config": ("tokenizer", _document("tokenizer", "generation_config.json")),
    "tokenizer config": ("tokenizer", _document("tokenizer", "tokenizer_config.json")),
    "tokenizer document": ("tokenizer", _document("tokenizer", "tokenizer.json")),
    "vocabulary": ("byte-level", _document("byte-level", "vocab.json")),
    "added tokens": ("pieces", _document("pieces", "added_tokens.json")),
    "rows": ("rows", _lines("rows", "prompts.jsonl")),
    "answers": ("answers", _lines("answers", "out.jsonl")),
}
"""By name: the kind of the files, and how they are made of changes."""


def run_changes(name: str, changes: list[Change]) -> None:
    """Read what some changes make; anything but a refusal, soon and in little memory, is an error."""
    kind, make = DOCUMENTS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        put(make(changes), folder)
        with ceilings() as cost:
            try:
                reader(kind)(folder)
            except RetNetToolsError as error:
                check_refusal(error)
        assert cost.seconds < MAX_SECONDS, f"{cost.seconds:.1f} s"
        assert cost.bytes < MAX_BYTES, f"{cost.bytes >> 20} MB"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz_documents(name: str, seconds: float, start: int, examples: int = 200) -> int:
    """Let hypothesis look for changes that a reader fails on, with one seed after another; gives their number."""
    count, number, until = 0, start, time.monotonic() + seconds
    while not count or time.monotonic() < until:

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(changes=CHANGES)
        def look(changes: list[Change]) -> None:
            nonlocal count
            if count and time.monotonic() > until + MAX_SECONDS:
                return
            count += 1
            run_changes(name, changes)

        look()
        number += 1
    return count
