"""Folders that hold another thing than a RetNet in float weights."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from retnet_tools.errors import InputError
from retnet_tools.formats import FORMATS, open_checkpoint
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.foreign import refuse_foreign
from retnet_tools.formats.spec import FormatSpec
from tests.formats.cases import CONFORMANCE, refusal

RETNET = {"model_type": "retnet", "architectures": ["RetNetForCausalLM"], "quantization_config": None}
STATE = {"model.layers.0.attn.q_proj.weight": torch.ones(2, 3), "lm_head.weight": torch.ones(4, 3)}
LINEAR = "model.layers.0.attn.q_proj"


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        refuse_foreign(CheckpointFiles(path))
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)
    assert caught.value.action
    assert caught.value.exit_code == 5


def folder(path: Path, config: dict[str, Any], state: dict[str, torch.Tensor], torch_file: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if torch_file:
        torch.save(state, path / "pytorch_model.bin")
    else:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def more(*names: str, dtype: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    return STATE | {f"{LINEAR}.{name}": torch.ones(2, 3).to(dtype) for name in names}


@pytest.mark.parametrize("path", sorted(CONFORMANCE.iterdir()), ids=lambda path: path.name)
def test_real_checkpoints_are_not_refused(path: Path) -> None:
    found = 0
    for file in path.rglob("*"):
        if file.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt") or file.name == ".metadata":
            refuse_foreign(CheckpointFiles(file))
            found += 1
    assert found


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq weights"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors weights"),
        ({"architectures": ["RetNetForSequenceClassification"]}, "head of a classifier"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "is a llama checkpoint, no RetNet"),
        ({"model_type": "a_new_kind"}, "is a a_new_kind checkpoint, no RetNet"),
        ({"model_type": "x" * 300}, "checkpoint, no RetNet"),
        ({"quantization_config": {"quant_method": "y" * 300}}, "weights"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_told_by_the_configuration(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    refused(folder(tmp_path / ("model" + "-long" * 30), RETNET | config, STATE), match)


def test_a_wrapper_of_another_name_is_not_refused(tmp_path: Path) -> None:
    state = {"decoder_stack.layers.0.retention.q_proj.weight": torch.ones(2, 3)}
    refuse_foreign(CheckpointFiles(folder(tmp_path, {"model_type": "my_wrapper"}, state)))
    refuse_foreign(CheckpointFiles(folder(tmp_path, RETNET, STATE)))


def test_a_configuration_of_another_model_beside_that_of_the_retnet_is_not_refused(tmp_path: Path) -> None:
    made = folder(tmp_path, RETNET, STATE)
    (made / "teacher.json").write_text(json.dumps({"model_type": "llama"}))
    refuse_foreign(CheckpointFiles(made))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (more("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes-quantized"),
        (more("SCB"), "bitsandbytes-quantized"),
        (more("weight.quant_state.bitsandbytes__fp4"), "bitsandbytes-quantized"),
        (more("weight_format"), "bitsandbytes-quantized"),
        (more("weight_packed", "weight_shape"), "compressed-tensors-quantized"),
        (more("W_q"), "HQQ-quantized"),
        (more("_packed_params._packed_params"), "torch-quantized"),
        (more("input_scale"), "fp8 or int8-quantized"),
        (more("lora_B.default.weight"), "holds an adapter"),
        (more("lora_magnitude_vector"), "holds an adapter"),
        (more("ia3_l"), "holds an adapter"),
        (more("hada_w1_a"), "holds an adapter"),
        (more("qweight", "qzeros", "scales", "g_idx"), "GPTQ-quantized"),
        (more("qweight", "qzeros", "scales"), "AWQ or GPTQ-quantized"),
        (more("weight_scale_inv"), "fp8 or int8-quantized"),
        (more("other.weight", dtype=torch.float8_e5m2), "fp8-quantized"),
        (more("lora_A.weight"), "holds an adapter"),
        (STATE | {"score.weight": torch.ones(2, 3)}, "head of a classifier"),
        (STATE | {"classifier.out_proj.weight": torch.ones(2, 3)}, "head of a classifier"),
        (STATE | {"classifier.dense.weight": torch.ones(2, 3)}, "head of a classifier"),
        (STATE | {"model.classifier.weight": torch.ones(2, 3)}, "head of a classifier"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("torch_file", [True, False], ids=["torch", "safetensors"])
def test_told_by_the_tensors(tmp_path: Path, state: dict[str, torch.Tensor], match: str, torch_file: bool) -> None:
    refused(folder(tmp_path, RETNET, state, torch_file), match)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


class Wrapper(torch.Tensor):
    """A tensor without storage of its own, as torchao's are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: torch.Tensor) -> None:
        self.data_of_it = data

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*(a.data_of_it if isinstance(a, Wrapper) else a for a in arguments), **(options or {}))


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torchao.dtypes")
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Wrapper, "__module__", module.__name__)
    module.Wrapper = Wrapper  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torchao")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (lambda: torch.ones(2, 3, device="meta"), "on the meta device, without data"),
        (lambda: torch.eye(3).to_sparse(), "is sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
        (quantized, "torch-quantized weights"),
        (lambda: Wrapper(torch.ones(2, 3)), "torchao-quantized weights"),
        (lambda: torch.ones(2, 3).to(torch.float8_e4m3fn), "fp8-quantized"),
        (lambda: torch.ones(2, 3).to(torch.complex64), "complex-valued"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_tensors_that_are_no_plain_numbers(tmp_path: Path, tensor: Any, match: str, zipped: bool) -> None:
    state = {"layers.0.weight": torch.ones(2, 3), "layers.0.other": tensor()}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("retnet.json", "ONNX export of retnet-tools"),
        ("genai_config.json", "onnxruntime-genai"),
        ("adapter_config.json", "adapter"),
        ("adapter_model.safetensors", "adapter"),
        ("adapter_model.bin", "adapter"),
        ("manifest.ocdbt", "JAX checkpoint"),
        ("_CHECKPOINT_METADATA", "JAX checkpoint"),
    ],
)
def test_told_by_a_file_of_the_folder(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / name).write_text("{}")
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("flax_model.msgpack", b"\x82\xa6params", r"JAX/Flax checkpoint \(msgpack\) \(flax_model"),
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n", "HDF5/Keras"),
        ("model.gguf", b"GGUF", "GGUF"),
        ("step.onnx", b"\x08\x0a\x12\x07pytorch", "ONNX graph"),
        ("model.ckpt.data-00000-of-00001", b"\0", "TensorFlow"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("part.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("last.pt", b"", "last.pt is empty"),
    ],
)
def test_folders_of_other_weights(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RETNET))
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, match)


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "is an empty folder")
    (tmp_path / "step-8").mkdir()
    refuse_foreign(CheckpointFiles(tmp_path))
    (tmp_path / "step-8" / ".metadata").write_bytes(b"")
    refused(tmp_path, r"holds checkpoints in folders \(step-8\); expected one of them; name step-8")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"], "checkpoint-1000"),
        (["checkpoint/step-9/.metadata", "checkpoint/step-10/.metadata"], "checkpoint/step-10"),
        (["snapshots/0a1b/model.safetensors.index.json", "refs/main"], "snapshots/0a1b"),
    ],
    ids=["trainer", "flame", "hub"],
)
def test_a_folder_of_folders_names_the_last_checkpoint_in_it(tmp_path: Path, files: list[str], named: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, f"; expected one of them; name {named} in it")


@pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("told", ["tensors", "configuration"])
def test_what_is_nearest_is_said_in_a_line(spec: FormatSpec, told: str, tmp_path: Path) -> None:
    folder = tmp_path / ("a-long-name" * 10)
    folder.mkdir()
    names = spec.marks if told == "tensors" else ("other." + name.format(i=0, h=0) for name in list(spec.names)[-1:])
    save_file({name: torch.ones(2, 2) for name in names}, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def test_a_model_beside_an_adapter_and_a_trainers_state_alone_are_told(tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(CONFORMANCE / "fla_base/hf_safetensors", both)
    (both / "adapter_config.json").write_text("{}")
    refused(both, r"both holds a model and an adapter.*name model\.safetensors")
    assert open_checkpoint(both / "model.safetensors").config.num_layers == 2
    state = tmp_path / "state"
    state.mkdir()
    torch.save({"state": {}}, state / "optimizer.pt")
    refused(state, r"state holds a trainer's state \(optimizer\.pt\)")


def test_only_folders_that_hold_tensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").write_bytes(bytes(range(256)))
    refusal(tmp_path, "no weights in")


def test_tensors_of_one_layout_beside_the_configuration_of_another(tmp_path: Path) -> None:
    shutil.copy(CONFORMANCE / "fla_base/hf_safetensors/model.safetensors", tmp_path)
    shutil.copy(CONFORMANCE / "sd_base_gelu/hf_safetensors/config.json", tmp_path)
    refusal(tmp_path, "has tensors of flash-linear-attention, a configuration of syncdoth/RetNet")
