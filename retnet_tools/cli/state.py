"""`retnet-tools state`: sequences as files: save a prompt once, go on from it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.help import PanelCommand, PanelGroup, examples

app = typer.Typer(
    name="state",
    help="Sequences as files: save a prompt once, go on from it at once.",
    cls=PanelGroup,
    rich_markup_mode=None,
    epilog=examples("state save decoder/ -p 'ROMEO. ' -o romeo.state", "generate decoder/ --state-in romeo.state"),
)

Model = Annotated[Path, typer.Argument(help="Folder that `retnet-tools export` wrote.", show_default=False)]
StatePath = Annotated[Path, typer.Argument(help="State file.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="State file to write.", show_default=False)]


@app.command(cls=PanelCommand, epilog=examples("state save decoder/ -p 'ROMEO. ' -o romeo.state"))
def save(
    folder: Model,
    output: Output,
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    token_ids: options.TokenIds = False,
    chunk_size: options.ChunkSize = None,
    device: options.DeviceName = "cpu",
    cpu_fallback: options.CpuFallback = False,
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Read a prompt and write what it left: states, position, logits."""
    from retnet_tools.console import print_json
    from retnet_tools.reports.states import render_state, state_document
    from retnet_tools.runtime.decoder import open_decoder
    from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
    from retnet_tools.runtime.sequences import Sequences
    from retnet_tools.runtime.state_file import capture, write_state
    from retnet_tools.staging import check_file
    from retnet_tools.tokenizing.text_files import read_prompt

    check_file(output, force=force)
    with open_decoder(folder, device, threads=threads, token_ids=token_ids, cpu_fallback=cpu_fallback) as decoder:
        sequences = Sequences.start(decoder.session)
        tokens = decoder.codec.encode(read_prompt(prompt, file))
        sequences.feed([tokens], chunk_size=chunk_size or PREFILL_CHUNK_SIZE)
        state = capture(sequences)
    write_state(output, state, force=force)
    document = state_document(output, state)
    print_json(document) if as_json else render_state(document)


@app.command(cls=PanelCommand, epilog=examples("state load decoder/ romeo.state -n 10"))
def load(
    folder: Model,
    state: StatePath,
    count: Annotated[int, typer.Option("-n", "--top", help="How many next tokens to show.", min=1)] = 5,
    token_ids: options.TokenIds = False,
    device: options.DeviceName = "cpu",
    cpu_fallback: options.CpuFallback = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Check that a state fits a model; show what comes next."""
    from retnet_tools.console import print_json
    from retnet_tools.evaluate.saved_states import likeliest
    from retnet_tools.reports.states import next_tokens_document, render_next_tokens
    from retnet_tools.runtime.decoder import open_decoder
    from retnet_tools.runtime.state_file import read_state

    found = read_state(state)
    with open_decoder(folder, device, threads=threads, token_ids=token_ids, cpu_fallback=cpu_fallback) as decoder:
        found.check(decoder.session)
        decode = decoder.codec.decode
    words = [[(token, decode([token]), p) for token, p in likeliest(row, count)] for row in found.logits]
    document = next_tokens_document(found, words)
    print_json(document) if as_json else render_next_tokens(document)


@app.command(cls=PanelCommand, epilog=examples("state fork romeo.state -o four.state -n 4"))
def fork(
    state: StatePath,
    output: Output,
    copies: Annotated[int, typer.Option("-n", "--copies", help="Copies of every row.", min=1)] = 2,
    rows: Annotated[str | None, typer.Option("--rows", help="Rows to take, as 0,0,2; all if left out.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Copy rows of a state; each copy draws random numbers of its own."""
    from retnet_tools.console import print_json
    from retnet_tools.reports.states import render_state, state_document
    from retnet_tools.runtime.state_file import read_state, write_state
    from retnet_tools.staging import check_file

    check_file(output, force=force)
    found = read_state(state)
    chosen = list(range(found.batch)) if rows is None else options.parse_numbers("--rows", rows)
    forked = found.select([row for row in chosen for _ in range(copies)])
    write_state(output, forked, force=force)
    document = state_document(output, forked)
    print_json(document) if as_json else render_state(document)


@app.command(cls=PanelCommand, epilog=examples("state info romeo.state"))
def info(state: StatePath, as_json: options.Json = False) -> None:
    """What a state file holds."""
    from retnet_tools.console import print_json
    from retnet_tools.reports.states import render_state, state_document
    from retnet_tools.runtime.state_file import read_state

    document = state_document(state, read_state(state))
    print_json(document) if as_json else render_state(document)


@app.command(cls=PanelCommand, epilog=examples("state diff romeo.state four.state --tolerance 1e-5"))
def diff(
    first: StatePath,
    second: StatePath,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Exit code 3 past this relative difference.", min=0)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """How far two states are apart, layer by layer."""
    from retnet_tools.console import print_json
    from retnet_tools.evaluate.saved_states import compare_states
    from retnet_tools.reports.states import difference_document, render_difference
    from retnet_tools.runtime.state_file import read_state

    comparison = compare_states(read_state(first), read_state(second))
    document = difference_document(comparison)
    print_json(document) if as_json else render_difference(document)
    if tolerance is not None:
        comparison.require(tolerance)
