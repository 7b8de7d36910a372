"""Runs exported folders; this is also the Python API.

from pathlib import Path
from retnet_tools.runtime import DecoderSession, Sampling, generate, open_codec

session = DecoderSession(Path("ckpt-onnx"))
codec = open_codec(session.folder, session.manifest.config.vocab_size)
prompts = [codec.encode(text) for text in ("ROMEO. ", "To be, or not to be")]
result = generate(session, prompts, max_tokens=40, sampling=Sampling(temperature=0.8, seed=3), codec=codec)
print(*(row.text for row in result.rows), sep="\\n---\\n")
"""

from retnet_tools.runtime.decode import Generation, Generations, Stopping, generate, generate_from
from retnet_tools.runtime.providers import Device, parse_device
from retnet_tools.runtime.sampling import Sampler, Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state import RecurrentState
from retnet_tools.runtime.text import open_codec

__all__ = [
    "DecoderSession",
    "Device",
    "Generation",
    "Generations",
    "RecurrentState",
    "Sampler",
    "Sampling",
    "Sequences",
    "Stopping",
    "generate",
    "generate_from",
    "open_codec",
    "parse_device",
]
