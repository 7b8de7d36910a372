"""Runs exported folders."""

from retnet_tools.runtime.codec import open_codec
from retnet_tools.runtime.decode import Generation, Generations, Piece, Stopping, generate, generate_from, stream_from
from retnet_tools.runtime.decoder import Decoder, open_decoder
from retnet_tools.runtime.providers import Device, parse_device
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.sampling import Sampler, Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession

__all__ = [
    "Decoder",
    "DecoderSession",
    "Device",
    "Generation",
    "Generations",
    "Piece",
    "RecurrentState",
    "Sampler",
    "Sampling",
    "Sequences",
    "Stopping",
    "generate",
    "generate_from",
    "open_codec",
    "open_decoder",
    "parse_device",
    "stream_from",
]
