"""What a file is, told by its first bytes.

A container of tensors is a `FileKind`; anything else that people name in its place is refused by what it is.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from retnet_tools.errors import InputError
from retnet_tools.inputs import load_json, open_input

HEAD_BYTES = 512
INDEX_SUFFIX = ".index.json"
DCP_FILE = ".metadata"
DCP_SUFFIX = ".distcp"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Hugging Face's names, in its order: where one of them exists, it is the file that counts.
STANDARD_WEIGHTS = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", INDEX_SUFFIX)
)
# What trainers leave beside the weights.
TRAINERS_FILES = re.compile(
    r"(optim|optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state|sampler|dl_state_dict)"
    r"([._-].*)?|.*_optim_states\.pt",
    re.IGNORECASE,
)
_ZIP = b"PK\x03\x04"
_LFS = b"version https://git-lfs"
_LEGACY_MAGIC = (b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"119547037146038801333356L")
_TEXT_PICKLE = re.compile(rb"L\d+L?\n|\(?c[\w.]+\n[\w.]+\n|\([dlti]p?\d*\n|[\]}]q")
_TORCH_ENTRY = re.compile(rb"[^/]+/(data\.pkl|\.?(version|format_version|storage_alignment)|byteorder|\.?data/.*)")
_ONNX = "an ONNX graph", "name the checkpoint it was exported from"
_CONVERT, _UNPACK = "convert it to safetensors first", "unpack it"
_FLAX = "a JAX/Flax checkpoint (msgpack)", _CONVERT
# What a file is, and what to do: by its name, then by its first bytes.
_FROM_NAME = (
    (r".*\.data-\d{5}-of-\d{5}|.*\.ckpt(-\d+)?\.(index|meta)|saved_model\.pb", ("a TensorFlow checkpoint", _CONVERT)),
    (r".*\.onnx", _ONNX),
    (r".*\.msgpack", _FLAX),
    (r".*\.keras", ("a Keras checkpoint", _CONVERT)),
)
_FROM_HEAD = (
    (rb"GGUF", ("a GGUF file of llama.cpp", "name the checkpoint it was made from")),
    (rb"\x89HDF\r\n", ("an HDF5/Keras checkpoint", _CONVERT)),
    (rb"[\x81-\x8f][\xa1-\xbf\xd9]|\xde..[\xa1-\xbf\xd9]", _FLAX),
    (rb"\x08[\x01-\x1f](\x12|\x1a|\x22|\x3a)", _ONNX),
    (rb"\x93NUMPY", ("a NumPy array", _CONVERT)),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ|7z\xbc\xaf", ("a compressed archive", _UNPACK)),
    (rb"\s*<(?i:!doctype|html)", ("a web page, not the file", "download it again, logged in where that is needed")),
    (_ZIP, ("a zip archive", _UNPACK)),
    (rb".{257}ustar", ("a tar archive", _UNPACK)),
)


class FileKind(Enum):
    """A container of tensors."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    INDEX = "index"
    DCP = "dcp"


def short_name(path: Path, limit: int = 48) -> str:
    """A file's name, short enough for an error of one line."""
    name = path.name or path.absolute().name or str(path)
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def quantized_error(path: Path, method: str, name: str = "") -> InputError:
    """The error for weights that are quantized already."""
    found = f"{short_name(path)} holds {method}-quantized weights" + (f" ({name[:50]!r})" if name else "")
    return InputError(found, "floats", "use the checkpoint before quantization")


def kind_of(path: Path) -> FileKind:
    """The container that a file is.

    Raises:
        InputError: none; says what it is where that is known.
    """
    if path.name == DCP_FILE:
        return FileKind.DCP
    head = _head(path)
    kind = _kind(path, head) if path.suffix != DCP_SUFFIX else None
    if kind is not None:
        return kind
    if path.name.endswith(INDEX_SUFFIX) or (head.lstrip()[:1] == b"{" and _has_weight_map(path)):
        return FileKind.INDEX
    what, action = _foreign(path, head) or _unknown(path, head)
    raise InputError(f"{short_name(path)} is {what}", "safetensors or a file of torch.save", action)


def candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be its weights; more than one only where nothing tells which.

    Hugging Face's names first, then an index of shards, then a DCP checkpoint, then any container of tensors.
    """
    for name in STANDARD_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    if indices := [path for path in files if path.name.endswith(INDEX_SUFFIX)]:
        return indices
    if (folder / DCP_FILE).is_file():
        return [folder / DCP_FILE]
    files = [path for path in files if not TRAINERS_FILES.fullmatch(path.name)]
    # What is called weights and holds none is opened, and refused by what it is, where there is nothing better.
    return list(filter(_is_container, files)) or [path for path in files if path.suffix in WEIGHT_SUFFIXES]


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a container of tensors by its content, or a file that stands for some."""
    return any(
        path.name == DCP_FILE or path.name.endswith(INDEX_SUFFIX) or _is_container(path) for path in candidates(folder)
    )


def foreign_content(path: Path) -> tuple[str, str] | None:
    """What a file is that is no container of tensors, and what to do; None where that is not known."""
    return _foreign(path, _head(path))


def _head(path: Path) -> bytes:
    with open_input(path) as file:
        return file.read(HEAD_BYTES)


def _is_container(path: Path) -> bool:
    head = _head(path)
    if head.startswith(_LFS) or not head:
        return path.suffix in WEIGHT_SUFFIXES
    kind = _kind(path, head)
    # Any program may write pickles and zips: without one of torch's suffixes they must show torch's own marks.
    return kind is FileKind.SAFETENSORS or (
        kind is FileKind.TORCH and (path.suffix in TORCH_SUFFIXES or _is_torch(head))
    )


def _kind(path: Path, head: bytes) -> FileKind | None:
    if len(head) > 8 and int.from_bytes(head[:8], "little") < 1 << 40 and head[8:9] == b"{":
        return FileKind.SAFETENSORS
    if head.startswith(_ZIP):
        return FileKind.TORCH if _is_torch(head) or path.suffix in TORCH_SUFFIXES else None
    if (head[:1] == b"\x80" and head[1:2] in b"\1\2\3\4\5") or _TEXT_PICKLE.match(head):
        return FileKind.TORCH
    return None


def _is_torch(head: bytes) -> bool:
    if not head.startswith(_ZIP):
        return any(magic in head[:40] for magic in _LEGACY_MAGIC)
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    return _TORCH_ENTRY.fullmatch(name) is not None


def _has_weight_map(path: Path) -> bool:
    try:
        document = load_json(path)
    except InputError:
        return False
    return isinstance(document, dict) and "weight_map" in document


def _foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    if head.startswith(_LFS):
        return "a Git-LFS pointer, not the file", "run git lfs pull"
    if path.suffix == DCP_SUFFIX:
        return "one part of a DCP checkpoint", f"name its folder, with {DCP_FILE} in it"
    by_name = (found for pattern, found in _FROM_NAME if re.fullmatch(pattern, path.name))
    by_head = (found for pattern, found in _FROM_HEAD if re.match(pattern, head, re.DOTALL))
    return next(by_name, None) or next(by_head, None)


def _unknown(path: Path, head: bytes) -> tuple[str, str]:
    if not head:
        return "empty", "fetch it again"
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON without weights", "name the folder or the file of weights"
    if path.suffix in WEIGHT_SUFFIXES:
        return "truncated or corrupt", "fetch it again"
    return "no file of weights", "name a folder or a file of weights"
