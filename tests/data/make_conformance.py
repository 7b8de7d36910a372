"""How the small checkpoints of `conformance/` that test_layouts.py reads were made: by the code of the projects whose
layouts they are. A record; nothing runs it in the tests.

Environment (Python 3.11, CPU): torch 2.13.0, transformers 4.36.2, einops, safetensors, numpy and, for the fla cases,
triton (imported only). Each case runs in a process of its own, from a checkout of its project at the commit that
stands in CASES:

    git clone https://github.com/syncdoth/RetNet && git -C RetNet checkout 2b67488
    OMP_NUM_THREADS=1 python make_conformance.py syncdoth_first_biases RetNet conformance

What has no CPU code is replaced, and nothing else: flash-attn's rotation by interleaved pairs (what it computes; the
fallback of RetNet-XATL repeats the angles in another order than it pairs the dimensions), fairscale's checkpoint_wrapper
and wrap by themselves, flash-attn's and xformers' fused layers by the layers that they fuse, flash-linear-attention's
Triton kernels by its own reference functions (naive_retention, rms_norm_ref, apply_rotary_emb_torch).

Weights are random, norms and biases too. float64 results come from `model.double()` with `Tensor.float` made
`Tensor.double`, since these models go through float32 inside; buffers and weights stay the float32 numbers of the file.
Where a model computes angles or decay at each call (syncdoth's first layout, flash-linear-attention, the training code
of RetNet-XATL) that is float64 too.
"""

from __future__ import annotations

import json
import math
import random
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers.modeling_utils  # before any stub: it looks which packages there are
from torch import nn
from torch.nn import functional as F

VOCAB, TOKENS = 31, (2, 12)
IDS = torch.randint(1, VOCAB, TOKENS, generator=torch.Generator().manual_seed(0))


# What all cases share


def stub(name, **attributes):
    """A module of this name, with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        full = ".".join(parts[:i])
        if full not in sys.modules:
            module = sys.modules[full] = types.ModuleType(full)
            module.__path__ = []
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def randomise(model, seed):
    """Random parameters whose logits are of order 1 to 10: matrices by their width, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            continue  # syncdoth's first layout keeps gamma so
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            embedding = "embed" in name or "wte" in name  # not layernorm_embedding, which has one dimension
            parameter.data = noise * (0.4 if embedding else 1.5 / math.sqrt(parameter.shape[1]))
        else:
            parameter.data = 0.3 * noise + float(name.endswith("weight"))
    return model.eval()


@contextmanager
def exact(torch_float=False):
    """float64 wherever the model asks for float32; with torch_float also where it makes a tensor of torch.float32."""
    to_float, single = torch.Tensor.float, torch.float32
    torch.Tensor.float = torch.Tensor.double
    if torch_float:
        torch.float = torch.float32 = torch.float64
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float, torch.float, torch.float32 = to_float, single, single
        torch.set_default_dtype(single)


def write_golden(folder, model, forms, torch_float=False):
    """The logits of each form in float32 and float64."""
    arrays = {"input_ids": IDS.numpy()}
    with torch.no_grad():
        for form, run in forms.items():
            arrays[f"logits_{form}"] = run(model.float()).float().numpy()
        with exact(torch_float):
            for form, run in forms.items():
                arrays[f"logits_{form}_f64"] = run(model.double()).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "golden.npz", **arrays)
    for form in forms:
        error = np.abs(arrays[f"logits_{form}"] - arrays[f"logits_{form}_f64"]).max()
        print(f"{folder.name} {form}: up to {np.abs(arrays[f'logits_{form}']).max():.1f}, float32 {error:.1e} off")
    if {"parallel", "recurrent"} <= forms.keys():
        print("  forms differ by", np.abs(arrays["logits_parallel_f64"] - arrays["logits_recurrent_f64"]).max())
    return arrays


def hugging_face_forms(whole_prompt=True):
    """parallel and recurrent of syncdoth's models; the first layout takes one token and its position, others all."""

    def parallel(model):
        return model(IDS, forward_impl="parallel").logits

    def recurrent(model):
        state, rows = None, []
        for i in range(IDS.shape[1]):
            ids = IDS[:, : i + 1] if whole_prompt else IDS[:, i : i + 1]
            offset = {} if whole_prompt else {"sequence_offset": i}
            out = model(ids, forward_impl="recurrent", past_key_values=state, use_cache=True, **offset)
            state = out.past_key_values
            rows.append(out.logits)
        return torch.cat(rows, dim=1)

    return {"parallel": parallel, "recurrent": recurrent}


