"""How much of an export may differ from its checkpoint: a TOML file, and the default one of the package.

A file says what it replaces of the default, field by field, and `schema_version`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from retnet_tools.errors import ConfigError, InputError
from retnet_tools.fields import check_not_negative, check_positive, check_size, from_json
from retnet_tools.inputs import read_words

BUDGET_SCHEMA_VERSION = 1
MOST_BYTES = 1 << 20
MOST_COLUMNS = 500
MOST_COPIES = 64


@dataclass(frozen=True)
class Rounding:
    """What a float type loses: in parts of a value, and of the smallest ones."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class NoiseBudget:
    """How the copies of the model are moved; `activation_steps` where products are made in int8."""

    headroom: float
    margin: float
    copies: int
    activation_steps: float
    float32: Rounding
    float16: Rounding
    bfloat16: Rounding

    def __post_init__(self) -> None:
        check_positive("noise.headroom", self.headroom)
        check_size("noise.copies", self.copies)
        if self.copies > MOST_COPIES:
            raise ConfigError(f"noise.copies is {self.copies}", f"at most {MOST_COPIES}")


@dataclass(frozen=True)
class StateBudget:
    """What states of a type may lose each time that they are written."""

    float32: Rounding
    float16: Rounding
    bfloat16: Rounding


@dataclass(frozen=True)
class WeightBudget:
    """Codes against weights; see `retnet_tools.evaluate.weight_checks`."""

    code_steps: float
    int8: float
    int4: float


@dataclass(frozen=True)
class Cost:
    """What a type of weights may cost; see `retnet_tools.evaluate.against.cost_checks`."""

    mean_kl: float
    logits: float
    flips: float


@dataclass(frozen=True)
class Costs:
    """By type of weights."""

    float32: Cost
    float16: Cost
    bfloat16: Cost
    int8: Cost
    int4: Cost


@dataclass(frozen=True)
class AgainstBudget:
    """All of it."""

    schema_version: int
    noise: NoiseBudget
    state: StateBudget
    weights: WeightBudget
    cost: Costs

    def __post_init__(self) -> None:
        if self.schema_version != BUDGET_SCHEMA_VERSION:
            raise ConfigError(f"schema_version is {self.schema_version}", str(BUDGET_SCHEMA_VERSION))


def default_budget_text() -> str:
    """The file of the package, as it is."""
    return (resources.files("retnet_tools") / "data" / "budget.toml").read_text(encoding="utf-8")


def read_budget(path: Path | None) -> AgainstBudget:
    """The default budget, with what a file replaces of it.

    Raises:
        InputError: a file that cannot be read, is no TOML, has no or another version, a field that there is none of, or
            a value that is not what its field holds; names file and field.
    """
    default = tomllib.loads(default_budget_text())
    if path is None:
        budget: AgainstBudget = from_json(AgainstBudget, default)
        return budget
    try:
        text = read_words(path, MOST_BYTES)
        # The library takes quadratic time for a key of many parts.
        if max(map(len, text.splitlines()), default=0) > MOST_COLUMNS:
            raise ConfigError(f"a line of more than {MOST_COLUMNS} characters", "a budget")
        given = tomllib.loads(text)
        if "schema_version" not in given:
            raise ConfigError("no field schema_version", str(BUDGET_SCHEMA_VERSION))
        merged = _merged(default, given, "")
        budget = from_json(AgainstBudget, merged)
        _check_signs(merged, "")
    except ConfigError as error:
        raise InputError(f"{path}: {error.found}", error.expected, error.action) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())})", "a budget in TOML") from error
    return budget


def _merged(default: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A default with what replaces some of it."""
    for name, value in given.items():
        if name not in default:
            raise ConfigError(f"unknown field {where}{name}", f"only {', '.join(f'{where}{own}' for own in default)}")
        if isinstance(default[name], Mapping) and not isinstance(value, Mapping):
            raise ConfigError(f"{where}{name} is {value!r}", "a table")
    return {
        name: _merged(own, given[name], f"{where}{name}.")
        if isinstance(own, Mapping) and name in given
        else given.get(name, own)
        for name, own in default.items()
    }


def _check_signs(values: Mapping[str, Any], where: str) -> None:
    """Refuse a number below zero."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_signs(value, f"{where}{name}.")
        elif isinstance(value, float | int):
            check_not_negative(where + name, value)
