"""Whether an exported folder is its checkpoint: its text, each byte of its weights, its graphs, what its types cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.errors import UsageError, VerificationError
from retnet_tools.evaluate.against import AgainstRuns, cost_checks
from retnet_tools.evaluate.budget_file import AgainstBudget, Rounding, read_budget
from retnet_tools.evaluate.checks import Check
from retnet_tools.evaluate.folder_checks import check_config, check_constants, check_files, check_text
from retnet_tools.evaluate.graph_runs import GraphRuns
from retnet_tools.evaluate.stored_weights import StoredWeights
from retnet_tools.evaluate.walks import (
    FAR_LENGTHS,
    FAR_TOKENS,
    LEAST_TOKENS,
    far_positions,
    far_states,
    far_tokens,
    start_cuts,
)
from retnet_tools.evaluate.weight_checks import judge_weights
from retnet_tools.formats import Checkpoint, CheckpointSource
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.contract import DECODER_FILE, state_scale
from retnet_tools.graph.export import ExportPlan, plan_export
from retnet_tools.graph.manifest import Manifest, parse_manifest
from retnet_tools.graph.quantization import Scheme
from retnet_tools.graph.targets import find_target
from retnet_tools.jobs.verify_request import VerifyRequest
from retnet_tools.progress import Progress, in_megabytes
from retnet_tools.quantize.options import matrix_formats, scheme_text
from retnet_tools.quantize.plan import plan_blocks
from retnet_tools.runtime.providers import Device, check_device, parse_device
from retnet_tools.tokenizing.text_files import read_text
from retnet_tools.tokenizing.token_ids import choose_tokens
from retnet_tools.weights import Array

if TYPE_CHECKING:
    from retnet_tools.model.noise import Noise

PARTS = ("text", "weights", "graphs", "cost", "files")
"""What is looked at, what says most about a fault first."""


@dataclass(frozen=True)
class AgainstResult:
    """What was found of an export.

    Attributes:
        export, checkpoint: where they lie.
        device: where its graphs ran.
        kind: what it is, in words.
        tokens: where the tokens came from, in words, and how many.
        checks: all that was looked at.
        notes: what was said on reading the checkpoint, and what was left out.
    """

    request: VerifyRequest = field(repr=False)
    export: Path
    checkpoint: Path
    device: str
    kind: str
    tokens: str
    checks: tuple[Check, ...] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit."""
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Do nothing for an export that passed.

        Raises:
            VerificationError: the check that is furthest over its limit, and where.
        """
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return
        first = min(failed, key=lambda check: (PARTS.index(check.part), -check.excess))
        where = f" ({first.where})" if first.where else ""
        costs = first.part == "cost"
        said = "costs more than its budget against" if costs else "is not an export of"
        raise VerificationError(
            f"{self.export} {said} {self.checkpoint}: {first.part}, {first.name}: {first.measured:.3g} "
            f"{first.unit}{where}; {len(failed)} of {len(self.checks)} checks failed",
            f"at most {first.limit:.3g}",
            "choose other types, or a --budget" if costs else "name its own checkpoint, or export this one again",
        )


def verify_against(request: VerifyRequest, folder: Path, source: CheckpointSource, progress: Progress) -> AgainstResult:
    """Hold an exported folder to a checkpoint.

    Memory: the graphs as they run, one layer of the checkpoint in float64 or the vocabulary's matrix, and the states of
    about 60 sequences.

    Raises:
        UsageError: tokens that the model cannot take.
        InputError: a checkpoint, an export or a budget that cannot be read, or whose parts do not fit one another.
        ProviderError: the device cannot be had.
    """
    budget = read_budget(None if request.budget is None else Path(request.budget))
    device = parse_device(request.device)
    check_device(device)
    manifest, opened = parse_manifest(folder), source.open()
    text = request.text if request.file is None else read_text(Path(request.file)).content
    chosen = choose_tokens(opened.config, opened.tokenizer_files, text, length=request.tokens, seed=request.seed)
    if (length := chosen.ids.shape[1]) < LEAST_TOKENS:
        raise UsageError(f"{length} tokens to verify an export on", f"at least {LEAST_TOKENS}")
    plan = plan_of(opened, manifest)
    checks, notes = [check_config(manifest.config, opened.config), *check_text(folder, plan)], list(opened.notes)
    if checks[0].passed:
        held = Held(request, folder, manifest, opened, plan, budget, device)
        tokens = chosen.ids[:1] if opened.config.has_vocabulary else chosen.ids[:1].astype(np.float32)
        # What is not finite fails, and needs no warning besides.
        with np.errstate(all="ignore"):
            weights = held.weights(progress)
            checks += [*weights, check_constants(folder, manifest.graphs, plan)]
            checks += held.graphs(tokens, same=all(check.passed for check in weights), progress=progress)
    else:
        notes.append("of another configuration: weights and graphs were not looked at")
    if missing := set(plan.graphs) - set(manifest.graphs):
        notes.append(f"no {', '.join(sorted(missing))}, which retnet-tools runs: export again")
    scheme = "" if manifest.quantization is None else f", {scheme_text(manifest.quantization.scheme)}"
    size = sum(record.bytes for record in manifest.files.values())
    checks += check_files(folder, manifest, in_megabytes(progress, "files", size))
    kind = f"{manifest.dtype}{scheme}, {manifest.ops} operators, {', '.join(manifest.graphs)}"
    words = f"{length} tokens ({chosen.source})"
    return AgainstResult(request, folder, opened.path, str(device), kind, words, tuple(checks), tuple(notes))


@dataclass(frozen=True)
class Held:
    """An export of the configuration of its checkpoint; `plan` is of float weights."""

    request: VerifyRequest
    folder: Path
    manifest: Manifest
    opened: Checkpoint
    plan: ExportPlan
    budget: AgainstBudget
    device: Device

    def weights(self, progress: Progress) -> list[Check]:
        """Every byte of weights.data."""
        scheme = self._scheme
        return judge_weights(
            self._stored,
            self.opened.config,
            self.opened.weights,
            self.manifest.dtype,
            method=None if scheme is None else scheme.method,
            budget=self.budget.weights,
            progress=in_megabytes(progress, "weights", self._stored.file.stat().st_size),
        )

    def graphs(self, tokens: Array, *, same: bool, progress: Progress) -> list[Check]:
        """Tokens `[1, T]` through the graphs, and what types and quantization cost on them.

        Args:
            same: whether the weights of the folder are those of the checkpoint, rounded.
        """
        from retnet_tools.model.reference import Walk, expected_runs
        from retnet_tools.model.streaming import use_threads

        config, manifest, length = self.opened.config, self.manifest, tokens.shape[1]
        use_threads(config, length, self.request.threads)
        floats, steps = self._noises()
        noises = [*floats, *steps]
        given = (self.folder, manifest, config, self.device, self.request.threads)
        as_is = GraphRuns(*given)
        noise = len(floats) if steps else 0
        runs = [(as_is, noise, "")]
        if DECODER_FILE in manifest.graphs:
            runs.append((GraphRuns(*given, decoder=True), noise, f", {DECODER_FILE}"))
        if steps:
            runs.append((GraphRuns(*given, exact=True), 0, ", products in floats"))
        start = Walk(tokens, np.zeros(1, dtype=np.int64), start_cuts(length))
        expect = partial(expected_runs, config, self._stored, copies=self.budget.noise.copies, progress=progress)
        (begun,) = expect([start], noises)
        far = as_is.standing(far_states(config, begun.states[length], length, self.request.seed), far_positions())
        ids = far_tokens(config, self.request.seed)
        (full,) = expect([Walk(ids, far.position, (*FAR_LENGTHS, FAR_TOKENS), as_is.sums(far))], noises)
        checks, stepped = [], None
        for done, (graphs, noise, suffix) in enumerate(runs):
            progress("graphs", done, len(runs))
            judge = AgainstRuns(
                config,
                graphs,
                state_relative=self._state.relative,
                state_absolute=np.array(self._state_absolute),
                margin=self.budget.noise.margin,
                noise=noise,
                written=noise + len(floats) - 1,
                suffix=suffix,
            )
            judge.start(tokens, begun)
            judge.far(ids, far, full)
            checks += judge.checks
            stepped = judge.stepped if stepped is None else stepped
        if config.has_vocabulary and stepped is not None:
            base = begun.logits
            if not same or self._formats or manifest.dtype != "float32":
                (whole,) = expected_runs(config, self.opened.weights, [replace(start, cuts=())], [], progress)
                base = whole.logits
            checks += cost_checks(base, stepped, getattr(self.budget.cost, self._kind))
        return checks

    def _noises(self) -> tuple[list[Noise], list[Noise]]:
        """What graphs compute with: floats, and products in int8 where there are any; of each, where states lose much
        each time that they are written, first without that and then with it.
        """
        from retnet_tools.model.noise import Noise

        noise, scheme = self.budget.noise, self._scheme
        rounding = getattr(noise, self.manifest.dtype)
        floats = Noise(noise.headroom * rounding.relative, noise.headroom * rounding.absolute, 0.0, {})
        lost = replace(floats, state=self._state.relative, state_absolute=self._state_absolute)
        writes = [lost] if self.manifest.state_dtype != "float32" else []
        # Standard operators leave the level to ONNX Runtime, whose default is 4. CUDA has none but floats.
        if scheme is None or self.device.kind != "cpu" or scheme.accuracy_level not in (4, None):
            return [floats, *writes], []
        blocks = {name: format.block_size for name, format in self._formats.items()}
        steps = noise.headroom * noise.activation_steps
        return [floats, *writes], [replace(kind, steps=steps, blocks=blocks) for kind in (floats, *writes)]

    @property
    def _scheme(self) -> Scheme | None:
        return None if self.manifest.quantization is None else self.manifest.quantization.blocks

    @property
    def _kind(self) -> str:
        """The coarsest type of weights, or of states where weights are float32."""
        if formats := self._formats.values():
            return min(formats, key=lambda format: format.bits).type.name
        return self.manifest.state_dtype if self.manifest.dtype == "float32" else self.manifest.dtype

    @property
    def _state(self) -> Rounding:
        rounding: Rounding = getattr(self.budget.state, self.manifest.state_dtype)
        return rounding

    @property
    def _state_absolute(self) -> tuple[float, ...]:
        """What the smallest numbers of states may lose, of the plain sum S."""
        scales = state_scale(self.opened.config, self.manifest.state_dtype)
        return tuple(self._state.absolute / scale for scale in scales)

    @property
    def _formats(self) -> dict[str, BlockFormat]:
        """Of the matrices that are quantized."""
        scheme = self._scheme
        formats = {} if scheme is None else matrix_formats(scheme, self.opened.config)
        return {name: format for name, format in formats.items() if format is not None}

    @cached_property
    def _stored(self) -> StoredWeights:
        plan, scheme = self.plan, self._scheme
        # The method decides codes, and nothing else of a plan.
        plan = plan if scheme is None else plan_blocks(plan, replace(scheme, method="rtn"))
        return StoredWeights(self.folder, self.opened.config, self.manifest.graphs, plan.tensors)


def plan_of(opened: Checkpoint, manifest: Manifest) -> ExportPlan:
    """What an export of this kind of the checkpoint holds, its weights floats."""
    return plan_export(
        opened,
        dtype=manifest.dtype,
        ops=manifest.ops,
        state_dtype=manifest.state_dtype,
        target=find_target(manifest.graphs).name,
        device=manifest.device,
        opset=manifest.opset,
    )