def plain_drop_path(x, *_args, **_kwargs):
    return x


# syncdoth/RetNet-XATL


def interleaved(x, cos, sin, is_interleaved=True, _inplace=False):
    """flash-attn's rotation: x [B, T, H, K], cos and sin [T, R/2], of the first R dimensions of a head."""
    assert is_interleaved
    size = 2 * cos.shape[-1]
    cos, sin = cos[None, :, None].to(x.dtype), sin[None, :, None].to(x.dtype)
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., size:]), dim=-1)


class Rotation:
    apply = staticmethod(interleaved)


def import_xatl(source):
    sys.path.insert(0, str(source))
    sys.modules["fla"] = None
    stub("flash_attn.layers.rotary", ApplyRotaryEmb=Rotation)
    stub("flash_attn", flash_attn_func=None)
    from hf_retnet.configuration_retnet import RetNetConfig
    from hf_retnet.modeling_retnet import RetNetForCausalLM

    return RetNetConfig, RetNetForCausalLM


def xatl(source, folder, config, seed, safe=True):
    make_config, model_class = import_xatl(source)
    sizes = {"vocab_size": VOCAB, "decoder_embed_dim": 24, "decoder_layers": 2, "decoder_retention_heads": 3}
    model = randomise(model_class(make_config(**{**sizes, **config})), seed)
    model.save_pretrained(folder, safe_serialization=safe)
    write_golden(folder, model, hugging_face_forms())


class FusedMLP(nn.Module):
    """flash-attn's: fc2(gelu(fc1 x)), the tanh gelu."""

    def __init__(self, size, hidden, out, bias1, bias2, activation):
        super().__init__()
        assert activation == "gelu_approx"
        self.fc1, self.fc2 = nn.Linear(size, hidden, bias=bias1), nn.Linear(hidden, out, bias=bias2)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """xformers': w3(silu(w1 x) * w2 x)."""

    def __init__(self, size, hidden, bias, _pack_weights):
        super().__init__()
        self.w1, self.w2 = nn.Linear(size, hidden, bias=bias), nn.Linear(size, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, size, bias=bias)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def plain_retention(q, k, v):
    """What its fused kernel computes: (q k^T / sqrt(K) * gamma^(n-m)) v, [B, H, T, K]."""
    heads, length = q.shape[1], q.shape[2]
    gamma = (1 - 2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64))).view(-1, 1, 1)
    steps = torch.arange(length, dtype=torch.float64)
    distance = steps[:, None] - steps[None]
    decay = torch.where(distance >= 0, gamma**distance, 0.0).to(q.dtype)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 * decay) @ v


def import_lit(source):
    stub("flash_attn.ops.fused_dense", FusedDense=nn.Linear, FusedMLP=FusedMLP)
    stub("xformers.ops", SwiGLU=SwiGLU)
    stub("mamba_ssm", Mamba=None)
    stub("lightning_utilities.core.imports", RequirementCache=lambda _: True)
    stub("lightning.fabric.loggers", CSVLogger=object)
    stub("dropout_layer_norm")
    stub("xentropy_cuda_lib")
    stub("lit_gpt.fused_rotary_embedding", apply_rotary_emb_func=interleaved)
    stub("lit_gpt.fused_parallel_retention", parallel_retention=plain_retention)
    stub("lit_gpt.fused_cross_entropy", FusedCrossEntropyLoss=None)
    sys.modules["lit_gpt"].__path__ = [str(Path(source) / "lit_gpt")]  # the rest of it is the real one
    import lit_gpt.model
    from lit_gpt.config import Config

    stub("lit_gpt", GPT=lit_gpt.model.GPT, Config=Config)
    sys.path.insert(0, str(Path(source) / "scripts"))
    import convert_lit_checkpoint

    return lit_gpt.model.GPT, Config, convert_lit_checkpoint


