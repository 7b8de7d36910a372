"""Pickles made to run something, to fill memory or to take for ever, and mutations of real ones."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles

MAKES = ("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "copyreg", "mention", "partial", "BUILD")
STATE = {"layers.0.weight": torch.ones(2, 3), "norm": torch.zeros(3)}
ran: list[object] = []


def trap(*arguments: object) -> None:
    ran.append(arguments)


class Trap:
    def __init__(self, *arguments: object) -> None:
        trap(arguments)

    def __setstate__(self, state: object) -> None:
        trap(state)


def made(name: str, how: str) -> bytes:
    """Operations that make something of a global and the text "sentinel"."""
    text = b"X\x08\x00\x00\x00sentinel"
    lines = name.replace(" ", "\n").encode() + b"\n"
    found = b"c" + lines
    return {
        "REDUCE": found + text + b"\x85R",
        "OBJ": b"(" + found + text + b"o",
        "INST": b"(" + text + b"i" + lines,
        "NEWOBJ": found + text + b"\x85\x81",
        "NEWOBJ_EX": found + text + b"\x85}\x92",
        "copyreg": b"ccopyreg\n__newobj__\n" + found + text + b"\x86R",
        "mention": found,
        "partial": b"cfunctools\npartial\n" + found + b"\x85R",
        "BUILD": found + text + b"\x85\x81}" + text + b"Nsb",
    }[how]


@cache
def real_file(kind: str) -> bytes:
    tree = {
        "plain": STATE,
        "trainer": {
            "model": STATE,
            "args": argparse.Namespace(a=[1, {2}]),
            "rng": np.random.RandomState(0).get_state(),
        },
        "module": torch.nn.Linear(2, 3),
    }[kind]
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def write(file: Path, kind: str, before: bytes = b"", pickle: bytes | None = None) -> Path:
    """A real file with operations added at the start of its pickle, or with another pickle."""
    with zipfile.ZipFile(io.BytesIO(real_file(kind))) as source, zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = data[:2] + before + data[2:] if pickle is None else pickle
            archive.writestr(name, data)
    return file


def open_all(file: Path) -> list[str]:
    files = CheckpointFiles(file)
    names = list(files.tensors.names())
    for name in names:
        files.tensors.read(name)
    assert isinstance(files.embedded, dict)
    return names


@pytest.mark.parametrize("how", MAKES)
@pytest.mark.parametrize(
    "name",
    [
        *("os system", "posix system", "nt system", "subprocess Popen", "sys exit", "runpy run_path", "socket socket"),
        *(
            "importlib import_module",
            "shutil rmtree",
            "pickle loads",
            "webbrowser open",
            "ctypes CDLL",
            "code interact",
        ),
        *("builtins eval", "builtins exec", "builtins open", "builtins __import__", "builtins globals", "builtins map"),
        *("__builtin__ execfile", "builtins setattr", "builtins compile", "builtins print", "builtins input"),
    ],
)
def test_what_can_only_be_meant_to_run_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    file = write(tmp_path / "model.pt", "plain", made(name, how) + b"0")
    wanted = name.replace("__builtin__", "builtins").replace(" ", r"\.")
    with pytest.raises(InputError, match=rf"refused pickle global '{wanted}' in model\.pt") as caught:
        open_all(file)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    "name",
    [
        *("torch.hub load", "torch load", "numpy load", "functools reduce", "operator methodcaller", "types CodeType"),
        *("fairseq.utils import_user_module", "transformers.trainer run", "pathlib Path.write_text", "io open"),
        *(
            "torch._utils _import_dotted_name",
            "logging.config fileConfig",
            "zipfile ZipFile",
            "bdb Bdb",
            "getpass getuser",
        ),
        *(
            "torch.utils.data DataLoader",
            "torch.jit._serialization load",
            "numpy.testing runstring",
            "posixpath exists",
        ),
        *("builtins getattr",),
    ],
)
def test_a_call_that_is_in_no_table_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "model.pt", "plain", made(name, "REDUCE") + b"0")
    with pytest.raises(InputError, match="refused pickle global '" + name.replace(" ", r"\.") + "'"):
        open_all(file)


@pytest.mark.parametrize(
    "how", ["REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "copyreg", "mention", "partial", "BUILD"]
)
def test_an_unknown_class_is_read_over_and_nothing_of_it_runs(tmp_path: Path, how: str) -> None:
    for name in (f"{__name__} Trap", "a_package_that_is_not_there Class", "json.tool Class"):
        if how == "REDUCE" and name.startswith("json"):
            continue
        file = write(tmp_path / "model.pt", "plain", made(name, how) + b"0")
        assert open_all(file) == list(STATE)
    assert ran == []
    assert "json.tool" not in sys.modules


def test_attributes_of_functions_are_not_reached(tmp_path: Path) -> None:
    text = b"X\x07\x00\x00\x00connect"
    for owner in (b"csqlite3\nConnection\n", b"ca.b\nClass\n", b"cbuiltins\ndict\n", b"N"):
        file = write(tmp_path / "model.pt", "plain", b"cbuiltins\ngetattr\n" + owner + text + b"\x86R0")
        with pytest.raises(InputError, match="refused pickle global"):
            open_all(file)


def doubled(start: bytes, times: int) -> bytes:
    """A value of two references to a value of two references to ... `times` deep, in memo 1."""
    return start + b"q\x01" + b"0h\x01h\x01\x86q\x01" * times


@pytest.mark.parametrize(
    "operations",
    [
        b"}" + doubled(b")", 200) + b"Ns0",  # a key that takes 2^200 steps to hash
        b"\x8f(" + doubled(b")", 200) + b"\x900",
        b"](" + doubled(b")", 200) + b"e0",
        b"ccollections\nCounter\n}q\x02" + doubled(b")", 200) + b"Ns\x85R0",
        b"N" + b"(" * 5000 + b"t" * 5000 + b"00",
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_would_take_for_ever_elsewhere_is_read_over(tmp_path: Path, operations: bytes) -> None:
    file = write(tmp_path / "model.pt", "plain", operations)
    start = time.process_time()
    assert open_all(file) == list(STATE)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("operations", [b"}(NK\x01NK\x02u0", b"}NK\x01sNK\x02s0", b"(NK\x01NK\x02d0"])
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, operations: bytes) -> None:
    with pytest.raises(InputError, match="a name twice"):
        open_all(write(tmp_path / "model.pt", "plain", operations))


def test_trees_that_refer_to_themselves_many_times_over(tmp_path: Path) -> None:
    """Mappings of mappings of mappings: 2^60 paths, of which each mapping is visited once."""
    tree: dict[str, object] = {"model": STATE}
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    torch.save({"deep": tree, "net": STATE}, tmp_path / "model.pt")
    start = time.process_time()
    assert open_all(tmp_path / "model.pt") == list(STATE)
    assert time.process_time() - start < 2


def test_many_state_dicts_take_little_time(tmp_path: Path) -> None:
    weights = [torch.ones(1, 2) for _ in range(100)]
    torch.save(
        {"a": {f"{i}": {"w": weights[i % 100]} for i in range(30_000)}, "b": {"net": STATE}}, tmp_path / "model.pt"
    )
    start = time.process_time()
    with pytest.raises(InputError, match="several sets of weights"):
        open_all(tmp_path / "model.pt")
    assert time.process_time() - start < 2


def mutations() -> st.SearchStrategy[list[tuple[str, float, bytes]]]:
    pieces = st.binary(min_size=1, max_size=3) | st.sampled_from(
        [made(f"{__name__} {name}", how) for name in ("Trap", "trap") for how in MAKES]
        + [
            b"\x93",
            b"R",
            b"b",
            b"\x81",
            b"u",
            b"s",
            b"e",
            b"\x90",
            b"t",
            b"0",
            b"2",
            b"(",
            b"}",
            b"]",
            b"Q",
            b"h\x01",
            b"h\x05",
        ]
    )
    return st.lists(st.tuples(st.sampled_from(["replace", "insert", "delete"]), st.floats(0, 1), pieces), max_size=4)


@pytest.mark.parametrize("kind", ["plain", "trainer", "module"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_mutations_of_real_pickles_are_refused_or_read_and_run_nothing(
    tmp_path: Path, kind: str, changes: list[tuple[str, float, bytes]]
) -> None:
    with zipfile.ZipFile(io.BytesIO(real_file(kind))) as archive:
        content = bytearray(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    for what, where, piece in changes:
        at = int(where * len(content))
        content[at : at + (0 if what == "insert" else len(piece))] = b"" if what == "delete" else piece
    file = write(tmp_path / "model.pt", kind, pickle=bytes(content))
    with contextlib.suppress(InputError):
        open_all(file)
    assert ran == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_as_a_pickle(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "model.pt", "plain", pickle=b"\x80\x02" + content)
    with contextlib.suppress(InputError):
        open_all(file)
    (tmp_path / "legacy").write_bytes(b"\x80\x02" + content)
    with contextlib.suppress(InputError):
        open_all(tmp_path / "legacy")
