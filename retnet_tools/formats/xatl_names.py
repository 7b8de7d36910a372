"""The tensor names of RetNet-XATL: of its Hugging Face folders, and of its lit-gpt training files."""

from __future__ import annotations

from collections.abc import Mapping

from retnet_tools.formats.spec import NameTable, SplitTable

ANGLES, DECAYS = "model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = tuple(f"layers.{{i}}.retention.{name}_proj" for name in "qkv")
_LAYER = {
    "retention_layer_norm": "retention_norm",
    "retention.q_proj": "retention.q_proj",
    "retention.k_proj": "retention.k_proj",
    "retention.v_proj": "retention.v_proj",
    "retention.g_proj": "retention.gate_proj",
    "retention.out_proj": "retention.out_proj",
    "retention.group_norm": "retention.head_norm",
    "final_layer_norm": "ffn_norm",
    "ffn.ffn_layernorm": "ffn.norm",
    "ffn.fc2": "ffn.down_proj",
}
_GLU = {"ffn.fc1": "ffn.gate_proj", "ffn.gate": "ffn.up_proj"}
_PLAIN = {"ffn.fc1": "ffn.up_proj"}
_LIT_LAYER = {
    "norm_1": "retention_norm",
    "attn.gate_proj": "retention.gate_proj",
    "attn.proj": "retention.out_proj",
    "attn.group_norm": "retention.head_norm",
    "norm_2": "ffn_norm",
}
_LIT_GLU = {"mlp.swiglu.w1": "ffn.gate_proj", "mlp.swiglu.w2": "ffn.up_proj", "mlp.swiglu.w3": "ffn.down_proj"}
_LIT_PLAIN = {"mlp.mlp.fc1": "ffn.up_proj", "mlp.mlp.fc2": "ffn.down_proj"}


def _table(root: Mapping[str, str], layers: str, layer: Mapping[str, str]) -> dict[str, str | None]:
    """Weights and biases of modules, by their stored and canonical names."""
    modules = {**root, **{f"{layers}.{{i}}.{name}": f"layers.{{i}}.{canonical}" for name, canonical in layer.items()}}
    return {f"{name}.{part}": f"{to}.{part}" for name, to in modules.items() for part in ("weight", "bias")}


def hugging_face_names(*, glu: bool) -> NameTable:
    """The names of its Hugging Face folders."""
    root = {
        "model.embed_tokens": "embedding",
        "model.layernorm_embedding": "embedding_norm",
        "model.layer_norm": "final_norm",
        "lm_head": "lm_head",
    }
    table = _table(root, "model.layers", {**_LAYER, **(_GLU if glu else _PLAIN)})
    return {**table, ANGLES: None, DECAYS: None}


def lit_names(*, glu: bool) -> SplitTable:
    """The names of its training files."""
    root = {
        "transformer.wte": "embedding",
        "ln_e": "embedding_norm",
        "transformer.ln_f": "final_norm",
        "lm_head": "lm_head",
    }
    fused = {
        f"transformer.h.{{i}}.attn.reten.{part}": tuple(f"{name}.{part}" for name in QKV) for part in ("weight", "bias")
    }
    return {**_table(root, "transformer.h", {**_LIT_LAYER, **(_LIT_GLU if glu else _LIT_PLAIN)}), **fused}