def xatl_lit(source, folder, config, seed):
    """A training file; its logits in its own code and, where that takes them, in the Hugging Face one."""
    from dataclasses import asdict

    make_config, model_class = import_xatl(source)
    gpt, lit_config, converter = import_lit(source)
    sizes = {"name": "RetNet-tiny", "block_size": 16, "vocab_size": VOCAB, "padded_vocab_size": VOCAB}
    settings = lit_config(**sizes, n_layer=2, n_head=3, n_embd=24, use_retention=True, **config)
    model = randomise(gpt(settings, dtype=torch.float32), seed)
    document = converter.convert_config_lit_to_retnet(asdict(settings))
    (folder / "lit").mkdir(parents=True)
    (folder / "lit/config.json").write_text(json.dumps(document, indent=1))
    hparams = {"learning_rate": 4e-4, "model_name": "RetNet-tiny", "out_dir": Path("out"), "betas": (0.9, 0.95)}
    state = {"model": model.state_dict(), "hparams": hparams, "iter_num": 3, "step_count": 3}
    torch.save(state, folder / "lit/iter-000003-ckpt.pth")
    if settings.shared_attention_norm:  # the Hugging Face model leaves the norm out: see xatl_shared_norm
        write_golden(folder, model, {"parallel": lambda m: rope_again(m)(IDS)}, torch_float=True)
        return
    converted = {}
    converter.copy_weights_retnet(settings, converted, model.state_dict())
    hugging_face = model_class(make_config(**document)).eval()
    status = hugging_face.load_state_dict(converted, strict=False)
    assert not status.unexpected_keys and all("retnet_rel_pos" in name for name in status.missing_keys), status
    golden = write_golden(folder, hugging_face, hugging_face_forms())
    with torch.no_grad():
        own = rope_again(model.float())(IDS).numpy()
    print("  lit and Hugging Face differ by", np.abs(own - golden["logits_parallel"]).max())


def rope_again(model):
    model.rope_cache = None
    return model


# syncdoth/RetNet


def import_syncdoth(source):
    sys.path.insert(0, str(source))
    stub("timm.models.layers", drop_path=plain_drop_path)
    from retnet.configuration_retnet import RetNetConfig
    from retnet import modeling_retnet

    return RetNetConfig, modeling_retnet


def syncdoth_first(source, folder, config, seed, safe=True):
    make_config, module = import_syncdoth(source)
    model = module.RetNetModelWithLMHead(make_config(vocab_size=VOCAB, num_layers=2, pad_token_id=0, **config))
    randomise(model, seed).save_pretrained(folder, safe_serialization=safe)
    # Rotary angles are made at each call, in the dtype that torch defaults to.
    write_golden(folder, model, hugging_face_forms(whole_prompt=False), torch_float=True)


def syncdoth(source, folder, config, seed, safe=True):
    make_config, module = import_syncdoth(source)
    sizes = {"vocab_size": VOCAB, "decoder_embed_dim": 24, "decoder_layers": 2}
    model = randomise(module.RetNetForCausalLM(make_config(**sizes, **config)), seed)
    model.save_pretrained(folder, safe_serialization=safe)
    return write_golden(folder, model, hugging_face_forms())


def syncdoth_before_2024(source, folder, config, seed):
    """The parallel logits of the release with the other clamp, on the weights of `syncdoth_clamps`, added to them."""
    make_config, module = import_syncdoth(source)
    model = module.RetNetForCausalLM.from_pretrained(folder).eval()
    golden = dict(np.load(folder / "golden.npz"))
    other = write_golden(folder, model, hugging_face_forms())
    for name in ("logits_parallel", "logits_parallel_f64"):
        golden[name.replace("parallel", "parallel_before_2024")] = other[name]
    np.savez_compressed(folder / "golden.npz", **golden)
    print("  recurrent:", np.abs(golden["logits_recurrent_f64"] - other["logits_recurrent_f64"]).max())
    print("  parallel:", np.abs(golden["logits_parallel_f64"] - other["logits_parallel_f64"]).max())


# torchscale in wrappers


def stub_torchscale():
    stub("fairscale.nn", checkpoint_wrapper=lambda module, **_: module, wrap=lambda module, **_: module)
    stub("timm.models.layers", drop_path=plain_drop_path)


def torchscale_recurrent(decoder):
    state, rows = {}, []
    for i in range(IDS.shape[1]):
        rows.append(decoder(IDS[:, : i + 1], incremental_state=state)[0])
    return torch.cat(rows, dim=1)


def dragn(source, folder, config, seed):
    stub_torchscale()
    stub("pytorch_lightning", LightningModule=nn.Module)
    sys.path.insert(0, str(Path(source) / "src"))
    from models import RetNetModelHF
    from torchscale.architecture.config import RetNetConfig

    model = RetNetModelHF(RetNetConfig(vocab_size=VOCAB, max_seq_len=64, lr=1e-3, **config))
    randomise(model, seed).save_pretrained(folder)
    recurrent = {"recurrent": lambda m: torchscale_recurrent(m.decoder_stack)}
    write_golden(folder, model, {"parallel": lambda m: m(IDS), **recurrent})


