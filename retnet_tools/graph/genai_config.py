"""genai_config.json: what onnxruntime-genai has to know of model.onnx.

What goes wrong there without a word, and so has to be known:

- Beam search gives wrong texts (`num_beams` must be 1): the states of the beams are not reordered.
- Before `append_tokens` after `generate_next_token`, call `get_logits`, or the last token never reaches the state.
- Padding on the left is never right, nor is a row without a token.

What onnxruntime-genai refuses itself: `rewind_to(k)` for k > 0 without `snapshot_state()` at k, `append_tokens` twice
in a batch, `chunk_size` for a batch, batches of more than 32, and its `Engine`, which wants attention it can page.
Found with onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import Checkpoint
from retnet_tools.graph import contract
from retnet_tools.tokens import TOKENIZER_FILE, load_tokenizer, special_token_ids

DEFAULT_MAX_LENGTH = 4096
"""`max_length` where a program names none, so that a generation ends; the prompt counts too."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PROVIDER_OPTIONS = {"enable_cuda_graph": "0", "use_tf32": "0"}


def genai_files(checkpoint: Checkpoint, provider: str | None = None) -> dict[str, str]:
    """genai_config.json, and a tokenizer_config.json where tokenizer.json lies alone, which is not read otherwise.

    Args:
        provider: as `genai_config`.

    Raises:
        UsageError: a stack without vocabulary.
        InputError: a tokenizer or special tokens that do not fit the model.
    """
    config = checkpoint.config
    if not config.has_vocabulary:
        raise UsageError(
            "--to genai of a stack without embedding and head",
            "a model with a vocabulary, since onnxruntime-genai feeds token ids",
            "use --to onnx",
        )
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is not None and tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(
            f"{TOKENIZER_FILE} has {tokenizer.get_vocab_size()} tokens",
            f"at most the model's {config.vocab_size}",
            "use the tokenizer that the model was trained with",
        )
    end_ids, start_ids = _special_ids(checkpoint, "eos", tokenizer), _special_ids(checkpoint, "bos", tokenizer)
    files = {contract.GENAI_CONFIG_FILE: genai_config(config, end_ids, start_ids[0] if start_ids else None, provider)}
    names = {file.name for file in checkpoint.tokenizer_files}
    if tokenizer is not None and TOKENIZER_CONFIG_FILE not in names:
        files[TOKENIZER_CONFIG_FILE] = "{}\n"
    return files


def genai_notes(checkpoint: Checkpoint, dtype: str) -> tuple[str, ...]:
    """What the user should know about running this model there."""
    tokenizer = _tokenizer(checkpoint)
    notes = []
    if tokenizer is None:
        notes.append(f"no {TOKENIZER_FILE}: onnxruntime-genai can run token ids only")
    elif tokenizer.num_special_tokens_to_add(False):
        notes.append("the tokenizer adds special tokens to a text, and onnxruntime-genai's encode does not")
    if dtype == "bfloat16":
        notes.append("bfloat16 needs CUDA: ONNX Runtime's CPU provider has no kernels for it")
    return tuple(notes)


def genai_config(
    config: RetNetConfig, end_ids: tuple[int, ...], start_id: int | None, provider: str | None = None
) -> str:
    """The document as JSON.

    Args:
        config: a model with a vocabulary.
        end_ids: tokens that end a text. Without any the padding token stands in, which is never generated.
        start_id: the token that starts a text, where it is known.
        provider: where it runs, in onnxruntime-genai's words; None for the CPU. A graph with branches and loops cannot
            be captured as a CUDA graph; products stay float32.
    """
    padding = contract.padding_id(config)
    ends = list(end_ids) or [padding]
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size + 1,
        "context_length": contract.MAX_POSITION + 1,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": padding,
        **({} if start_id is None else {"bos_token_id": start_id}),
        "decoder": {
            "filename": contract.GENAI_FILE,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_size": config.head_k_dim,
            "session_options": {"provider_options": [] if provider is None else [{provider: PROVIDER_OPTIONS}]},
            "inputs": {
                "input_ids": contract.INPUT_IDS,
                "position_ids": contract.POSITION_IDS,
                "past_conv_names": contract.PAST_CONV_NAMES,
                "past_recurrent_names": contract.PAST_NAMES,
            },
            "outputs": {
                "logits": contract.LOGITS,
                "present_conv_names": contract.PRESENT_CONV_NAMES,
                "present_recurrent_names": contract.PRESENT_NAMES,
            },
        },
    }
    # One buffer for both states would have to be read to its end before it is written.
    search = {"do_sample": False, "num_beams": 1, "max_length": DEFAULT_MAX_LENGTH, "past_present_share_buffer": False}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"


def _tokenizer(checkpoint: Checkpoint) -> Any:
    file = next((file for file in checkpoint.tokenizer_files if file.name == TOKENIZER_FILE), None)
    return None if file is None else load_tokenizer(file)


def _special_ids(checkpoint: Checkpoint, name: Literal["bos", "eos"], tokenizer: Any) -> tuple[int, ...]:
    folders: set[Path] = {file.parent for file in checkpoint.tokenizer_files}
    ids = tuple(i for folder in folders for i in special_token_ids(folder, name, tokenizer))
    wrong = [i for i in ids if not 0 <= i < checkpoint.config.vocab_size]
    if wrong:
        raise InputError(
            f"{name}_token_id {wrong[0]}", f"0 to {checkpoint.config.vocab_size - 1}, the model's vocabulary"
        )
    return ids
