"""Which part of a trainer's file is taken, and what is found beside it."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import random
import sys
import types
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats.files import CheckpointFiles

STATE = {"embed.weight": torch.arange(12.0).view(3, 4), "layers.0.norm.bias": torch.ones(4), "count": torch.tensor(3)}
OTHER = {name: tensor * 2 for name, tensor in STATE.items()}
AVERAGE = {"n_averaged": torch.tensor(7), **{f"module.{name}": tensor for name, tensor in STATE.items()}}


def save(folder: Path, tree: object, name: str = "model.pt") -> CheckpointFiles:
    torch.save(tree, folder / name)
    return CheckpointFiles(folder / name)


def assert_holds(files: CheckpointFiles, state: dict[str, torch.Tensor]) -> None:
    assert list(files.tensors.names()) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(files.tensors.read(name), tensor.detach().numpy())


@pytest.mark.parametrize(
    "path", ["", "model", "module", "net", "model_state", "app.model", "a.b.c.weights", "best_model", "0", "modelState"]
)
def test_the_state_dict_is_found_under_any_key(tmp_path: Path, path: str) -> None:
    tree: Any = dict(STATE)
    for key in reversed(path.split(".") if path else ()):
        tree = [tree] if key == "0" else {key: tree, "epoch": 3, "best": torch.tensor(2.5)}
    assert_holds(save(tmp_path, tree), STATE)


def test_five_keys_deep_is_too_deep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no state dict"):
        save(tmp_path, {"a": {"b": {"c": {"d": {"e": STATE}}}}}).tensors  # noqa: B018


@pytest.mark.parametrize(
    "beside",
    [
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"params": [0]}]}},
        {"optimizer": {"state": {"embed.weight": {"exp_avg": torch.ones(3, 4)}}}},
        {"opt": {"embed.weight": torch.ones(3, 4)}},
        {"lastOptimizerState": {"embed.weight": torch.ones(3, 4)}},
        {"sgd": {"state": {"embed.weight": {"momentum_buffer": torch.ones(3, 4)}}}},
        {"lr_scheduler": {"table.values": torch.ones(3, 4)}},
        {"rng_state": {"cuda.0": torch.ones(3, 4)}},
        {"callbacks": {"x": {"a.ckpt": torch.ones(3, 4)}}},
        {"normalizer": {"mean": torch.ones(4), "std": torch.ones(4)}},
        {"best_k_models": {"a.ckpt": torch.tensor(2.0)}},
        {"grads": {"embed.weight": torch.ones(3, 4)}},
    ],
    ids=lambda tree: next(iter(tree)),
)
def test_what_trainers_keep_beside_the_weights_is_no_state_dict(tmp_path: Path, beside: dict[str, Any]) -> None:
    files = save(tmp_path, {**beside, "weights": STATE})
    assert_holds(files, STATE)
    assert files.notes == []


def test_several_state_dicts_are_named_and_one_can_be_chosen(tmp_path: Path) -> None:
    files = save(tmp_path, {"student": STATE, "teacher": OTHER})
    with pytest.raises(InputError, match=r"several sets of weights: student, teacher; expected one; .*--entry NAME"):
        files.tensors  # noqa: B018
    assert_holds(CheckpointFiles(files.path, entry="teacher"), OTHER)
    with pytest.raises(UsageError, match=r"no entry 'teachr' in model\.pt; expected one of student, teacher; did you"):
        CheckpointFiles(files.path, entry="teachr").tensors  # noqa: B018


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lamb", "muon", "adafactor", "adagrad", "rmsprop", "optim"])
def test_an_optimizer_of_any_name_is_no_state_dict(name: str, tmp_path: Path) -> None:
    assert_holds(save(tmp_path, {f"{name}_state": {"embed.weight": torch.ones(3, 4)}, "weights": STATE}), STATE)


AVERAGES = ["model_ema", "ema", "modelEMA", "swa_model", "shadow_params", "averaged_model", "polyak", "avg", "averages"]


@pytest.mark.parametrize("key", AVERAGES)
def test_an_average_beside_the_weights_is_noted_and_can_be_chosen(tmp_path: Path, key: str) -> None:
    files = save(tmp_path, {key: OTHER, "model": STATE})
    assert_holds(files, STATE)
    assert files.notes == [f"the file also holds {key}, an average of these weights: --entry {key} reads it"]
    chosen = CheckpointFiles(files.path, entry=key)
    assert_holds(chosen, OTHER)
    assert chosen.notes == []
    alone = save(tmp_path, {key: OTHER}, "alone.pt")
    assert_holds(alone, OTHER)
    assert alone.notes == [f"these weights are {key}, an average"]


def test_an_average_inside_the_state_dict(tmp_path: Path) -> None:
    """As a Lightning module holds both."""
    tree = {"state_dict": {f"{key}.{n}": t for key, s in (("net", STATE), ("ema", OTHER)) for n, t in s.items()}}
    files = save(tmp_path, tree)
    assert_holds(files, {f"net.{name}": tensor for name, tensor in STATE.items()})
    assert "--entry state_dict.ema" in files.notes[0]
    chosen = CheckpointFiles(files.path, entry="state_dict.ema")
    assert_holds(chosen, {f"ema.{name}": tensor for name, tensor in OTHER.items()})


def test_the_count_of_an_averaged_model_is_no_weight(tmp_path: Path) -> None:
    files = save(tmp_path, {**AVERAGE, "iteration": 5})
    assert_holds(files, {f"module.{name}": tensor for name, tensor in STATE.items()})
    assert files.notes == ["these weights are an average of a training run's (n_averaged)"]
    assert files.embedded == {"": {"iteration": 5}}


def test_one_state_dict_under_two_keys_is_one(tmp_path: Path) -> None:
    assert_holds(save(tmp_path, {"model": STATE, "state_dict": dict(STATE)}), STATE)


def test_parameters_buffers_and_attributes(tmp_path: Path) -> None:
    named = torch.nn.Parameter(torch.ones(2, 3))
    named.tensor_model_parallel = False  # type: ignore[attr-defined]
    parameters = torch.nn.ParameterDict({"a": torch.ones(2, 3), "b": torch.zeros(2)})
    state = {"a.w": named, "a.b": torch.nn.Buffer(torch.zeros(2)), "a.c": torch.nn.Parameter(torch.zeros(3))}
    assert_holds(save(tmp_path, {"state": state, "optimizer": None}), state)
    assert_holds(save(tmp_path, parameters.state_dict(), "dict.pt"), dict(parameters.state_dict()))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_gives_its_state_dict(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("dropped", torch.ones(2), persistent=False)
    torch.save({"model": module, "epoch": 2}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    files = CheckpointFiles(tmp_path / "model.pt")
    expected = module.state_dict()
    assert set(files.tensors.names()) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(files.tensors.read(name), tensor.numpy())


@dataclass
class ModelCheckpoint:
    state_dict: dict[str, Any]
    optimizer_state: dict[str, Any]
    config: Any
    current_epoch: int = 3


@dataclass
class TrainConfig:
    d_model: int
    activation: str
    output: pathlib.Path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_dataclass_of_a_module_that_is_not_there(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As yet-another-retnet's training script writes `__main__.ModelCheckpoint`."""
    module = types.ModuleType("a_training_script")
    for kind in (ModelCheckpoint, TrainConfig):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = TrainConfig(16, "gelu", pathlib.Path("out") / "run")
    tree = ModelCheckpoint(STATE, {"state": {0: {"exp_avg": torch.ones(3, 4)}}}, config)
    torch.save(tree, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, module.__name__)
    files = CheckpointFiles(tmp_path / "model.pt")
    assert_holds(files, STATE)
    assert files.embedded["config"] == {"d_model": 16, "activation": "gelu", "output": "out/run"}
    assert files.embedded[""]["current_epoch"] == 3
    assert module.__name__ not in sys.modules


