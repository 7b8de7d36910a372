"""Requests: frozen, checked where they are made, words in one form, and plain data in the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from retnet_tools.errors import UsageError
from retnet_tools.jobs.convert import ConvertRequest
from retnet_tools.jobs.export import ExportRequest
from retnet_tools.jobs.inspect import InspectRequest
from retnet_tools.jobs.perplexity import PerplexityRequest
from retnet_tools.jobs.quantize import QuantizeRequest
from retnet_tools.jobs.request import SHIPPED, Request, parse_size, shipped_checkpoint
from retnet_tools.jobs.verify import VerifyRequest

REQUESTS: tuple[Request, ...] = (
    ConvertRequest("a", Path("b")),
    ExportRequest("a", exclude=["x", "y"], quantize="int8"),
    InspectRequest("a"),
    PerplexityRequest("a", "b"),
    QuantizeRequest("a", "int8"),
    VerifyRequest("a"),
)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_request_is_frozen_and_plain_data(request_: Request) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_.force = True  # type: ignore[attr-defined]
    data = request_.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [field.name for field in dataclasses.fields(request_)]
    assert dataclasses.replace(request_) == request_


def test_words_have_one_form() -> None:
    request = ExportRequest("a", dtype="F16", state_dtype="half", quantize="q8", exclude="x", clamp="Sum-of-abs")
    assert (request.dtype, request.state_dtype, request.quantize) == ("float16", "float16", "int8")
    assert (request.exclude, request.clamp) == (("x",), "sum_of_abs")
    assert VerifyRequest("a", modes="Parallel, chunkwise").modes == ("parallel", "chunkwise")
    assert ConvertRequest("a", "b", max_shard_size="2GiB").max_shard_size == 2 << 30


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, "onnx"),
        ({"quantize": "q8", "device": "cuda"}, "onnx-int8-cuda"),
        ({"to": "genai", "device": "cuda"}, "genai-cuda"),
    ],
)
def test_a_folder_that_is_not_named_says_what_is_in_it(fields: dict[str, Any], ending: str) -> None:
    assert ExportRequest("a", **fields).ending == ending


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ExportRequest, {"checkpoint": 3}, "checkpoint is 3; expected text or a path"),
        (ExportRequest, {"to": "onix"}, "did you mean 'onnx'?"),
        (ExportRequest, {"dtype": "fp64"}, "dtype 'fp64'"),
        (ExportRequest, {"ops": "fuzed"}, "did you mean 'fused'?"),
        (ExportRequest, {"device": "tpu"}, "tpu"),
        (ExportRequest, {"quantize": "int3"}, "--quantize 'int3'"),
        (ExportRequest, {"block_size": 32}, "options of a quantization scheme without --quantize"),
        (ExportRequest, {"quantize": "fp16", "method": "rtn"}, "options of a quantization scheme with fp16"),
        (ExportRequest, {"quantize": "int8", "target_bits": 5.0}, "a target for size or bits without a text"),
        (ExportRequest, {"quantize": "int8", "block_size": "32"}, "block_size is '32'; expected one of 32, 64, 128"),
        (ExportRequest, {"force": 1}, "force is 1; expected true or false"),
        (ExportRequest, {"ignore_keys": [1]}, "ignore_keys[0] is 1; expected text"),
        (ExportRequest, {"text_tokens": 5}, "--text-tokens without a text"),
        (ExportRequest, {"clamp": "abs"}, "--clamp abs"),
        (ExportRequest, {"text": "t", "text_tokens": 1}, "--text-tokens 1; expected at least 2"),
        (ExportRequest, {"quantize": "int8", "method": "gptq", "calibration": "t", "seed": -1}, "--seed -1"),
        (VerifyRequest, {"modes": "parallel"}, "form parallel alone"),
        (VerifyRequest, {"tokens": 0}, "--tokens 0; expected at least 1"),
        (VerifyRequest, {"seed": -1}, "--seed -1; expected at least 0"),
        (VerifyRequest, {"threads": 0}, "--threads 0"),
        (VerifyRequest, {"tolerance": -0.1}, "--tolerance -0.1"),
        (PerplexityRequest, {"text": "t", "max_tokens": 0}, "--max-tokens 0"),
        (PerplexityRequest, {"text": "t", "batch": 0}, "--batch 0"),
        (VerifyRequest, {"modes": "parallel,recurent"}, "did you mean 'recurrent'?"),
        (VerifyRequest, {"chunk_size": 0}, "chunk size 0"),
        (VerifyRequest, {"text": "a", "file": "b"}, "both --prompt and --file"),
        (VerifyRequest, {"checkpoint": SHIPPED, "revision": "main"}, "--revision main without a checkpoint"),
        (PerplexityRequest, {"text": ""}, "no text to score"),
        (PerplexityRequest, {"text": "t", "context": -1}, "--context -1"),
        (PerplexityRequest, {"text": "t", "stride": 600}, "--stride 600"),
        (PerplexityRequest, {"text": "t", "device": "gpu"}, "device 'gpu'"),
        (ConvertRequest, {"output": "o", "to": "torchscal"}, "did you mean 'torchscale'?"),
        (ConvertRequest, {"output": "o", "max_shard_size": 0}, "size 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        kind(**{"checkpoint": "a", **fields})
    assert message in str(error.value)


def test_verify_takes_the_shipped_checkpoint_where_none_is_named() -> None:
    assert VerifyRequest().checkpoint == shipped_checkpoint()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("1.5 MiB", 3 << 19), ("20kb", 20_000), ("7", 7), (7, 7), ("1TiB", 1 << 40)],
)
def test_sizes_have_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["five", "-1", "0", "5XB", "i", "5iB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


CALIBRATED = {"calibration": "b", "quantize": "int8"}
BESIDE: dict[str, dict[str, Any]] = {
    "text_tokens": {"text": "b"},
    "calibration_tokens": CALIBRATED,
    "seed": CALIBRATED,
    "target_bits": CALIBRATED,
    "target_size": CALIBRATED,
    "keep_merged": CALIBRATED,
}
"""What a field is not allowed without."""
WRONG = (-1, float("nan"), "", object())


@pytest.mark.parametrize("value", WRONG, ids=["negative", "nan", "empty", "object"])
@pytest.mark.parametrize(
    ("request_", "name"),
    [(request, field.name) for request in REQUESTS for field in dataclasses.fields(request)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_field_takes_what_makes_no_sense(request_: Request, name: str, value: object) -> None:
    beside = {n: v for n, v in BESIDE.get(name, {}).items() if n in vars(request_)}
    if value == "" and name in request_.may_be_empty:
        pytest.skip("a text is judged by its tokens")
    given = dataclasses.replace(request_, **beside)
    with pytest.raises(UsageError):
        dataclasses.replace(given, **{name: value})


@pytest.mark.parametrize("fields", [{"block_size": 48}, {"accuracy_level": 2}, {"method": "gptqq"}, {"exclude": "("}])
def test_what_quantization_does_not_offer_is_refused_at_once(fields: dict[str, Any]) -> None:
    for make in (lambda **f: ExportRequest("a", quantize="int4", **f), lambda **f: QuantizeRequest("a", "int4", **f)):
        with pytest.raises(UsageError):
            make(**fields)
