"""The command `retnet-tools`: one module a command, errors as one line with an exit code."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from functools import partial
from typing import Annotated, Any, NoReturn, TextIO

import typer

from retnet_tools import console
from retnet_tools.cli.bench import bench
from retnet_tools.cli.convert import convert
from retnet_tools.cli.doctor import doctor
from retnet_tools.cli.export import export
from retnet_tools.cli.generate import generate
from retnet_tools.cli.help import SHARED, PanelCommand, PanelGroup, examples
from retnet_tools.cli.inspect import inspect
from retnet_tools.cli.perplexity import perplexity
from retnet_tools.cli.quantize import quantize
from retnet_tools.cli.state import app as state_app
from retnet_tools.cli.verify import verify
from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.graph.code_types import CODE_TYPES
from retnet_tools.version import __version__

app = typer.Typer(
    name="retnet-tools",
    help="""Take a RetNet from a training checkpoint to fast, verified inference.

    Exit codes: 0 done, 1 failure, 2 usage, 3 verification over its budget, 4 provider not available, 5 input that is
    missing, unsupported, unsafe or corrupt.""",
    cls=PanelGroup,
    rich_markup_mode=None,  # Rich help would take longer to import than to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples("export ckpt/ -o decoder/", "generate decoder/ -p 'ROMEO. ' -n 60", "verify ckpt/"),
)

COMMANDS = (
    (
        "Checkpoints",
        inspect,
        "What a checkpoint or an export holds, and lint.",
        ("inspect ckpt/", "inspect org/name --revision main --json"),
    ),
    (
        "Checkpoints",
        convert,
        "A checkpoint to another format, bit for bit.",
        ("convert ckpt/ converted/", "convert model.pt converted/ --to torchscale --dtype bf16"),
    ),
    (
        "Checkpoints",
        verify,
        "Whether the forms agree on a checkpoint, and why not.",
        ("verify", "verify ckpt/ --modes parallel,recurrent,chunkwise"),
    ),
    (
        "Exports",
        export,
        "A checkpoint to a stateful ONNX decoder.",
        ("export ckpt/ -o decoder/", "export ckpt/ -o decoder/ --device cuda --dtype fp16 --quantize int4"),
    ),
    (
        "Exports",
        quantize,
        f"An export with {', '.join(CODE_TYPES)} or half-precision weights.",
        (
            "quantize decoder/ -o small/ --quantize int8",
            "quantize decoder/ --quantize int4 --method gptq --calibration text.txt",
        ),
    ),
    (
        "Exports",
        generate,
        "Continue a prompt with an exported decoder.",
        (
            "generate decoder/ -p 'ROMEO. ' -n 60 --temp 0.8",
            "generate decoder/ --prompts in.jsonl -o out.jsonl",
        ),
    ),
    (
        "Numbers",
        perplexity,
        "How well a model predicts a text, and how far it is from a baseline.",
        ("perplexity ckpt/ --text play.txt", "perplexity small/ --text play.txt --against decoder/ --by-position"),
    ),
    (
        "Numbers",
        bench,
        "How fast a model decodes on this machine.",
        ("bench decoder/ -t 1,2", "bench --size 1.3b --quantize int8 -p 512 -n 64 --against torch,transformer"),
    ),
    (
        "Numbers",
        doctor,
        "What this machine can run, and what is missing.",
        ("doctor", "doctor decoder/ --device cuda"),
    ),
)
for panel, command, summary, shown in COMMANDS:
    app.command(cls=PanelCommand, short_help=summary, rich_help_panel=panel, epilog=examples(*shown))(command)
app.add_typer(state_app, short_help="Sequences as files: save a prompt, go on from it.", rich_help_panel="Exports")


SCHEMA_VERSION = 1
"""Of errors as JSON."""
KINDS = {1: "failure", 2: "usage", 3: "verification", 4: "provider", 5: "input"}
LEVELS = {"quiet": logging.ERROR, "verbose": logging.DEBUG}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""What asks a program to end; each system has some."""
_shared = partial(typer.Option, rich_help_panel=SHARED, expose_value=False)


