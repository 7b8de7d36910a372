"""`retnet-tools generate`: continue a prompt, or a file of prompts, with an exported model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retnet_tools.cli import options
from retnet_tools.errors import UsageError

if TYPE_CHECKING:
    from retnet_tools.runtime.bulk import BulkOptions
    from retnet_tools.runtime.decoder import Decoder


def generate(
    folder: Annotated[Path, typer.Argument(help="Folder that `retnet-tools export` wrote.", show_default=False)],
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="JSON lines with a prompt each; needs -o.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Answers to --prompts; run again to resume.")
    ] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Rows of --prompts to run at once.", min=1)] = 8,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Answer rows of --prompts again that ended in an error.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Tokens to generate at most.")] = 128,
    samples: Annotated[int, typer.Option("--samples", help="Texts for the prompt, which is read once.", min=1)] = 1,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text to stop before; may be repeated.")] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past end-of-text.")] = False,
    state_in: Annotated[
        Path | None, typer.Option("--state-in", help="Go on from a saved state, sampling as it says where not given.")
    ] = None,
    state_out: Annotated[Path | None, typer.Option("--state-out", help="Save the state after the last token.")] = None,
    token_ids: options.TokenIds = False,
    chunk_size: options.ChunkSize = None,
    device: options.DeviceName = "cpu",
    cpu_fallback: options.CpuFallback = False,
    no_cuda_graph: options.NoCudaGraph = False,
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a stream.")] = False,
) -> None:
    """Continue a prompt, streaming text to stdout and speed to stderr; or answer a file of prompts."""
    from retnet_tools.console import print_json, print_message
    from retnet_tools.reports.generation import generation_document, generation_speed
    from retnet_tools.runtime.decode import Stopping, generate_from
    from retnet_tools.runtime.decoder import open_decoder
    from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
    from retnet_tools.runtime.sampling import Sampling
    from retnet_tools.runtime.sequences import Sequences
    from retnet_tools.staging import check_file
    from retnet_tools.tokenizing.text_files import read_prompt

    named = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    chosen: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    stops, size = tuple(stop or ()), chunk_size or PREFILL_CHUNK_SIZE
    Stopping(max_tokens, (), stops), Sampling(**chosen)
    if (prompts is None) != (output is None):
        raise UsageError("--prompts and -o belong together", "both or neither")
    if retry_failed and (prompts is None or force):
        raise UsageError("--retry-failed", "--prompts and an -o to go on with, without --force")
    if state_out is not None:
        check_file(state_out, force=force)
    opened = partial(
        open_decoder,
        folder,
        device,
        threads=threads,
        token_ids=token_ids,
        cpu_fallback=cpu_fallback,
        cuda_graph=False if no_cuda_graph else None,
    )
    if prompts is not None and output is not None:
        if prompt is not None or file is not None or state_in or state_out or samples > 1:
            raise UsageError("--prompts with -p, --file, --samples or a state", "one job at a time")
        from retnet_tools.runtime.bulk import BulkOptions, check_bulk

        check_bulk(prompts, output)
        with opened(prompts=True) as decoder:
            stopping = Stopping(max_tokens, () if ignore_end else decoder.codec.end_ids, stops)
            bulk = BulkOptions(stopping, Sampling(**chosen), batch, size)
            _answer(decoder, prompts, output, bulk, force=force, retry_failed=retry_failed, as_json=as_json)
        return
    if samples > 1 and not chosen.get("temperature") and state_in is None:
        print_message(f"--samples {samples} at temperature 0: all {samples} will be the same text")
    goes_on = state_in is not None and prompt is None and file is None
    text = None if goes_on else read_prompt(prompt, file)
    with opened(prompts=not goes_on) as decoder:
        session, codec = decoder.session, decoder.codec
        if state_in is None:
            sequences = Sequences.start(session, 1, Sampling(**chosen))
        else:
            from retnet_tools.runtime.state_file import read_state

            sequences = read_state(state_in).sequences(session, chosen)
        several = sequences.batch * samples > 1
        result = generate_from(
            sequences,
            [] if text is None else [codec.encode(text)] * sequences.batch,
            Stopping(max_tokens, () if ignore_end else codec.end_ids, stops),
            samples=samples,
            codec=codec,
            on_token=None if several or as_json else lambda row, token, piece: print(piece, end="", flush=True),
            chunk_size=size,
            keep=state_out is not None,
        )
        if as_json:
            print_json(generation_document(result))
        else:
            print(*[f"[{i}] {row.text}" for i, row in enumerate(result.rows)] if several else [], sep="\n")
        print_message(generation_speed(result))
        if state_out is not None and result.sequences is not None:
            from retnet_tools.runtime.state_file import capture, write_state

            write_state(state_out, capture(result.sequences), force=force)


def _answer(
    decoder: Decoder,
    prompts: Path,
    output: Path,
    bulk: BulkOptions,
    *,
    force: bool,
    retry_failed: bool,
    as_json: bool,
) -> None:
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.reports.generation import bulk_document, bulk_text
    from retnet_tools.runtime.bulk import generate_bulk

    with progress_bar() as progress:
        summary = generate_bulk(
            decoder.session,
            decoder.codec,
            prompts,
            output,
            bulk,
            force=force,
            retry_failed=retry_failed,
            progress=progress,
        )
    print_json(bulk_document(summary, output)) if as_json else typer.echo(bulk_text(summary, output))
