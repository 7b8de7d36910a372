"""Greedy text from an exported folder with onnxruntime, numpy and the tokenizer alone: the contract, by hand.

python examples/onnxruntime_only.py ckpt-onnx
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path((sys.argv[1:] or ["ckpt-onnx"])[0])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
contract = json.loads((folder / "retnet.json").read_text(encoding="utf-8"))
prefill = onnxruntime.InferenceSession(folder / "prefill.onnx", providers=["CPUExecutionProvider"])
step = onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])

past = [value.name for value in step.get_inputs() if value.name.startswith("past_key_values.")]
present = [name.replace("past_key_values", "present") for name in past]
shapes = {value.name: value.shape for value in step.get_inputs()}
states = {name: np.zeros([1, *shapes[name][1:]], contract["state_dtype"]) for name in past}

ids = np.array([tokenizer.encode("ROMEO. ").ids])
positions = np.arange(ids.shape[1])[None]
feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": np.ones_like(ids), **states}
logits, *new = prefill.run(["logits", *present], feeds)

text = []
for position in range(ids.shape[1], ids.shape[1] + 40):
    text.append(int(logits[0, 0].argmax()))
    feeds = {
        "input_ids": np.array([[text[-1]]]),
        "position_ids": np.array([[position]]),
        **dict(zip(past, new, strict=True)),
    }
    logits, *new = step.run(["logits", *present], feeds)
print(tokenizer.decode(text))
