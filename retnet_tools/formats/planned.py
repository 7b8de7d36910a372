"""A checkpoint about to be written, seen as if it lay on the disk, so that a format can read it back beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.storage import PlannedTensor, StoredTensors

_NOWHERE = Path("planned")


class PlannedFiles(CheckpointFiles):
    """The folder that a layout will make."""

    def __init__(
        self, weights_file: str, documents: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, PlannedTensor]
    ) -> None:
        self.path = self.folder = _NOWHERE
        self.weights_file = _NOWHERE / weights_file
        self.configs = {_NOWHERE / name: dict(document) for name, document in documents.items()}
        self.tensors = StoredTensors(tensors)
        self._opened, self._config = (self.tensors, None), None
        self.tokenizer_files = []
