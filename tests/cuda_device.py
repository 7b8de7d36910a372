"""The device that tests marked `cuda` run on.

`RETNET_TOOLS_CUDA_TESTS=cpu` runs them on the CPU instead, which says that the tests are right, not that CUDA is.
"""

from __future__ import annotations

import os
from functools import cache

import pytest

from retnet_tools.runtime.diagnosis import device_problem
from retnet_tools.runtime.providers import Device, parse_device

DEVICE: Device = parse_device(os.environ.get("RETNET_TOOLS_CUDA_TESTS", "cuda"))
ON_CPU = DEVICE.kind == "cpu"
DTYPES = ("float32", "float16") if ON_CPU else ("float32", "float16", "bfloat16")


@cache
def why_not() -> str | None:
    """Why there is nothing to run them on."""
    return device_problem(DEVICE)


needs_cuda_graphs = pytest.mark.skipif(ON_CPU, reason="CUDA graphs need CUDA")
