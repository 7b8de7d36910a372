"""An exported folder again, with smaller weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retnet_tools.jobs.export import ExportResult, WriteRequest, check_output, write
from retnet_tools.progress import Progress, no_progress


@dataclass(frozen=True)
class QuantizeRequest(WriteRequest):
    """An exported folder to quantize.

    Attributes:
        folder: exported folder with float weights.
        quantize: int8, int4 or another type of codes for weights in blocks; fp16 or bf16 for everything but states.
        output: folder to make; <name>-<type> beside it if left out.
    """

    folder: Path | str
    quantize: str
    output: Path | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.options_for(self.quantize)
        assert options is not None
        self.settle(quantize=options.word)


def quantize(request: QuantizeRequest, progress: Progress = no_progress) -> ExportResult:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states.

    Memory and errors: as `retnet_tools.jobs.export.export`.

    Raises:
        InputError: a folder that is no export, or one that is quantized already.
    """
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.graph.export import default_output, plan_of_export

    source = Path(request.folder)
    folder = default_output(source, request.quantize) if request.output is None else Path(request.output)
    check_output(request, folder, source, quantized=True)
    options = request.options_for(request.quantize)
    return write(request, plan_of_export(source), options, folder, CheckpointSource(source), progress)