def student(source, folder, config, seed):
    """As src/distillation/scripts/train.py makes the model and trainer.py and checkpoint.py save it."""
    stub_torchscale()
    sys.path[:0] = [str(source), str(Path(source) / "torchscale")]
    stub("src.distillation.dataset", load_llama_tokenizer=None)
    for name in ("src", "src.distillation"):
        sys.modules[name].__path__ = [str(Path(source) / name.replace(".", "/"))]
    from src.distillation.checkpoint import CheckpointManager
    from src.distillation.student_config import RetNetStudentConfig
    from src.models.retnet.backbone import RetNetBackbone, RetNetOutputHead

    RetNetStudentConfig.validate = lambda self: None  # it allows one vocabulary only
    settings = RetNetStudentConfig(vocab_size=VOCAB, **config)
    model = RetNetBackbone(**settings.to_retnet_backbone_args(), checkpoint_activations=False)
    model.add_module("lm_head", RetNetOutputHead(settings.d_model, VOCAB, tie_weights=False))
    if settings.tie_word_embeddings:
        model.lm_head.proj.weight = model.embed.weight
    randomise(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {
        "global_step": 3,
        "epoch": 0,
        "best_val_loss": float("inf"),
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scaler_state_dict": {},
        "metrics": {},
        "config": {
            "training_config": {"output_dir": Path("runs"), "learning_rate": 1e-3, "betas": (0.9, 0.95)},
            "student_config": settings.to_dict(),
            "pretrain_ce_only": False,
            "tokenizer_name": None,
        },
        "rng_states": {"python": None, "numpy": None, "torch": torch.get_rng_state(), "cuda": None},
    }
    random.seed(0)
    np.random.seed(0)
    saved = CheckpointManager(folder / "run").save_checkpoint(state, step=3)
    for other in (folder / "run").iterdir():
        if other != saved:
            other.unlink()

    def parallel(m):
        m.decoder.chunkwise_recurrent = False
        return m.lm_head(m.forward_train(IDS))

    def recurrent(m):
        return m.lm_head(m.norm(torchscale_recurrent(m.decoder)))

    write_golden(folder, model, {"parallel": parallel, "recurrent": recurrent})


# flash-linear-attention in 2024


def fla(source, folder, config, seed, safe=True):
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(source))
    stub("opt_einsum")
    from fla.layers import multiscale_retention as layer
    from fla.models.retnet import modeling_retnet as modeling
    from fla.modules import fused_norm_gate, rotary
    from fla.models.retnet.configuration_retnet import RetNetConfig
    from fla.ops.retention.naive import naive_retention

    first = "seqlen_offset" not in Path(layer.__file__).read_text()  # its layer takes no state yet

    def retention(q, k, v, **_):
        out = naive_retention(q, k, v)
        return out if first else (out, None)

    def norm(self, x, residual=None, prenorm=False, **_):
        return fused_norm_gate.rms_norm_ref(x, self.weight, None, residual, self.eps, prenorm)

    def gated_norm(self, x, o, **_):
        return fused_norm_gate.rms_norm_ref(x, self.weight, None, eps=self.eps) * F.silu(o)

    def rotate(x, cos, sin, interleaved=False, **_):
        return rotary.apply_rotary_emb_torch(x, cos, sin, interleaved)

    for name in ("chunk", "fused_chunk", "parallel", "fused_recurrent"):
        setattr(layer, f"{name}_retention", retention)
    modeling.RMSNorm.forward, layer.FusedRMSNormSwishGate.forward = norm, gated_norm
    rotary.apply_rotary_emb_func = rotate
    modeling.swiglu = lambda x, y: F.silu(x) * y
    modeling.swiglu_linear = lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)
    model = randomise(modeling.RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, **config)), seed)
    model.save_pretrained(folder, safe_serialization=safe)
    write_golden(folder, model, {"parallel": lambda m: m(IDS, use_cache=False).logits}, torch_float=True)


# The cases

