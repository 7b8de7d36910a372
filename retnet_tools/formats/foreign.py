"""Checkpoints that no format here can read, refused by what they are.

What a file's first bytes tell is refused when it is opened (see `content`); here is what takes the files of a folder,
its configuration or the names of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats.content import (
    DCP_FILE,
    STANDARD_WEIGHTS,
    TRAINERS_FILES,
    foreign_content,
    holds_weights,
    kind_of,
    quantized_error,
    short_name,
)
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.settings import words

_ADAPTER = "an adapter (PEFT), no model"
_ORBAX = "a JAX checkpoint (Orbax)", "convert it to safetensors first"
# Files that tell what a folder is, most telling first.
FOLDERS = {
    "retnet.json": ("an ONNX export of retnet-tools", "name the checkpoint it was exported from"),
    "genai_config.json": ("a model of onnxruntime-genai", "name the checkpoint it was made from"),
    "adapter_config.json": (_ADAPTER, "merge it into its base model (merge_and_unload) first"),
    "adapter_model.safetensors": (_ADAPTER, "merge it into its base model first"),
    "adapter_model.bin": (_ADAPTER, "merge it into its base model first"),
    "manifest.ocdbt": _ORBAX,
    "_CHECKPOINT_METADATA": _ORBAX,
}
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
CLASSIFIER_TENSORS = (".score.weight", ".classifier.weight", ".classifier.dense.weight", ".classifier.out_proj.weight")
ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_magnitude_vector", ".ia3_", ".hada_w1_a")
# What the libraries of quantized weights add to the names, by the end of a name.
QUANTIZED_ENDS = (
    ((".absmax", ".quant_map", ".SCB", ".weight_format", ".quant_state.bitsandbytes__nf4"), "bitsandbytes"),
    ((".quant_state.bitsandbytes__fp4",), "bitsandbytes"),
    ((".weight_scale_inv", ".weight_scale", ".input_scale"), "fp8 or int8"),
    ((".weight_packed", ".weight_shape"), "compressed-tensors"),
    ((".W_q",), "HQQ"),
    (("._packed_params", "._packed_params._packed_params"), "torch"),
)
RETNET_MARKS = ("retention", "retnet", "reten.", ".msr.", "xpos", "g_proj")
OTHER_ARCHITECTURES = words(
    """
    bart bert bloom delta_net distilbert falcon gemma gemma2 gemma3_text gla gpt2 gpt_neo gpt_neox gptj hgrn hgrn2 llama
    mamba mamba2 mistral mixtral opt phi phi3 qwen2 qwen3 roberta rwkv rwkv5 rwkv6 rwkv7 t5
    """
)


def refuse_foreign(files: CheckpointFiles) -> None:
    """Refuse what is known to be another thing than a RetNet in float weights.

    Raises:
        InputError: an export, an adapter, quantized weights, a classifier, another architecture, weights of another
            framework, an empty folder; one line of at most 200 characters.
    """
    if files.path.is_dir() and (mark := next((name for name in FOLDERS if (files.path / name).is_file()), None)):
        weights = files.weights_file
        if mark.startswith("adapter_") and weights is not None and not weights.name.startswith("adapter_"):
            found = f"{short_name(files.path)} holds a model and an adapter (PEFT)"
            action = f"name {short_name(weights)} for the model alone, or merge the adapter first"
            raise InputError(found, "one of them", action)
        what, action = FOLDERS[mark]
        raise InputError(f"{short_name(files.path)} is {what}", "a checkpoint", action)
    if files.weights_file is None:
        _refuse_folder(files.path)
        return
    kind_of(files.weights_file)
    folder, documents = files.weights_file.parent, list(files.configs.values())
    for document in documents:
        _refuse_document(folder, document)
    names = files.tensors.locations
    _refuse_names(files.weights_file, names)
    kinds = [document["model_type"] for document in documents if isinstance(document.get("model_type"), str)]
    if kinds and not any("retnet" in kind.lower() for kind in kinds):
        marked = any(mark in name for mark in RETNET_MARKS for name in names)
        if kinds[0] in OTHER_ARCHITECTURES or not marked:
            found = f"{short_name(folder)} is a {kinds[0][:40]} checkpoint, no RetNet"
            raise InputError(found, "a RetNet", "see docs/formats.md for the layouts that are read")


def _refuse_folder(folder: Path) -> None:
    """Refuse a folder without weights by the first of its files that is known for what it is."""
    inside, name = sorted(folder.iterdir()), short_name(folder)
    if not inside:
        raise InputError(f"{name} is an empty folder", "a checkpoint", "check the path")
    if parts := _checkpoints_in(folder):
        last = max(parts, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
        where = last.relative_to(folder).parent / short_name(last)
        names = ", ".join(part.name for part in parts)
        names = names if len(names) < 60 else f"{names[:56]} ..."
        raise InputError(f"{name} holds checkpoints in folders ({names})", "one of them", f"name {where} in it")
    for path in inside:
        if TRAINERS_FILES.fullmatch(path.name):
            raise InputError(f"{name} holds a trainer's state ({short_name(path)})", "weights", "save the model too")
        if path.is_file() and (found := foreign_content(path)) is not None:
            what, action = found
            raise InputError(f"{name} holds {what} ({short_name(path)})", "torch or safetensors", action)


def _checkpoints_in(folder: Path) -> list[Path]:
    """The folders in a folder that hold weights; those further down, as in runs of flame and caches of the hub, where
    they are called as usual."""
    if parts := [path for path in sorted(folder.iterdir()) if path.is_dir() and holds_weights(path)]:
        return parts
    patterns = [f"{depth}/{name}" for depth in ("*/*", "*/*/*") for name in (DCP_FILE, *STANDARD_WEIGHTS)]
    marks = [mark for pattern in patterns for mark in folder.glob(pattern)]
    return sorted({mark.parent for mark in marks if mark.is_file()})


def _refuse_document(folder: Path, document: dict[str, Any]) -> None:
    quantization = document.get("quantization_config") or document.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        found = f"{short_name(folder)} holds {str(method or 'quantized')[:30]} weights (quantization_config)"
        raise InputError(found, "floats", "use the checkpoint before quantization")
    architectures = document.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name.endswith(CLASSIFIERS):
            raise _classifier(folder, name)


def _refuse_names(file: Path, names: Iterable[str]) -> None:
    ends = {name.rsplit(".", 1)[-1] for name in names}
    if {"qweight", "qzeros", "scales"} <= ends:
        raise quantized_error(file, "GPTQ" if "g_idx" in ends else "AWQ or GPTQ")
    for name in names:
        if any(mark in name for mark in ADAPTER_MARKS):
            found = f"{short_name(file)} holds an adapter ({name[:60]!r})"
            raise InputError(found, "a whole model", "merge it into its base model")
        for marks, method in QUANTIZED_ENDS:
            if name.endswith(marks):
                raise quantized_error(file, method, name)
        if name.count(".") <= 3 and f".{name}".endswith(CLASSIFIER_TENSORS):
            raise _classifier(file, name)


def _classifier(path: Path, name: str) -> InputError:
    found = f"{short_name(path)} has the head of a classifier ({name[:60]})"
    return InputError(found, "a language model", "classifiers are not supported")
