"""Whole files of every kind that is read, to be made hostile, and their readers."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from tokenizers import ByteLevelBPETokenizer

from retnet_tools.errors import InputError
from retnet_tools.evaluate.budget_file import default_budget_text, read_budget
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.export import plan_of_export
from retnet_tools.graph.folder import read_graphs
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.quantize.blockwise import quantize_rows
from retnet_tools.quantize.unfinished import Unfinished
from retnet_tools.runtime.bulk import BulkOptions, generate_bulk
from retnet_tools.runtime.codec import IdCodec, open_codec
from retnet_tools.runtime.decode import Stopping, generate_from
from retnet_tools.runtime.diagnosis import diagnose_folder
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state_file import capture, read_state, write_state
from retnet_tools.tokenizing.carried import carried_text
from retnet_tools.tokenizing.files import find_tokenizer
from retnet_tools.tokenizing.text_files import read_text
from retnet_tools.tokenizing.tokenizers_library import encoding
from tests.exports import export
from tests.formats.cases import CONFORMANCE, SETTINGS, small_tensors
from tests.helpers import BASE, random_source


@dataclass(frozen=True)
class Special:
    """Something in a file's place: a pipe, a folder, or a link to a path."""

    kind: str
    target: str = ""

    def put(self, path: Path) -> None:
        if self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind == "folder":
            path.mkdir()
        elif self.kind == "sparse":
            with path.open("wb") as file:
                file.truncate(int(self.target))
        else:
            path.symlink_to(self.target)


Files = dict[str, Any]
"""Bytes, or a `Special`, by name."""


def put(files: Files, folder: Path) -> Path:
    """Write a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Special):
            content.put(folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder


def taken(folder: Path, *names: str) -> Files:
    """Read a folder; all files of it unless some are named."""
    return {name: (folder / name).read_bytes() for name in names or sorted(os.listdir(folder))}


def torch_bytes(tree: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def torch_tree() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in small_tensors().items()}


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _session() -> DecoderSession:
    return DecoderSession(export(BASE, random_source(BASE, seed=61), _scratch() / "export"), threads=1)


def _checkpoint(name: str, data: bytes) -> Files:
    return {"args.json": json.dumps(SETTINGS).encode(), name: data}


def _shards() -> Files:
    tensors = list(small_tensors().items())
    parts = {"model-1.safetensors": dict(tensors[:9]), "model-2.safetensors": dict(tensors[9:])}
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    files = {part: save(held) for part, held in parts.items()}
    return {
        "args.json": json.dumps(SETTINGS).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    } | files


def _dcp() -> Files:
    import torch.distributed.checkpoint as dcp

    folder = _scratch() / "dcp"
    dcp.save({"model": torch_tree()}, checkpoint_id=folder, no_dist=True)
    return {"args.json": json.dumps(SETTINGS).encode()} | taken(folder)


def _lightning() -> Files:
    return taken(CONFORMANCE / "dragn_rmsnorm" / "lightning")


def _export() -> Files:
    """As from before sizes were recorded, so that what reads the graphs is asked itself."""
    _session()
    files = taken(_scratch() / "export")
    manifest = json.loads(files["retnet.json"])
    del manifest["files"]
    return files | {"retnet.json": json.dumps(manifest).encode()}


def _state() -> Files:
    session = _session()
    sampling = Sampling(1.2, top_p=0.95, repetition_penalty=1.3, seed=4)
    result = generate_from(Sequences.start(session, 2, sampling), [[3, 1, 4], [9, 2]], Stopping(4), keep=True)
    assert result.sequences is not None
    write_state(_scratch() / "a.state", capture(result.sequences), force=True)
    return taken(_scratch(), "a.state")


def _byte_level() -> Files:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["to be or not to be that is the question " * 20], 300)
    tokenizer.save_model(str(_scratch()))
    tokenizer.save(str(_scratch() / "tokenizer.json"))
    return taken(_scratch(), "vocab.json", "merges.txt")


def _tokenizer() -> Files:
    _byte_level()
    words = {"tokenizer_config.json": {"eos_token": "e"}, "special_tokens_map.json": {"bos_token": "b"}}
    words |= {"generation_config.json": {"eos_token_id": 5, "temperature": 0.7}}
    return taken(_scratch(), "tokenizer.json") | {name: json.dumps(text).encode() for name, text in words.items()}


def _pieces() -> Files:
    from tests.tokenizing.pieces import train

    return {"tokenizer.model": train("bpe", 300), "added_tokens.json": b'{"<x>": 320}', "tokenizer_config.json": b"{}"}


def _fairseq() -> Files:
    files = _byte_level()
    words = "".join(f"{i} 9\n" for i in range(250)).encode()
    return {"encoder.json": files["vocab.json"], "vocab.bpe": files["merges.txt"], "dict.txt": words}


def _rows() -> Files:
    return {"prompts.jsonl": b'{"id": "a", "tokens": [1, 2]}\n{"tokens": [3]}\n'}


def _answers() -> Files:
    files, folder = _rows(), _scratch() / "bulk"
    put(files, folder)
    (folder / "out.jsonl").unlink(missing_ok=True)
    answer(folder)
    return taken(folder)


def _unfinished() -> Files:
    folder = _scratch() / "work"
    folder.mkdir(exist_ok=True)
    work = Unfinished(folder, "gptq", "0" * 64)
    work.save_rows("m", quantize_rows(np.ones((4, 64), np.float32), BlockFormat(4, 32, True), np.dtype(np.float32)))
    return {f"gptq-{'0' * 32}/m.npz": (work.folder / "m.npz").read_bytes()}


def read_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.weights.names():
        for _ in checkpoint.weights.blocks(name):
            pass


def read_export(folder: Path) -> None:
    read_graphs(folder, read_manifest(folder).graphs)
    plan_of_export(folder)
    run_export(folder)


def run_export(folder: Path) -> None:
    """What generate does; it must not rely on what others have checked."""
    with DecoderSession(folder, threads=1) as session:
        session.open_prefill()
        Sequences.start(session, 1, Sampling()).feed([[1, 2, 3]])
        open_codec(folder, session.manifest.config.vocab_size)


def doctor(folder: Path) -> None:
    """What doctor does."""
    for graph in diagnose_folder(folder, Device("cpu")).graphs:
        if graph.problem is not None:
            raise InputError(graph.problem)


def load_state(folder: Path) -> None:
    state = read_state(folder / "a.state")
    try:
        state.sequences(_session())
    except InputError as error:  # the session says what differs, and its own folder
        raise InputError(f"a.state: {error.found}", error.expected, error.action) from error


def read_tokenizer(folder: Path) -> None:
    files = sorted(folder.iterdir())
    encoding(find_tokenizer(files, 300).require("a text").tokenizer, "to be")
    carried_text(files, {}, 300)


def answer(folder: Path) -> None:
    """Rows that are no prompts are answered with an error, and so are the input's here."""
    output = folder / "out.jsonl"
    generate_bulk(_session(), IdCodec(), folder / "prompts.jsonl", output, BulkOptions(Stopping(2), Sampling()))
    for line in output.read_text(encoding="utf-8").splitlines():
        if "error" in (found := json.loads(line)):
            output.unlink()
            raise InputError(f"prompts.jsonl: {found['error']}")


