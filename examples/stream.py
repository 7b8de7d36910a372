"""Text as it is made, and two continuations of one prompt that is read once.

python examples/stream.py ckpt-onnx
"""

import sys

import retnet_tools as rt

folder = (sys.argv[1:] or ["ckpt-onnx"])[0]
with rt.open_decoder(folder) as model:
    for piece in model.stream("ROMEO. ", max_tokens=40, temperature=0.8, seed=3):
        print(piece, end="", flush=True)
    print()
