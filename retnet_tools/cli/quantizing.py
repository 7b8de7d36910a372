"""The options of quantization, which `export` and `quantize` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.cli import common
from retnet_tools.errors import UsageError

if TYPE_CHECKING:
    from retnet_tools.quantize.request import QuantizationRequest

Target = Annotated[
    str | None,
    typer.Option("--quantize", help="Weights in blocks of int8 or int4, or everything but states in fp16 or bf16."),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", help="Weights that share a scale: 32, 64 or 128 (int8: 128, int4: 64 if left out)."),
]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="Without or with a zero point a block; symmetric if left out."),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        "--accuracy-level",
        help="Of products on the CPU: 4 in int8 (if left out), 0 or 1 in float32, which is slow with int8 weights.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="How weights are rounded: rtn (to nearest) or gptq, which learns from a text."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="REGEX", help="Matrices that stay float, by their names; may be repeated."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help="int8 or int4 for some matrices; may be repeated."),
]


Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Text to learn from, for gptq and for targets."),
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", help="Tokens drawn from it (65536 if left out).")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of that draw (0 if left out).", min=0)]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", metavar="SIZE", help="Size of weights.data to keep to, such as 5MB, by mixed types."),
]
TargetBits = Annotated[
    float | None, typer.Option("--target-bits", help="The same as bits a weight over all matrices, such as 5.0.")
]
KeepMerged = Annotated[
    bool, typer.Option("--keep-merged", help="With a target: one type for matrices that the graph keeps as one.")
]


def request(
    target: str | None,
    *,
    block_size: int | None,
    symmetric: bool | None,
    accuracy_level: int | None,
    method: str | None,
    exclude: list[str] | None,
    tensor_type: list[str] | None,
    calibration: Path | None,
    calibration_tokens: int | None,
    seed: int | None,
    target_size: str | None,
    target_bits: float | None,
    keep_merged: bool,
) -> QuantizationRequest | None:
    """What the options ask for; None without `--quantize`.

    Raises:
        UsageError: a type that does not exist, or options that do not go together.
    """
    from retnet_tools.quantize.budget import Budget
    from retnet_tools.quantize.calibration import CalibrationOptions
    from retnet_tools.quantize.request import QuantizationRequest
    from retnet_tools.quantize.scheme import NO_OPTIONS, SchemeOptions, parse_target

    scheme = SchemeOptions(
        block_size, symmetric, accuracy_level, method, tuple(exclude or ()), tuple(tensor_type or ())
    )
    draw = {name: value for name, value in (("tokens", calibration_tokens), ("seed", seed)) if value is not None}
    if calibration is None and draw:
        raise UsageError("--calibration-tokens or --seed without a text", "--calibration FILE")
    text = None if calibration is None else CalibrationOptions(calibration, **draw)
    budget = None
    if target_size is not None or target_bits is not None:
        budget = Budget(None if target_size is None else common.parse_size(target_size), target_bits)
    if target is not None:
        return QuantizationRequest(parse_target(target), scheme, text, budget, keep_merged)
    if (scheme, text, budget, keep_merged) != (NO_OPTIONS, None, None, False):
        raise UsageError("options of a quantization scheme without --quantize", "--quantize int8 or int4")
    return None


def ending(request: QuantizationRequest | None) -> str:
    """What the name of a quantized folder ends with."""
    from retnet_tools.quantize.scheme import TARGET_WORDS

    return "" if request is None else f"-{TARGET_WORDS[request.target]}"
