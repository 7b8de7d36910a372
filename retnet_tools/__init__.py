"""RetNet checkpoints from training to fast, verified inference: the commands of `retnet-tools` as functions.

The promise is `__all__`, with the arguments and results that are documented; all else may change. Nothing is imported
before it is used: this takes neither torch nor ONNX Runtime. Paths may be texts. An error is a
`retnet_tools.errors.RetNetToolsError`, one line that says what was found, what was expected and what to do.

>>> import retnet_tools as rt

What lies there, and whether the parallel, recurrent and chunkwise forms of retention agree on it; without a checkpoint
`verify` takes the small one inside the package:

>>> rt.inspect("ckpt").model.config.num_layers
4
>>> rt.verify("ckpt", tokens=48).passed
True

A stateful ONNX decoder, quantized, and what that cost on a text:

>>> result = rt.export("ckpt", "out", quantize="int8")
>>> sorted(file.name for file in result.folder.iterdir())  # doctest: +NORMALIZE_WHITESPACE
['README.md', 'decoder.onnx', 'generation_config.json', 'prefill.onnx', 'retnet.json', 'step.onnx',
 'tokenizer.json', 'tokenizer_config.json', 'weights.data']
>>> figures = rt.perplexity("out", "text.txt", against="ckpt", max_tokens=300).report
>>> 0 < figures.divergence.mean_kld.value < 0.01
True

The same in two steps, from an export with float weights:

>>> float_weights = rt.export("ckpt", "float").folder
>>> rt.quantize(float_weights, "int4", "small", block_size=32).plan.quantization.scheme.type
'int4'

Text in, pieces of text out:

>>> with rt.open_decoder("out") as model:
...     text = "".join(model.stream("ROMEO. ", max_tokens=40))

A checkpoint in another format, and one opened as it is: weights by canonical name, `[out, in]` matrices, read one at a
time:

>>> rt.convert("ckpt", "converted", to="torchscale", dtype="fp16").folder.name
'converted'
>>> checkpoint = rt.open_checkpoint("converted")
>>> checkpoint.config.key_dim, checkpoint.config.hidden_size
(256, 256)
>>> checkpoint.weights.read("layers.0.retention.q_proj.weight").shape
(256, 256)
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from retnet_tools.version import __version__

if TYPE_CHECKING:
    from retnet_tools.errors import RetNetToolsError
    from retnet_tools.formats import Checkpoint, open_checkpoint
    from retnet_tools.jobs.api import convert, export, inspect, perplexity, quantize, verify
    from retnet_tools.runtime.decoder import Decoder, open_decoder

__all__ = [
    "Checkpoint",
    "Decoder",
    "RetNetToolsError",
    "__version__",
    "convert",
    "export",
    "inspect",
    "open_checkpoint",
    "open_decoder",
    "perplexity",
    "quantize",
    "verify",
]
_HOMES = {
    "Checkpoint": "formats",
    "Decoder": "runtime.decoder",
    "RetNetToolsError": "errors",
    "open_checkpoint": "formats",
    "open_decoder": "runtime.decoder",
    **dict.fromkeys(("convert", "export", "inspect", "perplexity", "quantize", "verify"), "jobs.api"),
}


class _Package(ModuleType):
    """Gives what it promises when it is asked for, also where a room has the name of a function."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
