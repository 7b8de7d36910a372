"""A checkpoint to an int8 decoder in Python, with what that cost on a text.

python examples/convert_and_check.py ckpt-onnx
"""

import sys
import tempfile
from pathlib import Path

import retnet_tools as rt

with tempfile.TemporaryDirectory() as folder:
    small = Path(folder) / "int8"
    rt.quantize(sys.argv[1], "int8", small)
    figures = rt.perplexity(small, "fixtures/shakespeare/heldout.txt", against=sys.argv[1], max_tokens=2048).report
    print(f"perplexity {figures.model.ppl.value:.2f}, mean KLD {figures.divergence.mean_kld.value:.2e} nats a token")
