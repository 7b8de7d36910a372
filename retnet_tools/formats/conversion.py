"""From canonical tensors to the layout of any format that can be written, and to the folder, one tensor at a time.

The configuration appears last: a folder without it is no checkpoint, so an interrupted write never looks finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import NUMPY_DTYPES, FloatName, convert_array, parse_dtype
from retnet_tools.errors import ConfigError, InputError, OutputError, UsageError
from retnet_tools.formats.files import CONFIG_NAMES
from retnet_tools.formats.mapping import expand_names, map_weights
from retnet_tools.formats.provenance import provenance_section
from retnet_tools.formats.safetensors_files import write_safetensors
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import AS_STORED, SAFETENSORS_FILE, TORCH_FILE, Checkpoint, FormatSpec, Source, Writing
from retnet_tools.formats.storage import PlannedTensor, StoredTensors, planned
from retnet_tools.formats.torch_files import write_torch
from retnet_tools.inputs import read_words
from retnet_tools.progress import ByteProgress
from retnet_tools.staging import staged_folder
from retnet_tools.tokenizing.carried import carried_text
from retnet_tools.weights import Array, WeightSource, canonical_shapes, check_weights

CARD_FILE = "README.md"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
DEFAULT_SHARD_SIZE = 5_000_000_000
_OTHER_BYTES = 1 << 20
SCHEDULES = ("decay", "rotary_frequencies")
SCHEDULE_ROUNDING = 4 * 2.0**-23
"""Numbers closer than this, relatively, are one published schedule.

