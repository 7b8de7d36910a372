"""A checkpoint to an int8 decoder in Python, with what that cost on a text.

    python examples/convert_and_check.py ckpt-onnx
"""

import sys
import tempfile
from pathlib import Path

import retnet_tools as rt

with tempfile.TemporaryDirectory() as folder:
    small = Path(folder) / "int8"
    rt.quantize(sys.argv[1], small, target="int8")
    report = rt.perplexity(small, "fixtures/shakespeare/heldout.txt", against=sys.argv[1], max_tokens=2048)
    print(report)
