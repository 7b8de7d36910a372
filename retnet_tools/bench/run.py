"""A whole benchmark: what is measured is made ready, then measured, threads by threads and kind by kind."""

from __future__ import annotations

from pathlib import Path

from retnet_tools.bench.floor import ProductShape, last_cache_bytes
from retnet_tools.bench.implementations import alternative, retnet
from retnet_tools.bench.memory import device_name
from retnet_tools.bench.models import PROBE_FOLDER, Model, write_probes
from retnet_tools.bench.options import KINDS, BenchOptions
from retnet_tools.bench.results import BenchReport, BenchRow, ModelSummary, SkippedTest
from retnet_tools.bench.rounds import Round, Setting
from retnet_tools.bench.rows import with_measured_memory
from retnet_tools.bench.traffic import Traffic, bytes_read_whole
from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.machine import this_machine
from retnet_tools.progress import Progress
from retnet_tools.runtime.providers import Device

_PRODUCT_ROWS = (2048, 8192)
_PRODUCT_COLUMNS = (512, 4096)


def run_benchmark(
    model: Model, options: BenchOptions, device: Device, scratch: Path, progress: Progress
) -> BenchReport:
    """Measure a model, and what it is to be measured against.

    Args:
        scratch: a folder for the Transformer and the graphs that measure the device.

    Raises:
        RetNetToolsError: no test could be measured.
        UsageError: no vocabulary, or an alternative that the device or the model does not allow.
        ProviderError: the device cannot be had, or has no kernel for a graph.
        OutputError: no room in the folder.
    """
    if not model.config.has_vocabulary:
        raise UsageError(f"{model.name} is a stack without embedding and head", "a model with a vocabulary")
    shape = _product_shape(model, quick=options.quick)
    progress("writing probes", 0, 1)
    probes = write_probes(shape, model.precision, scratch / PROBE_FOLDER)
    setting = Setting(options.repetitions, probes, shape, options.quick, options.again)
    implementations = [retnet(model, options, device)]
    for name in dict.fromkeys(options.against):
        progress(f"writing {name}", 0, 1)
        implementations.append(alternative(name, model, options, device, scratch))
    rows: list[BenchRow] = []
    skipped: list[SkippedTest] = []
    done, total = 0, options.repetitions * len(options.threads) * sum(len(options.tests(kind)) for kind in KINDS)
    for threads in options.threads:
        for kind in KINDS:
            if tests := options.tests(kind):
                running = [i for i in implementations if i.runs(kind)]
                round = Round(running, tests, threads, setting)
                done = round.run(progress, done, total)
                rows += round.rows()
                skipped += round.skipped
    if not rows and skipped:
        raise RetNetToolsError(f"no test of {model.name} could be measured: {skipped[0].reason}")
    summary = _summary(model, implementations[0].subject.traffic)
    # RetNet may have gone to the CPU where that was allowed.
    ran_on = rows[0].device if rows else device.kind
    return BenchReport(
        summary,
        this_machine(),
        options,
        ran_on,
        device_name(device) if ran_on == device.kind else None,
        tuple(with_measured_memory(rows)),
        tuple(skipped),
    )


def _summary(model: Model, traffic: Traffic) -> ModelSummary:
    return ModelSummary(
        name=model.name,
        parameters=traffic.parameters,
        dtype=model.precision.dtype,
        quantization=model.precision.quantization,
        ops=model.precision.ops,
        state_dtype=model.state_dtype,
        state_bytes_per_sequence=traffic.fixed_state,
        weight_bytes=traffic.weight_bytes,
        weight_bytes_in_file=bytes_read_whole(model.folder),
        last_cache_bytes=last_cache_bytes(),
    )


def _product_shape(model: Model, *, quick: bool) -> ProductShape:
    """A weight like the model's largest, within bounds that are quick to write and large enough to be fast."""
    config = model.config
    rows, columns = 2 * config.feed_forward.dim, config.hidden_size
    # numpy has no bfloat16 to feed; float16 has its rate.
    dtype = "float16" if model.precision.dtype == "bfloat16" else model.precision.dtype
    if quick:
        return ProductShape(_PRODUCT_ROWS[0], _PRODUCT_COLUMNS[0], dtype)
    return ProductShape(
        min(max(rows, _PRODUCT_ROWS[0]), _PRODUCT_ROWS[1]),
        min(max(columns, _PRODUCT_COLUMNS[0]), _PRODUCT_COLUMNS[1]),
        dtype,
    )
