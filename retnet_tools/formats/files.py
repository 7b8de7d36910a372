"""What lies in a checkpoint's folder: the one file of weights, the JSON beside it, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats.pickles import TorchFile, open_torch
from retnet_tools.formats.storage import StoredTensors, load_json, open_safetensors, open_shards

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"
# Hugging Face's names, in its order: where one of them exists, it is the file that counts.
STANDARD_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_NAMES = ("config.json", "args.json", "retnet_config.json")
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "encoder.json",
    "vocab.*",
    "merges.txt",
    "dict.txt",
    "sentencepiece*.model",
    "spiece.model",
)
CARD_PATTERNS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")
MAX_CONFIG_BYTES = 1_000_000


class CheckpointFiles:
    """A checkpoint that a user named, by its folder or by its file of weights. Files are opened when asked for.

    Raises:
        InputError: the path does not exist, or is neither a folder nor a file of weights.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}", "a checkpoint", "check the path")
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
            raise InputError(
                f"{path} is no file of weights",
                f"a folder or a file of {', '.join(WEIGHT_SUFFIXES)}",
                "name one of these",
            )
        self.path = path
        self.folder = path if path.is_dir() else path.parent

    @cached_property
    def weights_file(self) -> Path | None:
        """The file of weights (or the index of its shards) that was named or is the only one; None without any.

        Raises:
            InputError: several candidates.
        """
        if self.path.is_file():
            return self.path
        for name in STANDARD_WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        indices = sorted(p for p in self.path.glob(f"*{INDEX_SUFFIX}") if p.is_file())
        found = indices or sorted(p for p in self.path.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise InputError(
                f"{self.path} holds several files of weights: {names}", "one", "name the file that you mean"
            )
        return found[0] if found else None

    @cached_property
    def configs(self) -> dict[Path, dict[str, Any]]:
        """The JSON objects in the folder that may be configurations, those of the usual names first.

        Raises:
            InputError: one of the usual names is not JSON.
        """
        usual = [self.folder / name for name in CONFIG_NAMES]
        others = [p for p in sorted(self.folder.glob("*.json")) if p not in usual and not p.name.endswith(INDEX_SUFFIX)]
        found = {}
        for path in (*usual, *others):
            if not path.is_file() or path in self.tokenizer_files or path.stat().st_size > MAX_CONFIG_BYTES:
                continue
            try:
                document = load_json(path)
            except InputError:
                if path in usual:
                    raise
                continue
            if isinstance(document, dict):
                found[path] = document
        return found

    @cached_property
    def torch_file(self) -> TorchFile | None:
        """The opened `.pt`, `.pth` or `.bin`, or None where the weights lie otherwise."""
        file = self.weights_file
        if file is None or file.suffix not in WEIGHT_SUFFIXES[1:]:
            return None
        return open_torch(file)

    @cached_property
    def tensors(self) -> StoredTensors:
        """All tensors of the checkpoint under their own names, unread.

        Raises:
            InputError: no file of weights, or one that is corrupt or unsafe.
        """
        file = self.weights_file
        if file is None:
            raise InputError(
                f"no weights in {self.folder}", f"a file of {', '.join(WEIGHT_SUFFIXES)}", "name its folder"
            )
        if self.torch_file is not None:
            return self.torch_file.tensors
        if file.name.endswith(INDEX_SUFFIX):
            return open_shards(file, open_weights)
        return open_safetensors(file)

    def has_settings_or_tensor(self, is_settings: Callable[[Mapping[str, Any]], bool], name: str) -> bool:
        """Whether there are weights with settings of a format as JSON beside them, or with a tensor of this name."""
        if self.weights_file is None:
            return False
        return any(is_settings(document) for document in self.configs.values()) or name in self.tensors.locations

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What a torch file holds beside its state dict."""
        return {} if self.torch_file is None else self.torch_file.metadata

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, and the index of shards if there is one."""
        index = [self.weights_file] if self.weights_file is not None else []
        return list(dict.fromkeys([*index, *(t.file for t in self.tensors.locations.values())]))

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer and generation files in the folder."""
        return sorted({p for pattern in TOKENIZER_PATTERNS for p in self.folder.glob(pattern) if p.is_file()})

    @cached_property
    def card_files(self) -> list[Path]:
        """The model card and the licences in the folder."""
        return sorted({p for pattern in CARD_PATTERNS for p in self.folder.glob(pattern) if p.is_file()})


def open_weights(path: Path) -> StoredTensors:
    """The tensors of one file, safetensors or torch by its suffix."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path).tensors
