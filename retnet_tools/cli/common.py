"""What the commands share: consoles, JSON, prompts and text_files."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retnet_tools.errors import InputError, UsageError
from retnet_tools.tokenizing import text_files

MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""More CPU threads than this are a slip of the finger, and would stop the machine."""

Threads = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads to use.", min=1, max=MAX_THREADS)]
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
CpuFallback = Annotated[
    bool, typer.Option("--allow-cpu-fallback", help="Run on the CPU what cannot run on CUDA, and say so.")
]
NoCudaGraph = Annotated[
    bool, typer.Option("--no-cuda-graph", help="Run steps on CUDA kernel by kernel, not as captured graphs.")
]
Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", help="Prompt; - or none reads stdin.", show_default=False)
]
PromptFile = Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")]
TokenIds = Annotated[bool, typer.Option("--token-ids", help="Token ids in and out, even with a tokenizer.")]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk-size", help="Prompt tokens to run at once.", min=1, show_default=False)
]

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from retnet_tools.evaluate.logits import LogitsSource
    from retnet_tools.formats.source import CheckpointSource
    from retnet_tools.runtime.decoder import Decoder


def stderr_console() -> Console:
    """The console of progress bars and logs; results go to stdout."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A Rich progress bar on stderr with bytes and speed, shown on terminals only."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows what runs now, as (what, steps done, steps in all), on stderr and on terminals only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = stderr_console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout. NaN and infinities become null, which JSON has no other word for."""
    print(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def open_decoder(
    folder: Path,
    device: str,
    threads: int | None,
    *,
    token_ids: bool,
    cpu_fallback: bool = False,
    no_cuda_graph: bool = False,
    prompts: bool = True,
) -> Decoder:
    """An exported folder on a device, as its options name it."""
    from retnet_tools.runtime.decoder import open_decoder

    return open_decoder(
        folder,
        device,
        threads=threads,
        token_ids=token_ids,
        cpu_fallback=cpu_fallback,
        cuda_graph=False if no_cuda_graph else None,
        prompts=prompts,
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """A prompt from `-p`, from a file, or from stdin (`-p -`, or neither option and stdin not a terminal).

    Raises:
        UsageError: both options, or neither and stdin is a terminal.
        InputError: a file that is missing or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise UsageError("both --prompt and --file", "one of them")
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        if prompt is not None and prompt != "-":
            # Arguments are bytes to the system; under a locale that is not UTF-8 Python reads them otherwise.
            return os.fsencode(prompt).decode("utf-8")
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise UsageError("no prompt", "-p TEXT, --file FILE, or text on stdin")
        return sys.stdin.buffer.read().decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"no file {file}", "a text file in UTF-8") from error
    except IsADirectoryError as error:
        raise InputError(f"{file} is a folder", "a text file in UTF-8") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"a prompt that is not UTF-8 ({error.reason} at byte {error.start})", "text in UTF-8"
        ) from error


def read_text(file: Path | None) -> text_files.Text:
    """The text of a file, or of stdin for `-`.

    Raises:
        UsageError: no file named.
        InputError: a file that is missing or not UTF-8.
    """
    if file is None:
        raise UsageError(
            "no text to score",
            "--text FILE, or --text - for stdin",
            "a play that the shipped model has not seen is fixtures/shakespeare/heldout.txt in the source tree",
        )
    if str(file) != "-":
        return text_files.read_text(file)
    if sys.stdin is None:
        raise UsageError("no stdin", "--text FILE")
    return text_files.read_stream(sys.stdin.buffer, "stdin")


def open_logits(
    source: CheckpointSource,
    device: str,
    threads: int | None,
    dtype: str = "fp32",
    *,
    cpu_fallback: bool = False,
    no_cuda_graph: bool = False,
) -> LogitsSource:
    """A model that scores text: an exported folder on a device, or a checkpoint, which torch runs on the CPU.

    Raises:
        UsageError: a checkpoint for another device, or a stack without a vocabulary.
        InputError, ProviderError: as the exported folder and the checkpoint.
    """
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.evaluate.logits import ExportLogits, is_export
    from retnet_tools.runtime.providers import parse_device

    target, number_type = parse_device(device, cpu_fallback=cpu_fallback), parse_dtype(dtype)
    path = source.path
    if not source.says_how and is_export(path):
        return ExportLogits(path, target, threads, cuda_graph=False if no_cuda_graph else None)
    if target.kind != "cpu":
        raise UsageError(f"--device {device} for {path}, which is no export", "--device cpu", "export the checkpoint")
    from retnet_tools.model.streaming import CheckpointLogits

    return CheckpointLogits(source.open(), number_type, threads)


def parse_size(text: str) -> int:
    """Bytes from a number with a unit: 5GB, 500MB, 2GiB, or plain bytes.

    Raises:
        UsageError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"size {text!r}", "a number with a unit, such as 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise UsageError(f"size {text!r}", "at least one byte")
    return size


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
