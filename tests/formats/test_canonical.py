"""Our own format: what is written is what is read, bit for bit, and nothing half-written looks finished."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.weights import TensorInfo, canonical_shapes
from tests.formats.cases import write_torchscale
from tests.helpers import ABLATIONS, BASE, MemorySource, random_source

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
SMALL = replace(BASE, num_layers=1)


def assert_same(path: Path, config: RetNetConfig, source: MemorySource) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "retnet-tools 1"
    assert checkpoint.config == config
    assert list(checkpoint.weights.names()) == list(canonical_shapes(config))
    for name, expected in source.tensors.items():
        assert checkpoint.weights.info(name) == TensorInfo(expected.shape, expected.dtype)
        found = checkpoint.weights.read(name)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_configuration_is_read_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = random_source(ABLATIONS[name], seed=1)
    write_canonical(tmp_path / "out", ABLATIONS[name], source)
    assert_same(tmp_path / "out", ABLATIONS[name], source)


@settings(max_examples=25, deadline=None)
@given(
    config=st.sampled_from(list(ABLATIONS.values())),
    layers=st.integers(1, 3),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=4),
    shard=st.sampled_from([1, 3000, 20_000, 5_000_000_000]),
    seed=st.integers(0, 1000),
)
def test_any_layers_dtypes_and_shards_are_read_back_bit_for_bit(
    config: RetNetConfig, layers: int, dtypes: list[str], shard: int, seed: int
) -> None:
    config = replace(config, num_layers=layers)
    tensors = random_source(config, seed).tensors
    mixed = {name: a.astype(DTYPES[dtypes[n % len(dtypes)]]) for n, (name, a) in enumerate(tensors.items())}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        written = write_canonical(out, config, mixed, max_shard_size=shard)
        assert_same(out, config, MemorySource(mixed))
        assert sorted(out.iterdir()) == sorted(written)
        assert open_checkpoint(out).source_files[0] == out / "config.json"
        shards = list(out.glob("*.safetensors"))
        assert (len(shards) == 1) == (shard > sum(a.nbytes for a in mixed.values()))


def test_files_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    source = random_source(SMALL, seed=2)
    write_canonical(tmp_path, SMALL, source)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == source.tensors.keys()
    for name, expected in source.tensors.items():
        np.testing.assert_array_equal(loaded[name], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_rounds_each_tensor(tmp_path: Path, dtype: str) -> None:
    source = random_source(SMALL, seed=3, dtype=np.float64)
    progress: list[int] = []
    write_canonical(tmp_path, SMALL, source, dtype=dtype, progress=progress.append)
    weights = open_checkpoint(tmp_path).weights
    for name, expected in source.tensors.items():
        np.testing.assert_array_equal(weights.read(name), expected.astype(DTYPES[dtype]))
    assert sum(progress) == sum(a.size * DTYPES[dtype].itemsize for a in source.tensors.values())


def test_values_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    tensors = random_source(SMALL, seed=4).tensors
    tensors["layers.0.ffn.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(InputError, match=r"'layers\.0\.ffn\.up_proj\.weight' has the value 1e.06, which float16"):
        write_canonical(tmp_path / "out", SMALL, tensors, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_source_is_streamed_one_tensor_at_a_time(tmp_path: Path) -> None:
    class Counting(MemorySource):
        def read(self, name: str) -> Any:
            reads.append(name)
            return super().read(name)

    reads: list[str] = []
    write_canonical(tmp_path, SMALL, Counting(random_source(SMALL, seed=5).tensors))
    assert reads == list(canonical_shapes(SMALL))


def test_an_existing_checkpoint_is_kept_unless_forced(tmp_path: Path) -> None:
    first, second = random_source(SMALL, seed=6), random_source(BASE, seed=7)
    write_canonical(tmp_path, SMALL, first, max_shard_size=5000)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "heldout.txt").write_text("text")
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        write_canonical(tmp_path, BASE, second)
    assert_same(tmp_path, SMALL, first)
    write_canonical(tmp_path, BASE, second, force=True)
    assert_same(tmp_path, BASE, second)
    names = {"config.json", "model.safetensors", "tokenizer.json", "heldout.txt"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert open_checkpoint(tmp_path).tokenizer_files == [tmp_path / "tokenizer.json"]


def test_a_checkpoint_can_be_converted_in_place(tmp_path: Path) -> None:
    source = random_source(SMALL, seed=8)
    write_canonical(tmp_path, SMALL, source)
    write_canonical(tmp_path, SMALL, open_checkpoint(tmp_path).weights, dtype="float16", force=True)
    assert_same(tmp_path, SMALL, MemorySource({k: v.astype(np.float16) for k, v in source.tensors.items()}))


def test_extra_files_are_copied(tmp_path: Path) -> None:
    tokenizer = tmp_path / "dict.txt"
    tokenizer.write_text("a 1\n")
    checkpoint = open_checkpoint(write_torchscale(tmp_path))
    assert checkpoint.tokenizer_files == [tokenizer]
    write_canonical(tmp_path / "out", checkpoint.config, checkpoint.weights, extra_files=checkpoint.tokenizer_files)
    converted = open_checkpoint(tmp_path / "out")
    assert converted.tokenizer_files == [tmp_path / "out" / "dict.txt"]
    assert converted.config == checkpoint.config
    for name in checkpoint.weights.names():
        np.testing.assert_array_equal(converted.weights.read(name), checkpoint.weights.read(name))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_leaves_no_trace(tmp_path: Path, error: BaseException, existing: bool) -> None:
    class Failing(MemorySource):
        def read(self, name: str) -> Any:
            if name == "final_norm.weight":
                raise error
            return super().read(name)

    before = random_source(SMALL, seed=9)
    out = tmp_path / "out"
    if existing:
        write_canonical(out, SMALL, before)
    kind = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="the disk is full" if kind is OutputError else None):
        write_canonical(out, SMALL, Failing(random_source(SMALL, seed=10).tensors), force=True)
    if existing:
        assert_same(out, SMALL, before)
    else:
        assert not out.exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_arguments(tmp_path: Path) -> None:
    tensors = random_source(SMALL, seed=12).tensors
    with pytest.raises(UsageError, match="dtype 'int8'"):
        write_canonical(tmp_path / "out", SMALL, tensors, dtype="int8")
    with pytest.raises(UsageError, match="max_shard_size"):
        write_canonical(tmp_path / "out", SMALL, tensors, max_shard_size=0)
    with pytest.raises(InputError, match="unknown tensor 'extra'"):
        write_canonical(tmp_path / "out", SMALL, {**tensors, "extra": np.zeros(1)})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write_canonical(tmp_path / "file", SMALL, tensors)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="an extra file"):
        write_canonical(tmp_path / "out", SMALL, tensors, extra_files=[tmp_path / "config.json"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version 2; expected 1; upgrade"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": True}, "format_version True"),
        ({"format_version": 1.0}, r"format_version 1\.0"),
        ({"config": {}}, "has no field"),
        ({"config": []}, "config is list"),
    ],
    ids=["newer", "no version", "true", "float", "empty", "list"],
)
def test_broken_configurations_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    write_canonical(tmp_path, SMALL, random_source(SMALL, seed=13))
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(InputError, match=match):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 5),
        ("num_layers", 10**12),
        ("decay", "0000"),
        ("extra", 1),
        ("gate", []),
        ("tie_word_embeddings", "false"),
        ("final_norm", "no"),
        pytest.param("residual_alpha", 10**400, id="residual_alpha-huge"),
        ("head_norm", {"kind": "rms", "eps": 10**400}),
        ("decay", [10**400] * 4),
        ("num_kv_groups", True),
    ],
)
def test_invalid_fields_are_input_errors(tmp_path: Path, field: str, value: object) -> None:
    write_canonical(tmp_path, SMALL, random_source(SMALL, seed=14))
    document = json.loads((tmp_path / "config.json").read_text())
    document["config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=field.removeprefix("num_")) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.exit_code == 5


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    write_canonical(tmp_path, SMALL, random_source(SMALL, seed=15))
    text = (tmp_path / "config.json").read_text()
    assert '"gate": "silu"' in text
    (tmp_path / "config.json").write_text(text.replace('"gate": "silu"', '"gate": "relu", "gate": "silu"'))
    with pytest.raises(InputError, match=r"config\.json cannot be read as JSON \(the name 'gate' occurs twice\)"):
        open_checkpoint(tmp_path)
