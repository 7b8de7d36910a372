"""The jobs as functions: `export("ckpt", "out")` is `export(ExportRequest("ckpt", "out"))`.

What a function may be given is what its request has; it raises what the request and the job raise, and says nothing of
how far it is: to be told, give the job a request and a progress.
"""

from __future__ import annotations

import functools
import inspect as signatures
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from retnet_tools.jobs import convert as converting
from retnet_tools.jobs import export as exporting
from retnet_tools.jobs import inspect as inspecting
from retnet_tools.jobs import perplexity as scoring
from retnet_tools.jobs import quantize as quantizing
from retnet_tools.jobs import verify as verifying
from retnet_tools.jobs.request import Request
from retnet_tools.jobs.verify_request import VerifyRequest
from retnet_tools.progress import Progress, no_progress

Given = ParamSpec("Given")
Asked = TypeVar("Asked", bound=Request)
Result = TypeVar("Result")


def _call(request: Callable[Given, Asked], job: Callable[[Asked, Progress], Result]) -> Callable[Given, Result]:
    @functools.wraps(job)
    def call(*given: Given.args, **named: Given.kwargs) -> Result:
        return job(request(*given, **named), no_progress)

    shape = signatures.signature(request)
    returned = signatures.signature(job).return_annotation
    call.__signature__ = shape.replace(return_annotation=returned)  # type: ignore[attr-defined]
    kinds = [kind for kind in getattr(request, "__mro__", ()) if issubclass(kind, Request) and kind is not Request]
    fields = [signatures.getdoc(kind) or "" for kind in kinds]
    call.__doc__ = "\n\n".join([signatures.getdoc(job) or "", *fields]).replace("Attributes:", "Args:")
    return call


convert = _call(converting.ConvertRequest, converting.convert)
inspect = _call(inspecting.InspectRequest, inspecting.inspect)
verify = _call(VerifyRequest, verifying.verify)
export = _call(exporting.ExportRequest, exporting.export)
quantize = _call(quantizing.QuantizeRequest, quantizing.quantize)
perplexity = _call(scoring.PerplexityRequest, scoring.perplexity)
