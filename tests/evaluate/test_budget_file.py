"""The budget file: the default one, what a file replaces of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from retnet_tools.errors import InputError
from retnet_tools.evaluate.budget_file import default_budget_text, read_budget


def test_the_default_is_a_budget_file_too(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text(default_budget_text(), encoding="utf-8")
    assert read_budget(file) == read_budget(None)


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text("schema_version = 1\nnoise.copies = 2\n[cost.int4]\nmean_kl = 1\n")
    default, budget = read_budget(None), read_budget(file)
    assert (budget.noise.copies, budget.cost.int4.mean_kl) == (2, 1.0)
    assert budget.noise.headroom == default.noise.headroom
    assert budget.cost.int4.logits == default.cost.int4.logits
    assert (budget.cost.int8, budget.state, budget.weights) == (default.cost.int8, default.state, default.weights)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "schema_version"),
        ("[cost.int4]\nmean_kl = 1", "schema_version"),
        ("schema_version = 2", "schema_version is 2"),
        ("schema_version = true", "schema_version is True"),
        ("schema_version = '1'", "schema_version is '1'"),
        ("schema_version = 1\nlimit = 3", "limit"),
        ("schema_version = 1\n[cost.int5]\nmean_kl = 1", "cost.int5"),
        ("schema_version = 1\n[cost.int4]\nkl = 1", "cost.int4.kl"),
        ("schema_version = 1\n[cost]\nint4 = 1", "cost.int4 is 1"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = nan", "cost.int4.mean_kl is nan"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = inf", "cost.int4.mean_kl is inf"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = -0.1", "cost.int4.mean_kl is -0.1"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = 'much'", "cost.int4.mean_kl is 'much'"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = true", "cost.int4.mean_kl is True"),
        ("schema_version = 1\n[cost.int4]\nmean_kl = {}", "cost.int4.mean_kl is {}"),
        ("schema_version = 1\n[noise]\ncopies = 0", "noise.copies is 0"),
        ("schema_version = 1\n[noise]\ncopies = 1000000", "noise.copies is 1000000"),
        ("schema_version = 1\n[noise]\nheadroom = 0.0", "noise.headroom is 0.0"),
        ("schema_version = 1\n[state.float16]\nrelative = -1", "state.float16.relative is -1"),
        ("schema_version = 1\nschema_version = 1", "cannot be read"),
        ("schema_version = ", "cannot be read"),
        ("schema_version = 1\n" + "a." * 200 + "b = 1", "unknown field a"),
        ("schema_version = 1\n" + "a." * 5000 + "b = 1", "a line of more than 500 characters"),
        ("schema_version = 1\nx = " + "[" * 5000 + "]" * 5000, "a line of more than 500 characters"),
    ],
)
def test_what_is_no_budget_is_refused_by_file_and_field(text: str, field: str, tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        read_budget(file)
    said = str(refused.value)
    assert said.startswith(str(file))
    assert field in said
    assert "\n" not in said


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00schema_version = 1")
    large = tmp_path / "large.toml"
    large.write_text("#" * (1 << 21))
    for file in (tmp_path / "none.toml", tmp_path, binary, large):
        with pytest.raises(InputError, match=str(file)):
            read_budget(file)
