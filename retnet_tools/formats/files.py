"""What lies in a checkpoint's folder: the one file of weights, the JSON beside it, the tokenizer."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats.content import INDEX_SUFFIX, FileKind, candidates, kind_of, short_name
from retnet_tools.formats.dcp import open_dcp
from retnet_tools.formats.safetensors_files import open_safetensors, open_shards
from retnet_tools.formats.state_dicts import Choice, averages_apart, choose, choose_state_dict
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torch_files import read_torch
from retnet_tools.inputs import load_json

CONFIG_NAMES = ("config.json", "args.json", "retnet_config.json")
TOKENIZER_PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "encoder.json", "vocab.*", "merges.txt"),
    *("dict.txt", "sentencepiece*.model", "spiece.model"),
)
CARD_PATTERNS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")
MAX_CONFIG_BYTES = 1_000_000


class CheckpointFiles:
    """A checkpoint that a user named, by its folder or by its file of weights. Files are opened when asked for.

    Args:
        config: the one file of configuration to read, in place of what is in the file of weights and beside it.
        entry: which state dict of a file with several, by its key.

    Raises:
        InputError: the path does not exist, or is neither a folder nor a file of weights.
    """

    def __init__(self, path: Path, *, config: Path | None = None, entry: str | None = None) -> None:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}", "a checkpoint", "check the path")
        if path.is_file():
            kind_of(path)
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._config, self._entry = config, entry

    @cached_property
    def weights_file(self) -> Path | None:
        """The file of weights that was named or is the only one; None without any.

        Of shards their index, of a DCP checkpoint its `.metadata`.

        Raises:
            InputError: several candidates.
        """
        if self.path.is_file():
            return self.path
        found = candidates(self.path)
        if len(found) > 1:
            names = ", ".join(map(short_name, found[:3])) + (", ..." if len(found) > 3 else "")
            several = f"{short_name(self.path)} holds several files of weights: {names}"
            raise InputError(several, "one", "name the file that you mean")
        return found[0] if found else None

    @cached_property
    def configs(self) -> dict[Path, dict[str, Any]]:
        """The JSON objects in the folder that may be configurations, those of the usual names first.

        Raises:
            InputError: one of the usual names, or the file that was named, is no JSON object.
        """
        if (named := self._config) is not None:
            if not named.is_file():
                raise InputError(f"no such file: {named}", "a configuration", "check the path")
            return {named: _object(named)}
        usual = [self.folder / name for name in CONFIG_NAMES]
        others = [p for p in sorted(self.folder.glob("*.json")) if p not in usual and not p.name.endswith(INDEX_SUFFIX)]
        found = {}
        for path in (*usual, *others):
            if path in usual and os.path.lexists(path):
                found[path] = _object(path)
            elif path.is_file() and path not in self.tokenizer_files and path.stat().st_size <= MAX_CONFIG_BYTES:
                with suppress(InputError):
                    found[path] = _object(path)
        return found

    @property
    def tensors(self) -> StoredTensors:
        """All tensors of the checkpoint's state dict under their own names, unread.

        Raises:
            InputError: no file of weights, or one that is corrupt or unsafe.
        """
        return self._opened[0]

    @property
    def embedded(self) -> dict[str, dict[str, Any]]:
        """What a torch file holds beside its weights, plain values only; nothing where a configuration was named.

        Every mapping and object by its dotted path, such as "cfg.model"; "" is the top of the file.
        """
        return self._opened[1].embedded if self._config is None else {}

    @property
    def notes(self) -> list[str]:
        """What the user should know about which weights were taken."""
        return self._opened[1].notes

    @cached_property
    def _opened(self) -> tuple[StoredTensors, Choice]:
        file = self.weights_file
        if file is None:
            found = f"no weights in {short_name(self.folder)}"
            raise InputError(found, "safetensors or a file of torch.save", "check the path")
        kind = kind_of(file)
        if kind is FileKind.DCP:
            return open_dcp(file, self._entry)
        if kind is FileKind.TORCH:
            return _open_torch(file, self._entry)
        stored = open_safetensors(file) if kind is FileKind.SAFETENSORS else open_shards(file, _open_shard)
        parts = averages_apart("", stored.locations)
        if self._entry is not None and len(parts) == 1:
            raise UsageError(f"entry {self._entry!r} of {short_name(file)}", "no entry", "it holds one state dict")
        choice = choose(parts, short_name(file), self._entry)
        return StoredTensors(choice.tensors, stored.metadata, stored.aliases), choice

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, and the index of shards if there is one."""
        index = [self.weights_file] if self.weights_file is not None else []
        return list(dict.fromkeys([*index, *self.tensors.files()]))

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """Tokenizer and generation files in the folder."""
        return self._matching(TOKENIZER_PATTERNS)

    @property
    def card_files(self) -> list[Path]:
        """The model card and the licences in the folder."""
        return self._matching(CARD_PATTERNS)

    def _matching(self, patterns: tuple[str, ...]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})


def _object(path: Path) -> dict[str, Any]:
    document = load_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} is no JSON object", "a configuration", "name another file")
    return document


def _open_shard(file: Path) -> StoredTensors:
    return open_safetensors(file) if kind_of(file) is FileKind.SAFETENSORS else _open_torch(file, None)[0]


def _open_torch(file: Path, entry: str | None) -> tuple[StoredTensors, Choice]:
    """The tensors of a torch file, and how they were chosen."""
    content = read_torch(file)
    choice = choose_state_dict(content.tree, short_name(file), entry)
    return StoredTensors({name: content.locate(name, tensor) for name, tensor in choice.tensors.items()}), choice