Its float32 evaluation differs from the exact numbers by 3.3 steps of 2^-23 at most: 2.3 from the exponent, whose error
of 2^-25 the power takes times ln 10000, and half a step each from power and quotient. torch's power adds half a step.
"""
MAX_SHOWN = 30


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint folder will hold, known before any tensor is read.

    Attributes:
        weights: file name to its tensors; `.safetensors` or `.pt` by suffix.
        documents: file name to JSON, the configuration last.
        canonical: from each name in the files to the canonical tensor it holds; None for a buffer of the format.
        largest: bytes of the largest tensor, as read and as written; memory is bounded by their sum.
        notes: what the user should know about what is written.
        texts: file name to what makes its text, such as a model card; called after the weights are written.
        copies: files to copy under their own names.
    """

    weights: Mapping[str, Sequence[PlannedTensor]]
    documents: Mapping[str, Mapping[str, Any]]
    canonical: Mapping[str, str | None]
    largest: tuple[int, int]
    notes: tuple[str, ...]
    texts: Mapping[str, Callable[[], str]]
    copies: Sequence[Path]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data; what shares storage counts once."""
        return sum(t.nbytes for tensors in self.weights.values() for t in tensors if t.same_as is None)

    @property
    def marker(self) -> str:
        """The file that makes a checkpoint of the folder."""
        return list(self.documents)[-1]

    @property
    def files(self) -> list[str]:
        """The names of all files, in the order in which they appear."""
        return [*self.weights, *(file.name for file in self.copies), *self.texts, *self.documents]


def plan_conversion(
    config: RetNetConfig,
    weights: WeightSource,
    target: FormatSpec,
    *,
    dtype: FloatName | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    texts: Mapping[str, Callable[[], str]] | None = None,
    copies: Sequence[Path] = (),
    assumed_clamp: bool = False,
) -> Conversion:
    """Lay a model out in a format; no tensor is read.

    Args:
        weights: exactly the canonical tensors of `config`.
        dtype: of all tensors; None keeps each as it is.
        max_shard_size: bytes of tensor data in one safetensors file; a larger tensor has a file of its own.
        texts: further text files, by name, and what makes each.
        copies: further files, such as a tokenizer.
        assumed_clamp: whether the clamp in `config` is assumed (`Checkpoint.assumed_clamp`), which is kept.

    Raises:
        UsageError: the format cannot be written, or cannot express this model; lists the fields.
        InputError: tensors that do not fit the configuration.
    """
    check_weights(config, weights)
    dtype = None if dtype is None else parse_dtype(dtype)
    if target.write is None:
        raise UsageError(f"writing {target.name}", "a format that can be written", "see convert --help")
    writing = target.write(config, assumed_clamp)
    tensors, names = _stored_tensors(config, weights, writing, dtype)
    notes = _check_reads_back(config, target, writing, tensors)
    if writing.weights_file.endswith(".safetensors"):
        files, index = shard(tensors, max_shard_size)
    else:
        files, index = {writing.weights_file: tensors}, None
    documents = {**({} if index is None else {INDEX_FILE: index}), writing.settings_file: writing.settings}
    largest = max(weights.info(name).nbytes for name in weights.names()), max(tensor.nbytes for tensor in tensors)
    return Conversion(files, documents, names, largest, notes, texts or {}, copies)


def plan_checkpoint(
    checkpoint: Checkpoint, target: FormatSpec, *, dtype: FloatName | None, max_shard_size: int
) -> Conversion:
    """`plan_conversion` of a checkpoint with its tokenizer, special tokens, licences, and a card that says whence."""
    card = next((file for file in checkpoint.card_files if file.name == CARD_FILE), None)
    text = carried_text(checkpoint.tokenizer_files, checkpoint.settings, checkpoint.config.vocab_size)
    notes = (*checkpoint.notes, *text.notes)

    def card_text() -> str:
        before = "" if card is None else read_words(card).rstrip() + "\n\n"
        return before + provenance_section(checkpoint.format, checkpoint.source_files, (*notes, *plan.notes))

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
        assumed_clamp=checkpoint.assumed_clamp,
    )
    return replace(plan, notes=(*notes, *plan.notes))


def _stored_tensors(
    config: RetNetConfig, weights: WeightSource, writing: Writing, dtype: FloatName | None
) -> tuple[list[PlannedTensor], dict[str, str | None]]:
    shapes = canonical_shapes(config)
    tensors: list[PlannedTensor] = []
    names: dict[str, str | None] = {}
    for name, canonical, template in expand_names(config, writing.names):
        if canonical not in shapes:
            continue
        transform = writing.transforms.get(template, AS_STORED)
        own = weights.info(canonical).dtype
        target = own if dtype is None else NUMPY_DTYPES[dtype]
        as_stored = transform is AS_STORED
        read = partial(_blocks, weights, canonical, None if as_stored else transform.invert, target)
        same = as_stored and target == own
        region = weights.region(canonical) if same else None
        tensors.append(PlannedTensor(transform.stored_shape(shapes[canonical]), target, name, read, region))
        names[name] = canonical
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, original in writing.ties.items():
        tensors.append(replace(by_name[original], name=name, same_as=original))
        names[name] = names[original]
    for name, buffer in writing.buffers.items():
        tensors.append(planned(name, buffer))
        names[name] = None
    return tensors, names


def _blocks(
    weights: WeightSource, name: str, invert: Callable[[Array], Array] | None, dtype: np.dtype[Any]
) -> Iterator[Array]:
    for block in weights.blocks(name) if invert is None else (invert(weights.read(name)),):
        yield convert_array(name, block, dtype)


def _check_reads_back(
    config: RetNetConfig, target: FormatSpec, writing: Writing, tensors: Sequence[PlannedTensor]
) -> tuple[str, ...]:
    """What is written must read as the same model, schedules up to float32 rounding; gives what to note about them."""
    stored = StoredTensors({tensor.name: tensor for tensor in tensors})
    try:
        reading = target.read(Source(stored, Settings.declared(target.layout, writing.settings, target.keys)))
    except (InputError, ConfigError) as error:
        found = f"{target.name} cannot express this model: {error.found}"
        raise UsageError(found, error.expected, "convert to another format") from error
    differences = list(_differences(config.to_dict(), reading.config.to_dict()))
    rounded = [name for name, wanted, got in differences if name in SCHEDULES and _equal_as_float32(wanted, got)]
    lost = [_lost(*difference) for difference in differences if difference[0] not in rounded]
    if lost:
        found = f"{target.name} cannot express: {', '.join(lost)}"
        raise UsageError(found, action="it would read what is in brackets; convert to another format")
    map_weights(stored, reading)
    return tuple(f"{target.name} computes {name} in float32, which differs in the last bits" for name in rounded)


def _equal_as_float32(wanted: object, got: object) -> bool:
    a, b = np.array(wanted, np.float64), np.array(got, np.float64)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= SCHEDULE_ROUNDING * np.maximum(np.abs(a), np.abs(b))))


def _differences(a: object, b: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif a != b:
        yield path, a, b


def _lost(field: str, wanted: object, got: object) -> str:
    a, b = (f"{value:g}" if isinstance(value, float) else repr(value) for value in (wanted, got))
    return field if a == b or len(a + b) > MAX_SHOWN else f"{field} = {a} ({b})"


def shard(tensors: Sequence[PlannedTensor], limit: int) -> tuple[dict[str, list[PlannedTensor]], dict[str, Any] | None]:
    """Tensors in safetensors files of at most `limit` bytes of data, and the index if there are several files."""
    if limit < 1:
        raise UsageError(f"max_shard_size is {limit}", "a positive number of bytes")
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SAFETENSORS_FILE: shards[0]}, None
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}
    weight_map = {tensor.name: file for file, part in files.items() for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors)
    return files, {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_checkpoint(path: Path, plan: Conversion, *, force: bool, progress: ByteProgress | None) -> list[Path]:
    """Write a checkpoint folder; one that is replaced keeps its files of other names.

    Memory: one block of a tensor (16 MB), or a whole one where its format transforms it.

    Args:
        progress: called with the bytes of each tensor once it is written.

    Returns:
        The files written.

    Raises:
        UsageError, OutputError: as `staging.staged_folder`; nothing new is left behind.
        InputError: a tensor that cannot be read or does not fit its type.
    """
    if len(set(plan.files)) < len(plan.files):
        raise OutputError("an extra file has the name of a file of the checkpoint", "another name", "rename it")
    with staged_folder(
        path,
        marker=plan.marker,
        required_bytes=plan.nbytes + _OTHER_BYTES,
        force=force,
        ours=CONFIG_NAMES,
        stale=lambda: _checkpoint_files(path) - set(plan.files),
    ) as folder:
        for name, tensors in plan.weights.items():
            write = write_safetensors if name.endswith(".safetensors") else write_torch
            write(folder / name, tensors, progress)
        for file in plan.copies:
            shutil.copyfile(file, folder / file.name)
        for name, make_text in plan.texts.items():
            (folder / name).write_text(make_text(), encoding="utf-8")
        for name, document in plan.documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [path / name for name in plan.files]


def _checkpoint_files(path: Path) -> set[str]:
    """Names of configurations and weights, which would be read beside others."""
    return {*CONFIG_NAMES, SAFETENSORS_FILE, INDEX_FILE, TORCH_FILE, *(file.name for file in path.glob(SHARD_PATTERN))}