class Choice(enum.Enum):
    GELU = "gelu"


def test_settings_are_found_by_path_and_are_plain(tmp_path: Path) -> None:
    args = argparse.Namespace(decoder_embed_dim=8, choice=Choice.GELU, dtype=torch.bfloat16, nested={"a": (1, [2.5])})
    tree = {
        "model": STATE,
        "args": args,
        "cfg": {"model": argparse.Namespace(arch="retnet", tensor=torch.ones(2), array=np.ones(3)), "seed": 1},
        "hyper_parameters": {"vocab_size": np.int64(50257), "lr": np.float32(0.5), "flag": np.bool_(True)},
    }
    embedded = save(tmp_path, tree).embedded
    assert embedded["args"] == {
        "decoder_embed_dim": 8,
        "choice": "gelu",
        "dtype": "bfloat16",
        "nested": {"a": [1, [2.5]]},
    }
    assert embedded["args.nested"] == {"a": [1, [2.5]]}
    assert embedded["cfg.model"] == {"arch": "retnet"}
    assert embedded["cfg"] == {"model": {"arch": "retnet"}, "seed": 1}
    assert embedded["hyper_parameters"] == {"vocab_size": 50257, "lr": 0.5, "flag": True}
    assert embedded[""] == {name: embedded[name] for name in ("args", "cfg", "hyper_parameters")}


class AnyNode:
    def __init__(self, value: object, parent: object) -> None:
        self._val, self._parent, self._metadata = value, parent, None


class DictConfig:
    def __init__(self, content: dict[str, object]) -> None:
        self._metadata, self._parent = None, None
        self._content = {
            name: DictConfig(value) if isinstance(value, dict) else AnyNode(value, self)
            for name, value in content.items()
        }


def test_settings_in_omegaconf_are_its_contents(tmp_path: Path) -> None:
    """Its containers hold nodes that refer back to them."""
    tree = {"model": STATE, "cfg": DictConfig({"model": {"embed": 8, "name": "retnet"}, "seed": 1})}
    embedded = save(tmp_path, tree).embedded
    assert embedded["cfg.model"] == {"embed": 8, "name": "retnet"}
    assert embedded["cfg"] == {"model": {"embed": 8, "name": "retnet"}, "seed": 1}


