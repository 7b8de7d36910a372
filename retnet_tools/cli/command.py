"""A command of a job: its options are the fields of the job's request."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from retnet_tools.console import print_message
from retnet_tools.jobs.request import Request


def command(request: type[Request], **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a function that takes a request (and options of its own) be a command with an option for each of its fields.

    Types, flags and help come from `options`, defaults from the request; a field that is not in `options` is no option.
    """
    fields = [field for field in dataclasses.fields(request) if field.name in options]
    if unknown := options.keys() - {field.name for field in fields}:
        raise TypeError(f"{request.__name__} has no {', '.join(sorted(unknown))}")

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

        _, *own = inspect.signature(run, eval_str=True).parameters.values()
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        shared = [_parameter(field, options[field.name]) for field in fields]
        invoke.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        return invoke

    return decorate


def _parameter(field: dataclasses.Field[Any], annotation: Any) -> inspect.Parameter:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    elif default == "":
        default = None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
