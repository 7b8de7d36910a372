"""Our own format: `config.json` beside `model.safetensors`, or beside shards and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import InputError
from retnet_tools.formats.conversion import DEFAULT_SHARD_SIZE, plan_conversion, write_checkpoint
from retnet_tools.formats.mapping import check_layer_count
from retnet_tools.formats.settings import Keys, Only
from retnet_tools.formats.spec import CONFIG_FILE, FormatSpec, Reading, Source, Writing
from retnet_tools.formats.storage import StoredTensors, planned
from retnet_tools.progress import ByteProgress
from retnet_tools.weights import Array, WeightSource, canonical_shapes

FORMAT_NAME = "retnet-tools"
FORMAT_VERSION = 1
ASSUMED_CLAMP = "assumed_clamp"
MARK = "layers.0.retention_norm.weight"


def _read(source: Source) -> Reading:
    version, stored = source.settings.raw("format_version"), source.settings.raw("config")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{CONFIG_FILE} has format_version {version!r}", str(FORMAT_VERSION), "upgrade retnet-tools")
    config = RetNetConfig.from_dict({} if stored is None else stored)
    check_layer_count(config, source.stored)
    names = {name: name for name in canonical_shapes(config)}
    assumed = source.settings.flag(ASSUMED_CLAMP, False)
    return Reading(config, f"{FORMAT_NAME} {version}", names, assumed_clamp=assumed)


def _write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
    settings = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    assumed = {ASSUMED_CLAMP: True} if assumed_clamp else {}
    return Writing(settings | assumed, names={name: name for name in canonical_shapes(config)})


def write_canonical(
    path: Path,
    config: RetNetConfig,
    weights: Mapping[str, Array] | WeightSource,
    *,
    dtype: FloatName | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    extra_files: Sequence[Path] = (),
    progress: ByteProgress | None = None,
) -> list[Path]:
    """Write a checkpoint in our own format; see `plan_conversion` and `write_checkpoint` for arguments and errors.

    Memory: one block of a tensor (16 MB), or a whole one where its format transforms it.

    Returns:
        The files written.
    """
    if isinstance(weights, Mapping):
        weights = StoredTensors({name: planned(name, array) for name, array in weights.items()})
    plan = plan_conversion(config, weights, CANONICAL, dtype=dtype, max_shard_size=max_shard_size, copies=extra_files)
    return write_checkpoint(path, plan, force=force, progress=progress)


CANONICAL = FormatSpec(
    name="canonical",
    layout="retnet-tools",
    keys=Keys(
        read=frozenset({"format_version", "config", ASSUMED_CLAMP}),
        only={"format": Only((FORMAT_NAME,), f'"{FORMAT_NAME}"')},
    ),
    is_settings=lambda document: document.get("format") == FORMAT_NAME,
    settings_words=f'"format": "{FORMAT_NAME}"',
    marks=(MARK,),
    names=(MARK,),
    read=_read,
    write=_write,
)
