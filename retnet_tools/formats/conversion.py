"""From canonical tensors to the layout of any format that can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import NUMPY_DTYPES, FloatName, convert, parse_dtype
from retnet_tools.errors import ConfigError, InputError, UsageError
from retnet_tools.formats.containers import PlannedTensor
from retnet_tools.formats.planned import PlannedFiles
from retnet_tools.formats.spec import AS_STORED, Checkpoint, FormatSpec, MappedWeights, Transform, Writing, expand_names
from retnet_tools.formats.writer import DEFAULT_SHARD_SIZE, INDEX_FILE, CheckpointLayout, shard
from retnet_tools.provenance import provenance_section
from retnet_tools.tokenizing.carried import carried_text
from retnet_tools.weights import (
    Array,
    BlockSource,
    TensorInfo,
    WeightSource,
    canonical_shapes,
    check_weights,
    read_blocks,
)

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Conversion:
    """A conversion, ready to be written.

    Attributes:
        layout: the files.
        names: from each name in the files to the canonical tensor it holds; None for a buffer of the format.
        largest: bytes of the largest tensor, as read and as written; memory is bounded by their sum.
        notes: what the user should know about it.
    """

    layout: CheckpointLayout
    names: Mapping[str, str | None]
    largest: tuple[int, int]
    notes: tuple[str, ...] = ()


def plan_conversion(
    config: RetNetConfig,
    weights: WeightSource,
    target: FormatSpec,
    *,
    dtype: FloatName | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    texts: Mapping[str, Callable[[], str]] | None = None,
    copies: Sequence[Path] = (),
) -> Conversion:
    """Lay a model out in a format; no tensor is read.

    Args:
        weights: exactly the canonical tensors of `config`.
        target: the format to write.
        dtype: of all tensors; None keeps each as it is.
        max_shard_size: bytes of tensor data in one safetensors file; a larger tensor has a file of its own.
        texts: further text files, by name, and what makes each.
        copies: further files, such as a tokenizer.

    Raises:
        UsageError: the format cannot be written, or cannot express this model; names the field.
        InputError: tensors that do not fit the configuration.
    """
    check_weights(config, weights)
    dtype = None if dtype is None else parse_dtype(dtype)
    if target.write is None:
        raise UsageError(f"writing {target.name}", "a format that can be written", "see convert --help")
    writing = target.write(config)
    tensors, names = _stored_tensors(config, weights, writing, dtype)
    _check_reads_back(config, target, writing, tensors)
    if writing.weights_file.endswith(".safetensors"):
        files, index = shard(tensors, max_shard_size)
    else:
        files, index = {writing.weights_file: tensors}, None
    documents = {**({INDEX_FILE: index} if index is not None else {}), **writing.documents}
    layout = CheckpointLayout(files, documents, texts or {}, copies)
    largest = (
        max(weights.info(name).nbytes for name in weights.names()),
        max(tensor.info.nbytes for tensor in tensors),
    )
    return Conversion(layout, names, largest)


def plan_checkpoint(
    checkpoint: Checkpoint,
    target: FormatSpec,
    *,
    dtype: FloatName | None,
    max_shard_size: int,
) -> Conversion:
    """Lay a whole checkpoint out in a format: its tokenizer, special tokens and licences too, and a card that says
    where it is from.

    Raises:
        UsageError, InputError: as `plan_conversion`.
    """
    card = next((file for file in checkpoint.card_files if file.name == CARD_FILE), None)

    text = carried_text(checkpoint.tokenizer_files, checkpoint.settings, checkpoint.config.vocab_size)
    notes = (*checkpoint.notes, *text.notes)

    def card_text() -> str:
        before = "" if card is None else card.read_text(encoding="utf-8").rstrip() + "\n\n"
        return before + provenance_section(checkpoint.format, checkpoint.source_files, notes)

    plan = plan_conversion(
        checkpoint.config,
        checkpoint.weights,
        target,
        dtype=dtype,
        max_shard_size=max_shard_size,
        texts={CARD_FILE: card_text, **{name: partial(str, made) for name, made in text.made.items()}},
        copies=[
            *(file for file in checkpoint.tokenizer_files if file.name not in text.made),
            *(file for file in checkpoint.card_files if file != card),
        ],
    )
    return replace(plan, notes=notes)


def _stored_tensors(
    config: RetNetConfig, weights: WeightSource, writing: Writing, dtype: FloatName | None
) -> tuple[list[PlannedTensor], dict[str, str | None]]:
    shapes = canonical_shapes(config)
    tensors: list[PlannedTensor] = []
    names: dict[str, str | None] = {}
    for name, canonical, template in expand_names(config, writing.names, writing.prefix):
        if canonical not in shapes:
            continue
        transform = writing.transforms.get(template, AS_STORED)
        info = weights.info(canonical)
        target = NUMPY_DTYPES[dtype] if dtype is not None else info.dtype
        read = partial(_blocks, weights, canonical, transform, target)
        region = None
        if transform is AS_STORED and target == info.dtype and isinstance(weights, BlockSource):
            region = weights.region(canonical)
        tensors.append(PlannedTensor(name, TensorInfo(transform.stored_shape(shapes[canonical]), target), read, region))
        names[name] = canonical
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, original in writing.ties.items():
        tensors.append(replace(by_name[original], name=name, same_as=original))
        names[name] = names[original]
    for name, buffer in writing.buffers.items():
        tensors.append(PlannedTensor(name, TensorInfo(buffer.shape, buffer.dtype), partial(iter, (buffer,))))
        names[name] = None
    return tensors, names


def _blocks(weights: WeightSource, canonical: str, transform: Transform, dtype: np.dtype[Any]) -> Iterator[Array]:
    if transform is AS_STORED:
        for block in read_blocks(weights, canonical):
            yield convert(canonical, block, dtype)
    else:
        yield convert(canonical, transform.invert(weights.read(canonical)), dtype)


def _check_reads_back(
    config: RetNetConfig, target: FormatSpec, writing: Writing, tensors: Sequence[PlannedTensor]
) -> None:
    """What is written must read as the same model, or the first field that would not is named.

    Raises:
        UsageError: the format cannot express the model.
    """
    files = PlannedFiles(writing.weights_file, writing.documents, {tensor.name: tensor for tensor in tensors})
    try:
        reading = target.read(files)
    except (InputError, ConfigError) as error:
        raise UsageError(
            f"{target.name} cannot express this model: {error.found}", error.expected, "convert to another format"
        ) from error
    for field, wanted, got in _differences(config.to_dict(), reading.config.to_dict()):
        raise UsageError(
            f"{target.name} cannot express {field} = {_short(wanted)}",
            f"{_short(got)}, which is what it would be read as",
            "convert to another format",
        )
    MappedWeights(files.tensors, reading)


def _differences(a: object, b: object, path: str = "") -> list[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))]
    return [] if a == b else [(path, a, b)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
