import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from retnet_tools.config import BlockNorm, HeadNorm
from retnet_tools.formats import writable_format
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.formats.conversion import plan_conversion, write_checkpoint
from tests.helpers import ABLATIONS, BASE, random_source

SHORT = ("--tokens", 20, "--chunk-size", 6, "--threads", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "base"
    write_canonical(path, BASE, random_source(BASE, 1))
    words = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4, "that": 5, "is": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def large_epsilon(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "large_epsilon"
    write_canonical(path, BASE.with_head_norm_eps(1e-2), random_source(BASE, 1))
    return path


def test_json_has_the_documented_fields(cli, checkpoint):
    result = cli("verify", checkpoint, "--modes", "parallel,recurrent,chunkwise", "--json", *SHORT)
    document = json.loads(result.out)
    assert result.exit_code == 0
    assert document["schema_version"] == 1
    assert document["passed"] is True
    assert [(c["a"], c["b"]) for c in document["comparisons"]] == [
        ("parallel", "recurrent"),
        ("parallel", "chunkwise"),
        ("recurrent", "chunkwise"),
    ]
    for comparison in document["comparisons"]:
        assert comparison["passed"] is True
        assert comparison["dtype"] == "float32"
        assert comparison["cause"] in ("rounding", "normalisation-epsilon")
        assert comparison["max_abs_float64_eps0"] < 1e-9
        assert 0 < comparison["max_rel"] < comparison["max_abs"] < 1e-3
        assert comparison["kl_mean"] >= 0
        assert comparison["top1_agreement"] == 1
        assert len(comparison["per_layer_max_abs"]) == BASE.num_layers
        assert "first_layer" in comparison
    assert len(document["handoffs"]) == 36
    assert all(h["passed"] for h in document["handoffs"])
    assert document["tokens"] == {"source": "random, seed 0", "rows": 2, "length": 20}


def test_a_stack_is_verified_on_random_embeddings(cli, tmp_path):
    config = ABLATIONS["jamie_stirling"]
    write_canonical(tmp_path / "stack", config, random_source(config, 1))
    result = cli("verify", tmp_path / "stack", "--json", *SHORT)
    document = json.loads(result.out)
    assert result.exit_code == 0
    assert document["tokens"] == {"source": "random embeddings, seed 0", "rows": 2, "length": 20}
    assert {c["kl_mean"] for c in document["comparisons"]} == {None}
    assert "same top 1" in cli("verify", tmp_path / "stack", *SHORT).out
    refused = cli("verify", tmp_path / "stack", "-p", "text", *SHORT)
    assert (refused.exit_code, "a text for a stack without embedding" in refused.err) == (2, True)


def test_the_table_is_plain_text_with_the_cause_explained(cli, checkpoint):
    result = cli("verify", checkpoint, *SHORT)
    assert result.exit_code == 0
    assert "\x1b" not in result.out
    assert result.err == ""
    rows = {line[:12].strip(): line[12:].split() for line in result.out.splitlines()}
    assert rows["cause"][-1] == "rounding"
    assert rows["result"] == ["passed"] * 3
    assert [float(number) < 1e-9 for number in rows["and eps 0"]] == [True] * 3
    assert "rounding: the forms add up in different orders" in result.out
    assert "hand-offs: 36 of 36" in result.out
    assert result.out.splitlines()[-1] == "passed"


def test_a_difference_over_its_budget_exits_with_3_after_the_report(cli, large_epsilon):
    result = cli("verify", large_epsilon, *SHORT)
    assert result.exit_code == 3
    assert "failed" in result.out
    assert result.err.startswith("error: parallel and ")
    assert "normalisation-epsilon" in result.err
    assert len(result.err.splitlines()) == 1
    document = json.loads(cli("verify", large_epsilon, "--json", *SHORT).out)
    assert document["passed"] is False
    assert [c["cause"] for c in document["comparisons"]] == ["normalisation-epsilon"] * 2 + ["rounding"]


def test_a_tolerance_lets_it_pass(cli, large_epsilon):
    assert cli("verify", large_epsilon, "--tolerance", 1, *SHORT).exit_code == 0


def test_a_tolerance_does_not_let_logic_pass(cli, tmp_path):
    config = replace(BASE, head_norm=HeadNorm("none", 0.0))
    write_canonical(tmp_path / "clamped", config, random_source(config, 1))
    result = cli("verify", tmp_path / "clamped", "--tolerance", 1000, *SHORT)
    assert (result.exit_code, "(logic" in result.err) == (3, True)


def test_a_weight_that_is_not_finite_exits_with_5_and_its_name(cli, tmp_path):
    tensors = dict(random_source(BASE, 1).tensors)
    tensors["layers.0.ffn.down_proj.weight"][0, 0] = np.nan
    write_canonical(tmp_path / "nan", BASE, tensors)
    result = cli("verify", tmp_path / "nan", *SHORT)
    assert (result.exit_code, result.out) == (5, "")
    expected = "error: tensor 'layers.0.ffn.down_proj.weight' holds 1 NaN or infinite value; expected finite weights"
    assert result.err.startswith(expected)
    assert len(result.err.splitlines()) == 1


def test_more_tokens_than_fit_into_memory_exit_with_2(cli, checkpoint):
    result = cli("verify", checkpoint, "--tokens", 3_000_000)
    assert (result.exit_code, result.out) == (2, "")
    assert "error: 3000000 tokens need about" in result.err
    assert "expected at most" in result.err
    assert len(result.err.splitlines()) == 1


def test_the_seed_and_the_threads_that_are_named_are_taken(cli, checkpoint, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    names = (*SHORT[:-2], "--json", "--modes", "parallel,recurrent")
    first, again, other = (
        json.loads(cli("verify", checkpoint, "--seed", seed, "-t", threads, *names).out)["comparisons"]
        for seed, threads in ((1, 2), (1, 1), (2, 1))
    )
    assert first == again != other
    assert used == [2, 1, 1]


@pytest.mark.parametrize("dtype", ["bf16", "float16", "fp64"])
def test_other_float_types_pass(cli, checkpoint, dtype):
    assert cli("verify", checkpoint, "--dtype", dtype, "--modes", "recurrent,chunkwise", *SHORT).exit_code == 0


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """syncdoth's layout, in which nothing tells the clamp; under sum_of_abs it is over the budget of epsilon."""
    path = tmp_path_factory.mktemp("verify") / "untold"
    config = replace(BASE.with_head_norm_eps(1e-4), block_norm=BlockNorm("rms", 1e-4))
    plan = plan_conversion(config, random_source(config, 1), writable_format("syncdoth"))
    write_checkpoint(path, plan, force=False, progress=None)
    settings = json.loads((path / "config.json").read_text())
    assert settings.pop("score_clamp") == "sum_of_abs"
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_a_clamp_that_is_not_told_is_tried_both_ways(cli, untold):
    result = cli("verify", untold, "--json", *SHORT)
    document = json.loads(result.out)
    assert (result.exit_code, document["passed"], document["clamp"]["fits"]) == (0, True, "abs_of_sum")
    tried = {row["clamp"]: row for row in document["clamp"]["tried"]}
    assert tried.keys() == {"abs_of_sum", "sum_of_abs"}
    assert {row["against"] for row in tried.values()} == {"recurrent"}
    first = document["comparisons"][0]
    assert (first["a"], first["b"]) == ("parallel", "recurrent")
    assert tried["abs_of_sum"]["max_abs"] == first["max_abs"]
    assert tried["abs_of_sum"]["max_abs_float64"] == first["max_abs_float64"] < 1e-3
    assert tried["sum_of_abs"]["max_abs_float64"] > 1e-3
    text = cli("verify", untold, *SHORT).out
    assert "abs-of-sum fits better and is judged" in text
    assert "nothing in the files tells which clamp the model was trained with" in text
    assert "--clamp NAME" in text


def test_a_clamp_that_is_named_is_the_only_one(cli, untold):
    for name, code in (("abs-of-sum", 0), ("sum-of-abs", 3), ("sum_of_abs", 3)):
        result = cli("verify", untold, "--clamp", name, "--json", *SHORT)
        assert (result.exit_code, json.loads(result.out)["clamp"]) == (code, None)
    assert "fits better" not in cli("verify", untold, "--clamp", "abs-of-sum", *SHORT).out


def test_convert_keeps_the_clamp_that_is_named(cli, untold, tmp_path):
    for target in ("syncdoth", "torchscale", "canonical"):
        out = tmp_path / target
        assert cli("convert", untold, out, "--to", target, "--clamp", "abs-of-sum").exit_code == 0
        document = json.loads(cli("verify", out, "--json", *SHORT).out)
        assert (document["clamp"], document["passed"]) == (None, True)


def test_a_clamp_that_cannot_be_is_refused(cli, untold, tmp_path):
    unknown = cli("verify", untold, "--clamp", "abs-of-sums", *SHORT)
    assert (unknown.exit_code, "did you mean 'abs-of-sum'?" in unknown.err) == (2, True)
    config = replace(BASE, score_normalization=replace(BASE.score_normalization, clamp="none"))
    write_canonical(tmp_path / "plain", config, random_source(config, 1))
    result = cli("verify", tmp_path / "plain", "--clamp", "abs-of-sum", *SHORT)
    assert (result.exit_code, len(result.err.splitlines())) == (2, 1)


def test_a_prompt_goes_through_the_tokenizer_of_the_checkpoint(cli, checkpoint, tmp_path):
    document = json.loads(cli("verify", checkpoint, "-p", "to be or not to be", "--json", *SHORT).out)
    assert document["tokens"] == {"source": "from a text", "rows": 1, "length": 6}
    text = tmp_path / "text.txt"
    text.write_text("that is " * 50, encoding="utf-8")
    document = json.loads(cli("verify", checkpoint, "--text", text, "--json", *SHORT).out)
    assert document["tokens"]["length"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "parallel,recurent"), "did you mean 'recurrent'?"),
        (("--modes", "parallel"), "form parallel alone"),
        (("--dtype", "fp33"), "did you mean 'fp32'?"),
        (("--chunk-size", "0"), "chunk size 0"),
        (("--prompt", ""), "a text without tokens"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(cli, checkpoint, arguments, message):
    result = cli("verify", checkpoint, *arguments)
    assert result.exit_code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert result.out == ""


def test_a_prompt_without_a_tokenizer_says_what_is_missing(cli, large_epsilon):
    result = cli("verify", large_epsilon, "-p", "to be")
    assert result.exit_code == 2
    assert "no tokenizer.json" in result.err


def test_a_missing_checkpoint_exits_with_5(cli, tmp_path):
    result = cli("verify", tmp_path / "nowhere")
    assert result.exit_code == 5
    assert "nowhere" in result.err


def test_help_answers_without_loading_torch():
    script = "import sys, retnet_tools.cli.app; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
