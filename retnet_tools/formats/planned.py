"""A checkpoint about to be written, seen as if it lay on the disk, so that a format can read it back beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.formats.containers import PlannedTensor
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.storage import StoredTensors, TensorLocation, contiguous_strides
from retnet_tools.weights import Array

_NOWHERE = Path("planned")


class PlannedTensors(StoredTensors):
    """Planned tensors by name."""

    def __init__(self, tensors: Mapping[str, PlannedTensor]) -> None:
        super().__init__({name: _location(tensor) for name, tensor in tensors.items()})
        self._planned = dict(tensors)

    def read(self, name: str) -> Array:
        """The data that would be written."""
        return np.concatenate([block.reshape(-1) for block in self._planned[name].blocks()]).reshape(
            self._planned[name].info.shape
        )

    def same_data(self, first: str, second: str) -> bool:
        """Whether two tensors will share their storage."""
        return self._original(first) == self._original(second)

    def _original(self, name: str) -> str:
        return self._planned[name].same_as or name


class PlannedFiles(CheckpointFiles):
    """The folder that a layout will make."""

    def __init__(
        self, weights_file: str, documents: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, PlannedTensor]
    ) -> None:
        self.path = self.folder = _NOWHERE
        self.weights_file = _NOWHERE / weights_file
        self.configs = {_NOWHERE / name: dict(document) for name, document in documents.items()}
        self.tensors = PlannedTensors(tensors)
        self._opened, self._config = (self.tensors, None), None
        self.tokenizer_files = []


def _location(tensor: PlannedTensor) -> TensorLocation:
    shape = tensor.info.shape
    return TensorLocation(_NOWHERE, 0, shape, tensor.info.dtype, contiguous_strides(shape))
