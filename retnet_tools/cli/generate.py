"""`retnet-tools generate`: continue a prompt with an exported model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common


def generate(
    folder: Annotated[Path, typer.Argument(help="Folder that `retnet-tools export` wrote.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Prompt; - or none reads stdin.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the smallest set of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.", min=0)] = 0,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past end-of-text.")] = False,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Token ids in and out, even with a tokenizer.")
    ] = False,
    chunk_size: Annotated[
        int | None, typer.Option("--chunk-size", help="Prompt tokens to run at once.", min=1, show_default=False)
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="CPU threads to use.", min=1, max=common.MAX_THREADS)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a stream.")] = False,
) -> None:
    """Continue a prompt, streaming text to stdout and speed to stderr."""
    from retnet_tools.reports.decoding import generation_document, generation_speed
    from retnet_tools.runtime.decode import generate as run
    from retnet_tools.runtime.prompts import DEFAULT_CHUNK_SIZE
    from retnet_tools.runtime.providers import parse_device
    from retnet_tools.runtime.sampling import Sampling
    from retnet_tools.runtime.session import DecoderSession
    from retnet_tools.runtime.text import open_codec

    sampling = Sampling(temperature, top_k, top_p, seed)
    text = common.read_prompt(prompt, file)
    session = DecoderSession(folder, parse_device(device), threads)
    codec = open_codec(folder, session.manifest.config.vocab_size, token_ids=token_ids)
    stream, pieces = codec.stream(), list[str]()

    def show(token: int) -> None:
        pieces.append(stream.push(token))
        if not as_json:
            print(pieces[-1], end="", flush=True)

    end_ids = () if ignore_end else codec.end_ids
    result = run(
        session,
        codec.encode(text),
        max_tokens=max_tokens,
        sampling=sampling,
        end_ids=end_ids,
        on_token=show,
        chunk_size=chunk_size or DEFAULT_CHUNK_SIZE,
    )
    if as_json:
        common.print_json(generation_document(result, "".join(pieces)))
    else:
        print()
    print(generation_speed(result), file=sys.stderr)