XATL, SYNCDOTH = "syncdoth/RetNet-XATL", "syncdoth/RetNet"
FLA_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32}
CASES = {
    "xatl_affine_rms": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 32,
            "groupnorm_affine": True,
            "lm_head_bias": True,
            "parallel_residual": True,
            "rotary_percentage": 0.5,
            "use_bias": True,
            "activation_fn": "swish",
            "layernorm_eps": 1e-3,
        },
        {"seed": 1},
        "affine head norm, biases of the projections with GLU, half of each head rotated, a bias of the head",
    ),
    "xatl_affine_layer": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 24,
            "decoder_ffn_embed_dim": 24,
            "groupnorm_affine": True,
            "layernorm_embedding": True,
            "rotary_percentage": 0.5,
            "use_bias": True,
            "use_rms_norm": False,
            "use_glu": False,
            "activation_fn": "gelu_new",
            "layernorm_eps": 1e-3,
        },
        {"seed": 22, "safe": False},
        "LayerNorm everywhere, of the heads too and with biases; plain feed-forward with a norm inside; sequential",
    ),
    "xatl_stability": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 32,
            "decoder_retention_heads": 4,
            "no_scale_embedding": False,
            "retnet_stability_update": True,
            "tie_word_embeddings": True,
            "use_lm_decay": True,
            "layernorm_eps": 1e-3,
        },
        {"seed": 3},
        "scores normalised; the other decay schedule; tied",
    ),
    "xatl_plain_rms": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 24,
            "decoder_ffn_embed_dim": 24,
            "parallel_residual": True,
            "use_glu": False,
            "activation_fn": "relu",
            "layernorm_eps": 1e-3,
        },
        {"seed": 4, "safe": False},
        "plain feed-forward with an RMS norm inside, parallel residual",
    ),
    "xatl_deepnorm": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 32,
            "deepnorm": True,
            "groupnorm_affine": True,
            "subln": False,
            "use_rms_norm": False,
            "layernorm_eps": 1e-3,
        },
        {"seed": 5},
        "post-norm with alpha; LayerNorm of the heads with a weight and no bias",
    ),
    "xatl_shared_norm": (
        XATL,
        "a96412f",
        xatl,
        {
            "decoder_value_embed_dim": 24,
            "decoder_ffn_embed_dim": 32,
            "parallel_residual": True,
            "shared_attention_norm": True,
        },
        {"seed": 6},
        "its Hugging Face model gives the feed-forward network the residual stream without any norm, its training "
        "code the first norm of it (xatl_lit_shared)",
    ),
    "xatl_lit": (
        XATL,
        "a96412f",
        xatl_lit,
        {
            "intermediate_size": 32,
            "parallel_residual": True,
            "rotary_percentage": 0.5,
            "use_ln_for_groupnorm": True,
            "norm_eps": 1e-3,
        },
        {"seed": 7},
        "a training file; logits of the Hugging Face model on the weights that scripts/convert_lit_checkpoint.py makes",
    ),
    "xatl_lit_glu": (
        XATL,
        "a96412f",
        xatl_lit,
        {
            "_mlp_class": "LLaMAMLP",
            "_norm_class": "RMSNorm",
            "bias": False,
            "intermediate_size": 32,
            "layernorm_embedding": True,
            "no_scale_embedding": False,
            "norm_eps": 1e-3,
            "parallel_residual": False,
            "rotary_percentage": 1.0,
        },
        {"seed": 8},
        "as xatl_lit, of the kind of NucleusX-1B",
    ),
    "xatl_lit_shared": (
        XATL,
        "a96412f",
        xatl_lit,
        {
            "intermediate_size": 32,
            "parallel_residual": True,
            "shared_attention_norm": True,
            "lm_head_bias": True,
            "rotary_percentage": 0.5,
            "norm_eps": 1e-3,
        },
        {"seed": 9},
        "a training file with one norm for both branches and a bias of the head, which its converter does not know; logits of the training code, which has no recurrent form",
    ),
    "syncdoth_first_biases": (
        SYNCDOTH,
        "2b67488",
        syncdoth_first,
        {
            "hidden_size": 24,
            "num_heads": 3,
            "qk_dim": 18,
            "v_dim": 36,
            "ffn_proj_size": 32,
            "use_bias_in_msr": True,
            "use_bias_in_msr_out": True,
            "use_bias_in_mlp": False,
            "use_default_gamma": True,
            "tie_word_embeddings": False,
        },
        {"seed": 11},
        "biases of retention and none of the feed-forward network, the other gammas, sizes that differ, untied",
    ),
    "syncdoth_first_tied": (
        SYNCDOTH,
        "2b67488",
        syncdoth_first,
        {
            "hidden_size": 24,
            "num_heads": 4,
            "qk_dim": 32,
            "v_dim": 24,
            "ffn_proj_size": 32,
            "use_bias_in_msr_out": True,
        },
        {"seed": 12},
        "a bias of the output projection alone; tied by default",
    ),
    "syncdoth_october": (
        SYNCDOTH,
        "b2a920a",
        syncdoth,
        {
            "value_factor": 2,
            "decoder_ffn_embed_dim": 32,
            "decoder_retention_heads": 3,
            "layernorm_embedding": True,
            "no_scale_embedding": False,
            "tie_word_embeddings": False,
            "use_lm_decay": True,
            "layernorm_eps": 1e-3,
        },
        {"seed": 13},
        "norm of the embedding, its scale, the other decay schedule, untied",
    ),
    "syncdoth_october_deepnorm": (
        SYNCDOTH,
        "b2a920a",
        syncdoth,
        {
            "value_factor": 3,
            "decoder_ffn_embed_dim": 32,
            "decoder_retention_heads": 4,
            "deepnorm": True,
            "layernorm_eps": 1e-3,
        },
        {"seed": 14, "safe": False},
        "post-norm with alpha, values three times as wide, tied by default, both names in the file",
    ),
    "syncdoth_october_post": (
        SYNCDOTH,
        "b2a920a",
        syncdoth,
        {
            "value_factor": 2,
            "decoder_ffn_embed_dim": 32,
            "decoder_normalize_before": False,
            "decoder_retention_heads": 3,
            "subln": False,
            "activation_fn": "swish",
            "layernorm_eps": 1e-3,
        },
        {"seed": 15},
        "post-norm without alpha or sub-norm, tied by default, one name in the file",
    ),
    "syncdoth_clamps": (
        SYNCDOTH,
        "2634bbf",
        syncdoth,
        {
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 32,
            "decoder_retention_heads": 3,
            "layernorm_eps": 1e-3,
        },
        {"seed": 16},
        "the clamp of HEAD; logits_parallel_before_2024 are those of 40fd758 on the same weights",
    ),
    "syncdoth_clamps+before_2024": (SYNCDOTH, "40fd758", syncdoth_before_2024, {}, {"seed": 16}, ""),
    "dragn_layernorm": (
        "DRAGNLabs/301r_retnet",
        "2d1c878",
        dragn,
        {
            "decoder_embed_dim": 24,
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 32,
            "decoder_layers": 2,
            "decoder_retention_heads": 3,
            "layernorm_eps": 1e-3,
        },
        {"seed": 17},
        "torchscale with LayerNorm in place of RMSNorm, saved by a PreTrainedModel around it",
    ),
    "distillation_student": (
        "bigwolfeman/Retnet-Distillation",
        "7823ec1",
        student,
        {"d_model": 18, "n_layers": 2, "n_heads": 3, "dropout": 0.0, "created_at": "2025-11-25T00:00:00+00:00"},
        {"seed": 18},
        "torchscale with a LayerNorm after the final norm and one matrix under three names",
    ),
    "fla_2024_02": (
        "fla-org/flash-linear-attention",
        "e4dcdb84",
        fla,
        {**FLA_SIZES, "num_attention_heads": 3, "expand_k": 0.5, "expand_v": 1, "rms_norm_eps": 1e-3},
        {"seed": 19, "safe": False},
        "num_attention_heads, rms_norm_eps, model.embed_tokens, gate and up in one matrix",
    ),
    "fla_2024_03": (
        "fla-org/flash-linear-attention",
        "faa18e94",
        fla,
        {**FLA_SIZES, "num_heads": 3, "expand_v": 1.5, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
        {"seed": 20},
        "rms_norm_eps, an output gate of gelu beside a feed-forward network of silu",
    ),
    "fla_2024_04": (
        "fla-org/flash-linear-attention",
        "6d0aa569",
        fla,
        {**FLA_SIZES, "num_heads": 4, "expand_v": 2, "norm_eps": 1e-3, "tie_word_embeddings": True},
        {"seed": 21},
        "today's keys, gate and up in one matrix, tied",
    ),
}


def main(name, source, out):
    project, commit, make, config, options, notes = CASES[name]
    folder = Path(out) / name.split("+")[0]
    make(Path(source).resolve(), folder, config, **options)
    if "+" not in name:
        case = {"name": name, "implementation": project, "version": commit, "config": config, **options}
        case |= {"made_by": f"tests/data/make_conformance.py {name}", "notes": notes}
        (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
