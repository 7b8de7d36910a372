"""Options of several commands that are no fields of a request, and what is said of some results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli.command import MAX_THREADS
from retnet_tools.console import print_message
from retnet_tools.errors import UsageError

running, sampling, writing = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Device", "Sampling", "Output")
)

DeviceName = Annotated[str, running("--device", help="cpu, cuda or cuda:N.")]
CpuFallback = Annotated[
    bool, running("--allow-cpu-fallback", help="Run on the CPU what cannot run on CUDA, and say so.")
]
NoCudaGraph = Annotated[
    bool, running("--no-cuda-graph", help="Run steps on CUDA kernel by kernel, not as captured graphs.")
]
Threads = Annotated[int | None, running("-t", "--threads", help="CPU threads to use.", min=1, max=MAX_THREADS)]
Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", help="Prompt; - or none reads stdin.", show_default=False)
]
PromptFile = Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")]
TokenIds = Annotated[bool, typer.Option("--token-ids", help="Token ids in and out, even with a tokenizer.")]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk-size", help="Prompt tokens to run at once.", min=1, show_default=False)
]
Temperature = Annotated[
    float | None, sampling("--temperature", "--temp", help="0, the default, takes the likeliest token.")
]
TopK = Annotated[int | None, sampling("--top-k", help="Keep the k likeliest tokens; 0, the default, keeps all.")]
TopP = Annotated[float | None, sampling("--top-p", help="Keep the smallest set of this probability; 1 keeps all.")]
MinP = Annotated[float | None, sampling("--min-p", help="Keep tokens of this share of the best one's probability.")]
RepetitionPenalty = Annotated[
    float | None, sampling("--repetition-penalty", help="Above 1 makes tokens of the text so far less likely.")
]
Seed = Annotated[int | None, sampling("--seed", help="Seed of the sampler; 0 if left out.", min=0)]
Plot = Annotated[Path | None, writing("--plot", help="Draw the figures: a .png, .svg or .pdf.", show_default=False)]
Force = Annotated[bool, writing("--force", help="Replace an output that is there.")]
Json = Annotated[bool, writing("--json", help="Print one JSON document.")]


def parse_numbers(option: str, text: str) -> list[int]:
    """Numbers from 0 on from a comma list.

    Raises:
        UsageError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(f"{option} {text!r}", "whole numbers, separated by commas")
    return [int(word) for word in words]


def parse_counts(option: str, text: str, largest: int | None = None) -> list[int]:
    """Positive numbers from a comma list.

    Raises:
        UsageError: anything else.
    """
    counts = parse_numbers(option, text)
    if min(counts) < 1:
        raise UsageError(f"{option} {text!r}", "positive numbers, separated by commas")
    if largest is not None and max(counts) > largest:
        raise UsageError(f"{option} {max(counts)}", f"at most {largest}")
    return counts


def say_shipped(checkpoint: str | Path) -> None:
    """Say that the checkpoint inside the package is used, where none was named: what a command line names is text."""
    if isinstance(checkpoint, Path):
        print_message(f"no checkpoint named: using the shipped one, {checkpoint}")


def say_kept(folder: Path | None) -> None:
    """Say that a dry run has kept results, where it has."""
    if folder is not None:
        print_message(f"what was done is kept in {folder}; the same command without --dry-run goes on from there")
