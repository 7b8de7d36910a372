"""Checkpoints that torchscale itself wrote, and small ones made here in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from retnet_tools.errors import InputError
from retnet_tools.formats import open_checkpoint
from retnet_tools.weights import Array

CONFORMANCE = Path(__file__).parent.parent / "data" / "conformance"
TORCHSCALE_FILES = sorted(CONFORMANCE.glob("ts*/*.pt"))


def case_id(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def golden(file: Path) -> dict[str, Array]:
    with np.load(file.parent / "golden.npz") as arrays:
        return dict(arrays)


def case(file: Path) -> dict[str, Any]:
    return json.loads((file.parent / "case.json").read_text(encoding="utf-8"))


TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt", "dict.txt"),
)
"""What transformers (`VOCAB_FILES_NAMES` of its tokenizers) and fairseq call the files of a model's text."""

SETTINGS: dict[str, Any] = {
    "decoder_embed_dim": 8,
    "decoder_value_embed_dim": 12,
    "decoder_retention_heads": 2,
    "decoder_ffn_embed_dim": 10,
    "decoder_layers": 2,
    "activation_fn": "gelu",
    "vocab_size": 7,
    "torchscale_version": "HEAD",
}


def small_tensors(prefix: str = "") -> dict[str, Array]:
    """A tiny torchscale state dict of the current release."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (7, 8),
        "output_projection.weight": (7, 8),
        "layer_norm.weight": (8,),
        "retnet_rel_pos.angle": (4,),
        "retnet_rel_pos.decay": (2,),
    }
    for i in range(2):
        shapes |= {
            f"layers.{i}.retention.q_proj.weight": (8, 8),
            f"layers.{i}.retention.k_proj.weight": (8, 8),
            f"layers.{i}.retention.v_proj.weight": (12, 8),
            f"layers.{i}.retention.g_proj.weight": (12, 8),
            f"layers.{i}.retention.out_proj.weight": (8, 12),
            f"layers.{i}.retention_layer_norm.weight": (8,),
            f"layers.{i}.final_layer_norm.weight": (8,),
            f"layers.{i}.ffn.fc1.weight": (10, 8),
            f"layers.{i}.ffn.gate.weight": (10, 8),
            f"layers.{i}.ffn.fc2.weight": (8, 10),
        }
    rng = np.random.default_rng(0)
    tensors = {prefix + name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors[f"{prefix}retnet_rel_pos.angle"] = np.array([1, 1, 1e-4, 1e-4], dtype=np.float32)
    tensors[f"{prefix}retnet_rel_pos.decay"] = np.log(1 - 2.0 ** -np.array([5, 6])).astype(np.float32)
    return tensors


def write_torchscale(
    folder: Path,
    tensors: dict[str, Array] | None = None,
    settings: dict[str, Any] | None = None,
    name: str = "model.pt",
) -> Path:
    """A bare state dict with its args.json; the container is told by the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(SETTINGS if settings is None else settings), encoding="utf-8")
    tensors = small_tensors() if tensors is None else tensors
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / name)
    return folder / name


def refusal(path: Path, match: str) -> InputError:
    """The error with which a checkpoint is refused: one line, exit code 5."""
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    return caught.value
