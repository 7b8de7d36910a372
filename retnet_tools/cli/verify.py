"""`retnet-tools verify`: do the forms of retention agree on a checkpoint, and if not, why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common, source


def verify(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint: folder, file or name on the hub; the shipped one if left out.", show_default=False
        ),
    ] = None,
    modes: Annotated[
        str, typer.Option("--modes", help="Forms to compare: two or more of parallel, recurrent, chunkwise.")
    ] = "parallel,recurrent,chunkwise",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16, bf16 or fp64.")] = "fp32",
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Largest difference in logits by rounding and epsilon, in place of the budgets by dtype. A difference "
            "that is logic, or of a hand-off, fails all the same.",
            min=0.0,
        ),
    ] = None,
    chunk_size: Annotated[int, typer.Option("--chunk-size", help="Tokens in a chunk of the chunkwise form.")] = 48,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to run, or of the text to use.", min=1)] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random tokens.", min=0)] = 0,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Run on this text (- reads stdin), not on random tokens.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", "--text", help="Run on the text of this file, not on random tokens.")
    ] = None,
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="CPU threads to use.", min=1, max=common.MAX_THREADS)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare the forms on the same tokens and say why they differ: rounding, normalisation epsilon or logic.

    Also prefills prefixes in each form and continues them in every other. Ends with exit code 3 when a difference is
    over its budget.
    """
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.model.agreement import compare_forms, require_agreement, select_forms, use_threads
    from retnet_tools.model.clamps import compare_clamps
    from retnet_tools.reports.agreement import AgreementContext, agreement_document, render_agreement
    from retnet_tools.tokenizing.token_ids import choose_tokens

    number_type = parse_dtype(dtype)
    forms = select_forms(modes.split(","), chunk_size)
    text = None if prompt is None and file is None else common.read_prompt(prompt, file)
    opened = source.checkpoint_source(checkpoint, source_format, config, entry, clamp, revision, ignore_key).open()
    chosen = choose_tokens(opened.config, opened.tokenizer_files, text, length=tokens, seed=seed)
    use_threads(threads)
    with common.step_progress() as progress:
        compare = compare_clamps if opened.assumed_clamp else compare_forms
        report = compare(
            opened.config, opened.weights, chosen.ids, forms, dtype=number_type, tolerance=tolerance, progress=progress
        )
    context = AgreementContext(str(opened.path), chosen.source, opened.notes)
    common.print_json(agreement_document(report, context)) if as_json else render_agreement(report, context)
    require_agreement(report)
