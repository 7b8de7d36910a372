"""Checkpoints by their name on the Hugging Face hub, fetched by `huggingface_hub` where that is installed.

The library honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HUB_CACHE, and shows its progress on stderr, where that
is a terminal.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import InputError, UsageError

DEFAULT_ENDPOINT = "https://huggingface.co"
INSTALL = "pip install huggingface_hub"
FILE_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".distcp", ".h5", ".msgpack", ".gguf", ".npz"),
    *(".onnx", ".data", ".json", ".txt"),
)
SAFETENSORS = "*.safetensors"
TORCH_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pth.tar", "*.ckpt", "*.distcp", ".metadata", "*.bin.index.json")
BESIDE_WEIGHTS = (
    *("*.json", "*.jinja", "*.model", "vocab.*", "merges.txt", "dict.txt"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)
# Folders below hold other checkpoints of the same run, or exports; only the top one is a checkpoint by its name.
NOT_WEIGHTS = (
    *("*/*", "trainer_state.json", "training_args.bin", "optimizer*", "*_optimizer.*", "*optim_states*"),
    *("scheduler*", "scaler*", "rng_state*", "random_states*"),
)
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--(.+)")


@dataclass(frozen=True)
class HubOrigin:
    """Where on the hub a file of its cache comes from: a repository such as `org/name`, and a commit of it."""

    repository: str
    commit: str


def local_checkpoint(name: str, revision: str | None = None) -> Path:
    """The path of a checkpoint; one that is named as on the hub is fetched into the hub's cache first.

    What exists is a path, and so is what looks like one: whatever starts with `.`, `/` or `~`, ends with `/` or with
    the suffix of a file, or is not of the form `org/name`. All else is a name on the hub. Fetched are weights,
    configuration, tokenizer, card and licences in the top folder: safetensors where there are any, else torch files.

    Args:
        revision: branch, tag or commit; None for the main branch.

    Raises:
        InputError: a name on the hub without `huggingface_hub`, or that cannot be had: what to do.
        UsageError: a revision of a path.
    """
    path = Path(name)
    if path.exists() or not _is_hub_name(name):
        if revision is not None:
            raise UsageError(f"--revision {revision} of the path {name}", "a name on the hub, such as org/name")
        return path
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        found = f"no file or folder {name}, and no huggingface_hub to fetch it with"
        action = f"{INSTALL}, or download its files from {endpoint}/{name} and name their folder"
        raise InputError(found, action=action) from error
    return _fetch(name, revision)


def hub_origin(path: Path) -> HubOrigin | None:
    """Where a path inside a hub cache comes from, `.../models--ORG--NAME/snapshots/COMMIT`; None for other paths."""
    path = path.absolute()
    for folder in (path, *path.parents):
        cached = _CACHED.fullmatch(folder.parent.parent.name)
        if cached and folder.parent.name == "snapshots":
            return HubOrigin(cached[1].replace("--", "/"), folder.name)
    return None


def _is_hub_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and "--" not in name and ".." not in name and not name.endswith(FILE_SUFFIXES)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def snapshot(revision: str | None, *patterns: str, ignored: tuple[str, ...] = ()) -> Path:
        ignore = [*NOT_WEIGHTS, *ignored]
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns], ignore_patterns=ignore))

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot(revision, SAFETENSORS, *BESIDE_WEIGHTS, ignored=("*.bin.index.json",))
        if not any(folder.glob(SAFETENSORS)):
            snapshot(folder.name, *TORCH_WEIGHTS)
    # What the library lets through of its HTTP library differs from version to version.
    except Exception as error:
        raise _explained(name, revision, error) from error
    if not any(file for pattern in (SAFETENSORS, *TORCH_WEIGHTS) for file in folder.glob(pattern)):
        expected = f"one of {', '.join((SAFETENSORS, *TORCH_WEIGHTS[:5]))}"
        action = "download the folder that you mean by hand and name it"
        raise InputError(f"{name} on the hub has no weights in its top folder", expected, action)
    return folder


def _explained(name: str, revision: str | None, error: Exception) -> InputError:
    """One line for an error of the library: what was found, and what to do."""
    from huggingface_hub import constants, errors

    hub, where, missing = constants.ENDPOINT, f"{constants.ENDPOINT}/{name}", f"no file or folder {name}, and"
    wanted = "main" if revision is None else revision
    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        found, action = f"{where} is gated", "ask for access on its page, and set HF_TOKEN to your token"
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = f"{missing} no repository {where} that may be read"
        action = "check the name; for a private one set HF_TOKEN to your token"
    elif isinstance(error, errors.RevisionNotFoundError):
        found, action = f"{where} has no revision {wanted!r}", "name a branch, tag or commit of it"
    elif status == 401:
        found, action = f"{hub} refuses the token (401)", "set HF_TOKEN to a valid one"
    elif status is not None:
        found, action = f"{where} cannot be had: the hub answers {status}", "try later, or download by hand"
    elif not isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        found, action = f"fetching {where} ended with: {reason}", "try again, or download its files by hand"
    elif constants.HF_HUB_OFFLINE:
        found = f"{missing} no whole copy of {name} ({wanted}) in the hub's cache, with HF_HUB_OFFLINE set"
        action = "unset it, or name a folder"
    else:
        found = f"{missing} {hub} cannot be reached"
        action = "check the network, HF_ENDPOINT and the name, or download the files by hand and name their folder"
    return InputError(found, action=action)
