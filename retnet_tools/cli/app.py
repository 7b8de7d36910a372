"""The command `retnet-tools`: one module a command, errors as one line with an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from retnet_tools import __version__
from retnet_tools.cli.bench import bench
from retnet_tools.cli.convert import convert
from retnet_tools.cli.doctor import doctor
from retnet_tools.cli.export import export
from retnet_tools.cli.generate import generate
from retnet_tools.cli.inspect import inspect
from retnet_tools.cli.perplexity import perplexity
from retnet_tools.cli.quantize import quantize
from retnet_tools.cli.state import app as state_app
from retnet_tools.cli.verify import verify
from retnet_tools.errors import RetNetToolsError

app = typer.Typer(
    name="retnet-tools",
    help="Take a RetNet from a training checkpoint to fast, verified inference.",
    add_completion=False,
    rich_markup_mode=None,  # Rich help would take longer to import than to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 verification over its budget, 4 provider not available, "
    "5 input that is missing, unsupported, unsafe or corrupt.",
)

COMMANDS = (
    (inspect, "What a checkpoint or an export holds, and lint."),
    (convert, "A checkpoint to another format, bit for bit."),
    (verify, "Whether the forms agree on a checkpoint, and why not."),
    (export, "A checkpoint to a stateful ONNX decoder."),
    (quantize, "An export with int8, int4 or half-precision weights."),
    (generate, "Continue a prompt with an exported decoder."),
    (perplexity, "How well a model predicts a text, and how far it is from a baseline."),
    (bench, "How fast a model decodes on this machine."),
    (doctor, "What this machine can run, and what is missing."),
)
for command, summary in COMMANDS:
    app.command(short_help=summary)(command)
app.add_typer(state_app, short_help="Sequences as files: save a prompt, go on from it.")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"retnet-tools {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Hold the options that every command shares."""


def main() -> None:
    """Entry point: run a command, turn errors into one line on stderr and their exit code."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    warnings.showwarning = _show_warning
    # Both would report their use to their makers: not from here without being asked.
    for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(app(args=arguments or ["--help"], prog_name="retnet-tools", standalone_mode=False) or 0)
    except command_line_error(typer.BadParameter) as error:
        # What a missing argument is, its name alone does not say.
        help = getattr(getattr(error, "param", None), "help", None) if "issing" in type(error).__name__ else None
        told = f"{error.format_message().rstrip('.')}{f': {help}' if help else ''}".rstrip(".")
        _fail(f"{told}; see retnet-tools --help", error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader went away; keep the interpreter from complaining when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + 13)
    except RetNetToolsError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    except Exception as error:
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}; rerun with --debug to see where", 1)


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


def _stop(number: int, _: object) -> None:
    # Unwinds the stack, so that a half-written output is removed.
    sys.exit(128 + number)


def _fail(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