class _Notes(logging.Handler):
    """Notes on stderr: plain, or with the time since the start where everything is said."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        since = f"[{record.relativeCreated / 1e3:.2f} s] " if console.LOG.isEnabledFor(logging.DEBUG) else ""
        print(f"{since}{record.getMessage()}", file=sys.stderr)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"retnet-tools {__version__}")
        raise typer.Exit


def _set_level(param: typer.CallbackParam, value: bool) -> None:
    if value:
        console.LOG.setLevel(LEVELS[param.name or ""])


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool, _shared("-q", "--quiet", callback=_set_level, help="No notes and no progress on stderr.")
    ] = False,
    verbose: Annotated[
        bool, _shared("-v", "--verbose", callback=_set_level, help="Say what is opened, and when, on stderr.")
    ] = False,
    debug: Annotated[bool, _shared("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Hold the options that every command shares."""


def main() -> None:
    """Run a command, turn errors into one line on stderr and their exit code, and signals into 128 and their number."""
    stops = _Stops()
    for name in SIGNALS:
        number = getattr(signal, name, None)
        # nohup ignores one, and a shell another of what it starts in the background.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stops.stop)
    warnings.showwarning = _show_warning
    console.LOG.handlers, console.LOG.propagate = [_Notes()], False
    console.LOG.setLevel(logging.INFO)
    # Both would report their use to their makers: not from here without being asked.
    for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    documents = console.documents_printed()
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="retnet-tools", standalone_mode=False)
        _flush_results()
        console.LOG.debug("done")
        sys.exit(code or 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _forget_results()
        sys.exit(128 + 13)
    except Exception as error:
        if stops.number is not None:
            # A module that was being imported has made an error of it.
            sys.exit(128 + stops.number)
        if "--debug" in sys.argv:
            traceback.print_exc()
        _fail(*_for_the_user(error), documents)


def _for_the_user(error: Exception) -> tuple[RetNetToolsError, str]:
    """Any error as one that says what was found and what to do, and its kind in a word."""
    if isinstance(error, RetNetToolsError):
        return error, KINDS[error.exit_code]
    if isinstance(error, command_line_error(typer.BadParameter)):
        # What a missing argument is, its name alone does not say.
        help = getattr(getattr(error, "param", None), "help", None) if "issing" in type(error).__name__ else None
        where = getattr(getattr(error, "ctx", None), "command_path", "retnet-tools")
        told = f"{error.format_message().rstrip('.')}{f': {help}' if help else ''}".rstrip(".")
        found: RetNetToolsError = UsageError(told, action=f"see {where} --help")
        found.exit_code = error.exit_code
        return found, KINDS[2]
    if isinstance(error, OSError):
        return RetNetToolsError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")), "system"
    found = RetNetToolsError(f"unexpected {type(error).__name__}: {error}", action="rerun with --debug to see where")
    return found, "unexpected"


def command_line_error(bad_parameter: type[Exception]) -> Any:
    """What every error in a command line derives from: click's, or since typer 0.26 what typer has made of it."""
    return next(kind for kind in bad_parameter.__mro__ if kind.__base__ is Exception)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


class _Stops:
    """The signals of one run, and the first of them that came."""

    def __init__(self) -> None:
        self.number: int | None = None

    def stop(self, number: int, _: object) -> None:
        """Unwind the stack, so that a half-written output is removed."""
        self.number = self.number or number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _flush_results() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _forget_results() -> None:
    """Drop what stdout does not take, about which the interpreter would complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(error: RetNetToolsError, kind: str, documents: int) -> NoReturn:
    """One line on stderr; under `--json` a document on stdout too, where the command has not printed its own."""
    print(f"error: {error}", file=sys.stderr)
    if "--json" in sys.argv and console.documents_printed() == documents:
        parts = {"found": error.found, "expected": error.expected, "hint": error.action}
        described = {"kind": kind, "exit_code": error.exit_code, "message": str(error), **parts}
        console.print_json({"schema_version": SCHEMA_VERSION, "error": described})
    try:
        _flush_results()
    except OSError:
        _forget_results()
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
