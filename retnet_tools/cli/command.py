"""A command of a job: its options are the fields of the job's request, with their types, defaults and documentation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import typer

from retnet_tools.console import print_message
from retnet_tools.graph.code_types import CODE_TYPES, HALF_TYPES
from retnet_tools.jobs.request import LEAST, SHIPPED, Request, documentation

CODES, HALVES = " or ".join(CODE_TYPES), " or ".join(HALF_TYPES.values())
BLOCK_SIZES = ", ".join(f"{row.name}: {row.block_size}" for row in CODE_TYPES.values())
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""More CPU threads than this are a slip of the finger, and would stop the machine."""
PANELS = {
    "Checkpoint": ("format", "config", "entry", "clamp", "revision", "ignore_keys"),
    "Quantization": (
        *("quantize", "block_size", "symmetric", "accuracy_level", "method", "exclude", "tensor_types"),
        *("text", "text_tokens"),
    ),
    "Calibration": ("calibration", "calibration_tokens", "seed", "target_size", "target_bits", "keep_merged"),
    "Device": ("device", "cpu_fallback", "no_cuda_graph", "threads"),
    "Output": ("output", "force", "dry_run"),
}
FLAGS = {
    "format": "--from",
    "ignore_keys": "--ignore-key",
    "symmetric": "--symmetric/--asymmetric",
    "tensor_types": "--tensor-type",
    "cpu_fallback": "--allow-cpu-fallback",
    "threads": "-t --threads",
    "output": "-o --output",
}
"""Where they are not the field's name."""
SETTINGS: dict[str, dict[str, Any]] = {
    "quantize": {"help": f"{CODES} weights in blocks, or everything but states in {HALVES}."},
    "block_size": {"help": f"Weights that share a scale: 32, 64 or 128 ({BLOCK_SIZES} if left out)."},
    "config": {"metavar": "FILE"},
    "entry": {"metavar": "NAME"},
    "clamp": {"metavar": "NAME"},
    "revision": {"metavar": "NAME"},
    "ignore_keys": {"metavar": "KEY"},
    "exclude": {"metavar": "REGEX"},
    "tensor_types": {"metavar": "REGEX=TYPE", "help": f"{CODES} for some matrices."},
    "calibration": {"metavar": "FILE"},
    "target_size": {"metavar": "SIZE"},
    "threads": {"max": MAX_THREADS},
}


def command(
    request: type[Request], *, arguments: Sequence[str] = (), leave_out: Sequence[str] = (), **others: dict[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function that takes a request, and options of its own, be a command with an option for each field of it.

    Args:
        request: the type of the first parameter.
        arguments: fields that are given without a flag.
        leave_out: fields that are no options.
        others: by field, `flags` in place of its usual ones, and settings of `typer.Option`.
    """
    fields = [field for field in dataclasses.fields(request) if field.name not in leave_out]
    places = {name: place for place, name in enumerate(chain(*PANELS.values()), start=1)}
    fields.sort(key=lambda field: (field.kw_only is True, places.get(field.name, 0)))

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def invoke(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            try:
                run(request(**{name: value for name, value in given.items() if value is not None}), **values)
            except BaseException as error:
                for note in getattr(error, "__notes__", ()):
                    print_message(note)
                raise

        hints, texts = get_type_hints(request), documentation(request)
        shown = []
        for field in fields:
            panel = next((panel for panel, names in PANELS.items() if field.name in names), None)
            settings: dict[str, Any] = {"help": texts.get(field.name, ""), "rich_help_panel": panel}
            settings |= {"min": LEAST.get(field.name)} | SETTINGS.get(field.name, {}) | others.get(field.name, {})
            flags = settings.pop("flags", FLAGS.get(field.name, f"--{field.name.replace('_', '-')}"))
            if field.name in arguments:
                how = typer.Argument(metavar=field.name.upper(), help=texts.get(field.name, ""), show_default=False)
                shown.append(_parameter(field, hints, how))
            else:
                shown.append(_parameter(field, hints, typer.Option(*flags.split(), **settings)))
        _, *own = inspect.signature(run, eval_str=True).parameters.values()
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        invoke.__signature__ = inspect.Signature([*shown, *own])  # type: ignore[attr-defined]
        return invoke

    return decorate


def _parameter(field: dataclasses.Field[Any], hints: dict[str, Any], how: Any) -> inspect.Parameter:
    """A field as typer takes it: of several types the first, a list of texts with a default as words between commas."""
    default, hint = cast("Any", field.default), hints[field.name]
    kind = next(iter(get_args(hint)), hint) if get_origin(hint) in (types.UnionType, Union) else hint
    kind = type(get_args(kind)[0]) if get_origin(kind) is Literal else kind
    if get_origin(kind) is Sequence:
        kind, default = (str, ",".join(default)) if default else (list[str], None)
        if kind is not str:
            how.help = f"{how.help.rstrip('.')}; may be repeated."
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    elif default in (None, "", SHIPPED):
        kind, default = kind | None, None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how]
    )