class Made:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_numbers_of_numpy_are_read_as_they_are_or_not_at_all(tmp_path: Path) -> None:
    scalar = np.float64(1.0).__reduce__()[0]
    settings = {
        "native": np.float64(1.5),
        "little": Made(scalar, np.dtype("<f8"), np.array(2.5, "<f8").tobytes()),
        "big": Made(scalar, np.dtype(">f8"), np.array(3.5, ">f8").tobytes()),
        "short": np.int16(-3),
    }
    read = save(tmp_path, {"args": settings, "model": STATE}).embedded["args"]
    assert read == {"native": 1.5, "little": 2.5, "short": -3}


def test_a_tensor_of_a_device_is_read_where_it_keeps_its_type(tmp_path: Path) -> None:
    rebuild, values = torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(3, 4)
    same = {"a.weight": Made(rebuild, values, torch.float32, "cpu", False)}
    assert_holds(save(tmp_path, same), {"a.weight": values})
    other = {"a.weight": Made(rebuild, values, torch.bfloat16, "cpu", False)}
    with pytest.raises(InputError, match=r"'a\.weight' in other\.pt is a device's own"):
        save(tmp_path, other, "other.pt").tensors  # noqa: B018


def test_settings_that_contain_themselves(tmp_path: Path) -> None:
    config: dict[str, Any] = {"size": 8}
    config["self"] = config
    shared: Any = [1]
    for _ in range(100):
        shared = [shared, shared]
    files = save(tmp_path, {"model": STATE, "config": config, "shared": shared})
    assert files.embedded["config"] == {"size": 8, "self": {"size": 8}}


def everything() -> dict[str, Any]:
    """What trainers keep in their files, and what torch's own reader of weights allows."""
    scalars = [np.float64(3.5), np.int32(1), np.bool_(False), np.str_("x")]
    arrays = [np.ones(3), np.array(["a"]), np.ones((2, 2), order="F"), np.array([{}], dtype=object), np.ma.ones(2)]
    generator = torch.Generator()
    return {
        "numpy": [*scalars, *arrays, np.dtype("f4"), np.float32, np.random.RandomState(0), np.random.default_rng(0)],
        "random": [np.random.RandomState(0).get_state(), random.Random(0).getstate(), random.Random(0)],
        "torch": [torch.bfloat16, torch.device("cpu"), torch.Size([2]), torch.strided, torch.per_tensor_affine],
        "more": [generator.get_state(), torch.tensor([1j]), torch.ones(2).storage(), torch.ones(2).untyped_storage()],
        "sparse": [torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)],
        "typed": [torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.uint16), torch.ones(2, device="meta")],
        "classes": [torch.optim.AdamW, torch.nn.functional.gelu, dict, int, collections.OrderedDict],
        "collections": [collections.Counter("aab"), collections.defaultdict(list, a=[1]), collections.deque([1])],
        "sets": [{1, 2}, frozenset({1}), {(1, (2, 3))}, bytearray(b"a"), b"\xff", 1j, slice(1, 2), range(3)],
        "dates": [datetime.datetime(2023, 7, 17), datetime.date(2023, 7, 17), datetime.timedelta(1), datetime.UTC],
        "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.uuid4(), 10**400, -(10**30)],
        "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d")],
        "objects": [
            types.SimpleNamespace(a=1),
            argparse.Namespace(b=2),
            Choice.GELU,
            functools.partial(torch.optim.SGD),
        ],
        "nested": {(1, 2): 3, None: 4, ((1,), 2): 5, "\ud800": 6},
        "iterators": [iter([1]), enumerate([1]), zip([1], [2], strict=False), reversed([1])],
    }


KINDS = (
    *("numpy", "random", "torch", "more", "sparse", "typed", "classes", "collections", "sets", "dates", "numbers"),
    *("paths", "objects", "nested", "iterators"),
)


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.quantize_per_tensor", "ignore:Sparse")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", KINDS)
def test_what_lies_beside_the_weights_is_read_over(tmp_path: Path, key: str, zipped: bool, protocol: int) -> None:
    known = everything()
    assert tuple(known) == KINDS
    tree = {key: known[key], "model": STATE}
    if protocol == 5 and key == "numpy":
        tree[key] = [value for value in tree[key] if not isinstance(value, np.ndarray)]  # out-of-band buffers
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(tree, tmp_path / "model.pt", **options)
    assert_holds(CheckpointFiles(tmp_path / "model.pt"), STATE)


def test_everything_that_torch_allows_is_known() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    from retnet_tools.formats.stand_ins import CALLS, look_up

    names = list(_get_allowed_globals())
    assert len(names) > 80
    for name in names:
        look_up(*name.rsplit(".", 1))
        if "_rebuild" in name or name.startswith(("collections.", "builtins.", "_codecs.")):
            assert name in CALLS, name