def read_ids(folder: Path) -> None:
    _session().check_prompt(IdCodec().encode(read_text(folder / "ids.txt").content))


def load_rows(folder: Path) -> None:
    Unfinished(folder, "gptq", "0" * 64).load_rows("m", np.dtype(np.float32))


MATERIAL: dict[str, tuple[Callable[[], Files], Callable[[Path], None]]] = {
    "zip": (lambda: _checkpoint("model.pt", torch_bytes(torch_tree())), read_checkpoint),
    "legacy": (lambda: _checkpoint("model.pt", torch_bytes(torch_tree(), legacy=True)), read_checkpoint),
    "safetensors": (lambda: _checkpoint("model.safetensors", save(small_tensors())), read_checkpoint),
    "shards": (_shards, read_checkpoint),
    "dcp": (_dcp, read_checkpoint),
    "lightning": (_lightning, read_checkpoint),
    "export": (_export, read_export),
    "run": (_export, run_export),
    "doctor": (_export, doctor),
    "state": (_state, load_state),
    "tokenizer": (_tokenizer, read_tokenizer),
    "byte-level": (_byte_level, read_tokenizer),
    "pieces": (_pieces, read_tokenizer),
    "fairseq": (_fairseq, read_tokenizer),
    "rows": (_rows, answer),
    "answers": (_answers, answer),
    "text": (lambda: {"text.txt": b"To be"}, lambda folder: void(read_text(folder / "text.txt"))),
    "ids": (lambda: {"ids.txt": b"1 2, 3"}, read_ids),
    "unfinished": (_unfinished, load_rows),
    "budget": (lambda: {"b.toml": default_budget_text().encode()}, lambda folder: void(read_budget(folder / "b.toml"))),
}


def void(_: object) -> None:
    """For what is only read."""


@cache
def _whole(kind: str) -> Files:
    if kind.startswith("config "):
        files = taken(CONFORMANCE / kind.removeprefix("config "))
        return {name: content for name, content in files.items() if name not in ("case.json", "golden.npz")}
    return MATERIAL[kind][0]()


def whole(kind: str) -> Files:
    """The files of a kind, whole, in a dict of one's own; `config CASE` is a case of the conformance set."""
    return dict(_whole(kind))


def reader(kind: str) -> Callable[[Path], None]:
    """What reads them."""
    return read_checkpoint if kind.startswith("config ") else MATERIAL[kind][1]


def rezipped(data: bytes, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with other entries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def repickled(data: bytes, change: Callable[[Any], None]) -> bytes:
    """A pickle of a changed object."""
    tree = pickle.loads(data)
    change(tree)
    return pickle.dumps(tree)
