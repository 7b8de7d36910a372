"""A checkpoint to an int8 decoder in Python, with what that cost on a text.

python examples/convert_and_check.py ckpt-onnx
"""

import sys
import tempfile
from pathlib import Path

import retnet_tools as rt

folder = (sys.argv[1:] or ["ckpt-onnx"])[0]
with tempfile.TemporaryDirectory() as scratch:
    small = Path(scratch) / "int8"
    rt.quantize(folder, "int8", small)
    figures = rt.perplexity(small, "fixtures/shakespeare/heldout.txt", against=folder, max_tokens=2048).report
    print(f"perplexity {figures.model.ppl.value:.2f}, mean KLD {figures.divergence.mean_kld.value:.2e} nats a token")
