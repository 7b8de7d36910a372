"""Readers of bytes, for atheris: each gets a file of whatever bytes there are. Seeds are whole files."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from retnet_tools.errors import RetNetToolsError

SEEDS = Path(__file__).parents[1] / "data" / "fuzz"
MAX_SECONDS, MAX_MEGABYTES = 10, 400
MAX_LENGTH = 1 << 16
CODES = (2, 5)
TEXT = "To be, or not to be"


def _pickle(folder: Path) -> None:
    from retnet_tools.formats.pickles import unpickle
    from retnet_tools.formats.state_dicts import choose_state_dict

    file = folder / "x.pt"
    choose_state_dict(unpickle(io.BytesIO(file.read_bytes()), file, lambda pid: pid), file.name)


def _tensors(folder: Path) -> None:
    from retnet_tools.formats.files import CheckpointFiles

    files = CheckpointFiles(next(folder.glob("x.*")))
    for name in files.tensors.names():
        files.tensors.read(name)
    assert isinstance(files.embedded, dict)


def _metadata(folder: Path) -> None:
    from retnet_tools.formats.dcp import open_dcp

    stored, _ = open_dcp(folder / ".metadata")
    for name in stored.names():
        stored.read(name)


def _state(folder: Path) -> None:
    from retnet_tools.runtime.state_file import read_state

    read_state(folder / "x.state").select([0])


def _graph(folder: Path) -> None:
    from retnet_tools.graph.folder import read_graphs

    read_graphs(folder, ["x.onnx"])


def _manifest(folder: Path) -> None:
    from retnet_tools.graph.manifest import read_manifest

    read_manifest(folder).fingerprint()


def _pieces(folder: Path) -> None:
    from retnet_tools.tokenizing.files import find_tokenizer
    from retnet_tools.tokenizing.tokenizers_library import encoding

    encoding(find_tokenizer([folder / "x.model"], 300).require("a text").tokenizer, TEXT)


def _tokenizer(folder: Path) -> None:
    from retnet_tools.tokenizing.files import load_tokenizer
    from retnet_tools.tokenizing.tokenizers_library import encoding

    encoding(load_tokenizer(folder / "tokenizer.json"), TEXT)


def _dictionary(folder: Path) -> None:
    from retnet_tools.tokenizing.fairseq import read_dictionary

    read_dictionary(folder / "dict.txt")


BYTES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "pickle": ("x.pt", _pickle),
    "torch": ("x.pt", _tensors),
    "safetensors": ("x.safetensors", _tensors),
    "dcp": (".metadata", _metadata),
    "state": ("x.state", _state),
    "onnx": ("x.onnx", _graph),
    "manifest": ("retnet.json", _manifest),
    "pieces": ("x.model", _pieces),
    "tokenizer": ("tokenizer.json", _tokenizer),
    "dictionary": ("dict.txt", _dictionary),
}
"""By name: what the file is called, and its reader."""


@cache
def _folder(name: str) -> Path:
    """A folder for the file, with what lies beside it."""
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared))
    if name == "onnx":
        with (folder / "weights.data").open("wb") as file:
            file.truncate(1 << 20)
    if name == "dcp":
        for part in (SEEDS / "dcp-parts").iterdir():
            shutil.copy(part, folder)
    return folder


def run_bytes(name: str, data: bytes) -> None:
    """Read one input; anything but a refusal passes through."""
    file, read = BYTES[name]
    folder = _folder(name)
    (folder / file).write_bytes(data)
    try:
        read(folder)
    except RetNetToolsError as error:
        check_refusal(error)


def check_refusal(error: RetNetToolsError) -> None:
    """An error must be of the input, and one line."""
    assert error.exit_code in CODES, error
    assert str(error).isprintable()


def seeds(name: str) -> list[bytes]:
    """Whole files of a target."""
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


def fuzz_bytes(name: str, seconds: float, seed: int, keep: Path) -> int:
    """Let atheris look for bytes that a reader fails on; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["retnet_tools", "zipfile", "json"]):
        import retnet_tools.formats.dcp
        import retnet_tools.graph.folder
        import retnet_tools.graph.manifest
        import retnet_tools.runtime.state_file
        import retnet_tools.tokenizing.files  # noqa: F401
    names = list(BYTES) if name == "mixed" else [name]
    for each in names:
        for data in seeds(each):
            run_bytes(each, data)  # whatever is imported late is there before memory is limited

    def one(data: bytes) -> None:
        if name != "mixed":
            run_bytes(name, data)
        elif data:
            run_bytes(names[data[0] % len(names)], data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for i, each in enumerate(names):
            for j, data in enumerate(seeds(each)):
                (Path(corpus) / f"{each}-{j}").write_bytes((bytes([i]) if name == "mixed" else b"") + data)
        flags = {
            "seed": max(1, seed),  # libFuzzer draws one for 0
            "max_total_time": max(1, int(seconds)),
            "timeout": MAX_SECONDS,
            "rss_limit_mb": _resident_megabytes() + MAX_MEGABYTES,
            "max_len": MAX_LENGTH,
            "print_final_stats": 1,
            "artifact_prefix": f"{keep}/{name}-",
        }
        atheris.Setup([sys.argv[0], corpus, *(f"-{key}={value}" for key, value in flags.items())], one)
        atheris.Fuzz()
    return 0


def _resident_megabytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmRSS"))
