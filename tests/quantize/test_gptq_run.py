"""GPTQ over whole models: nearer to the float model than to nearest, in every kind of model, and resumable."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.distributions import mean_kl
from retnet_tools.errors import InputError, OutputError
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph.quantization import Scheme, TensorRule
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import load_model
from retnet_tools.quantize import activations, gptq_run
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.quantize.calibration import read_calibration
from retnet_tools.quantize.gptq_run import Gptq
from retnet_tools.quantize.methods import MethodTask, round_to_nearest
from retnet_tools.quantize.options import SEQUENCE
from retnet_tools.quantize.unfinished import Workplace
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.quantize.calibrated import FIXTURE, INT4, all_rows, fixture, fixture_tokens, make_task, with_rows

UNTIED = replace(BASE, num_layers=3)


def logits(config, source, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_model(config, source, torch.float32)(torch.from_numpy(ids), form=retention_chunkwise).logits.numpy()


def divergence(task: MethodTask, rows: dict[str, QuantizedRows], ids: np.ndarray) -> float:
    """Mean KL of the model of these codes from the float one."""
    quantized = with_rows(task.weights, rows, task.formats)
    return mean_kl(logits(task.config, task.weights, ids), logits(task.config, quantized, ids))


def equal(a: dict[str, QuantizedRows], b: dict[str, QuantizedRows]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name].codes, b[name].codes) and np.array_equal(a[name].scales, b[name].scales) for name in a
    )


# A random model's logits hardly predict anything, and its errors are as large: the trained one is judged below.
@pytest.mark.parametrize("name", [name for name, config in ABLATIONS.items() if config.has_vocabulary])
def test_every_kind_of_model_comes_nearer_than_to_nearest(name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    task = make_task(config, random_source(config, 3), tmp_path, sequences=random_tokens(config, 8, 64, 7))
    unseen = random_tokens(config, 8, 64, 8)
    found = divergence(task, all_rows(Gptq(task), task), unseen)
    nearest = divergence(task, all_rows(round_to_nearest, task), unseen)
    assert 0 < found < 0.9 * nearest


@pytest.mark.slow
def test_the_trained_model_loses_a_quarter_less_on_unseen_text(tmp_path: Path) -> None:
    checkpoint, scheme = fixture(), Scheme("int4", 64, method="gptq")
    file = FIXTURE / "calibration.txt"
    text = read_calibration(file, 32 * SEQUENCE, 0, checkpoint.config, checkpoint.tokenizer_files)
    sequences, unseen = text.sequences, fixture_tokens("heldout.txt", 16, 256)
    task = make_task(checkpoint.config, checkpoint.weights, tmp_path, scheme=scheme, sequences=sequences)
    found = divergence(task, all_rows(Gptq(task), task), unseen)
    nearest = divergence(task, all_rows(round_to_nearest, task), unseen)
    assert found < 0.75 * nearest


def test_an_embedding_is_rounded_to_nearest_and_a_tied_one_as_the_head(tmp_path: Path) -> None:
    for config, nearest in ((BASE, True), (ABLATIONS["tied"], False)):
        task = make_task(config, random_source(config, 3), tmp_path)
        found = all_rows(Gptq(task), task)["embedding.weight"]
        expected = quantize_rows(task.weights.read("embedding.weight"), task.formats["embedding.weight"], task.dtype)
        np.testing.assert_array_equal(found.scales, expected.scales)
        assert np.array_equal(found.codes, expected.codes) == nearest


def test_rules_are_kept(tmp_path: Path) -> None:
    scheme = replace(
        INT4, exclude=("embedding", r"layers\.1\.ffn", "q_proj"), tensor_types=(TensorRule("v_proj|lm_head", "int8"),)
    )
    task = make_task(BASE, random_source(BASE, 3), tmp_path, scheme=scheme)
    rows = all_rows(Gptq(task), task)
    assert set(rows) == {name for name, format in task.formats.items() if format is not None}
    assert max(rows["layers.0.retention.v_proj.weight"].codes.max(), rows["lm_head.weight"].codes.max()) > 15
    assert rows["layers.0.retention.k_proj.weight"].codes.max() <= 15


def test_weights_are_rounded_to_the_type_of_the_export_first(tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    half = random_source(BASE, 3)
    for name, tensor in half.tensors.items():
        half.tensors[name] = tensor.astype(np.float16)
    tasks = [make_task(BASE, s, tmp_path / str(i), dtype="float16") for i, s in enumerate((source, half))]
    rows = [all_rows(Gptq(task), task) for task in tasks]
    assert equal(*rows)
    assert {part.scales.dtype.name for part in rows[0].values()} == {"float16"}


def test_rows_come_in_any_pieces(tmp_path: Path) -> None:
    task = make_task(BASE, random_source(BASE, 3), tmp_path)
    method, name = Gptq(task), "layers.0.ffn.up_proj.weight"
    weight, format = task.weights.read(name), task.formats[name]
    whole = method(name, weight, format, task.dtype)
    assert len(whole.codes) == len(weight)
    method("lm_head.weight", task.weights.read("lm_head.weight"), format, task.dtype)
    pieces = [method(name, part, format, task.dtype) for part in np.split(weight, [1, 17])]
    np.testing.assert_array_equal(np.concatenate([piece.codes for piece in pieces]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([piece.scales for piece in pieces]), whole.scales)
    # Asked for again it begins anew; more rows than there are is an error.
    for _ in range(2):
        np.testing.assert_array_equal(method(name, weight, format, task.dtype).codes, whole.codes)
    with pytest.raises(ValueError, match="which has 40"):
        method(name, np.concatenate([weight, weight]), format, task.dtype)


def test_sequences_do_not_depend_on_how_many_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(BASE, random_source(BASE, 3), tmp_path / "a")
    together = all_rows(Gptq(task), task)
    monkeypatch.setattr(activations, "BATCH_TOKENS", 1)
    one_by_one = all_rows(Gptq(replace(task, work=Workplace(tmp_path / "b"))), task)
    same = np.mean([(together[name].codes == one_by_one[name].codes).mean() for name in together])
    # Sums in another order may tip a weight that lies between two codes, and what follows from it.
    assert same > 0.99


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("tied", "stop"), [(False, 1), (False, 2), (False, 5), (False, 7), (True, 0), (True, 4)])
def test_a_stopped_run_goes_on_where_it_was(tied: bool, stop: int, tmp_path: Path) -> None:
    config = replace(UNTIED, tie_word_embeddings=tied)
    source, steps = random_source(config, 3), []

    def until(what: str, done: int, total: int) -> None:
        steps.append(what)
        if what != "reading weights" and done >= stop:
            raise Stopped

    whole = make_task(config, source, tmp_path / "whole")
    expected = all_rows(Gptq(whole), whole)
    task = make_task(config, source, tmp_path / "work", progress=until)
    with pytest.raises(Stopped):
        Gptq(task)
    first, steps[:] = list(steps), []
    found = all_rows(Gptq(replace(task, progress=lambda what, done, total: steps.append(what))), task)
    assert equal(found, expected)
    # What was stopped when it began is the first thing that is done now.
    assert steps[1] == first[-1]
    assert not set(first[1:-1]) & set(steps[1:])


KILL = """
import os, signal, sys
from pathlib import Path
from retnet_tools.formats import open_checkpoint
from retnet_tools.quantize.gptq_run import Gptq
from tests.quantize.calibrated import make_task
checkpoint = open_checkpoint(Path(sys.argv[1]))
def kill(what, done, total):
    if what == "layers.1.ffn":
        os.kill(os.getpid(), signal.SIGKILL)
Gptq(make_task(checkpoint.config, checkpoint.weights, Path(sys.argv[2]), progress=kill))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source = random_source(UNTIED, 3)
    write_canonical(tmp_path / "model", UNTIED, source)
    killed = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "model"), str(tmp_path / "work")], check=False)
    assert killed.returncode == -signal.SIGKILL
    steps = []
    task = make_task(UNTIED, source, tmp_path / "work", progress=lambda what, done, total: steps.append(what))
    found = all_rows(Gptq(task), task)
    assert steps == ["reading weights", "layers.1.ffn", "layers.2.retention", "layers.2.ffn", "output head"]
    whole = make_task(UNTIED, source, tmp_path / "whole")
    assert equal(found, all_rows(Gptq(whole), whole))


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    task, steps = make_task(BASE, random_source(BASE, 3), tmp_path), []
    expected = all_rows(Gptq(task), task)
    again = replace(task, progress=lambda what, done, total: steps.append(what))
    assert equal(all_rows(Gptq(again), again), expected)
    assert steps == ["reading weights"]


def test_another_model_text_or_scheme_begins_anew(tmp_path: Path) -> None:
    source, other, work = random_source(BASE, 3), random_source(BASE, 3), Workplace(tmp_path)
    other.tensors["lm_head.weight"][0, 0] += 1e-3
    tasks = [
        make_task(BASE, source, work),
        make_task(BASE, other, work),
        make_task(BASE, source, work, sequences=random_tokens(BASE, 3, 40, 8)),
        make_task(BASE, source, work, scheme=replace(INT4, block_size=64)),
        make_task(BASE, source, work, dtype="float16"),
        make_task(BASE.with_head_norm_eps(1e-3), source, work),
    ]
    for task in tasks:
        steps: list[str] = []
        Gptq(replace(task, progress=lambda what, done, total, steps=steps: steps.append(what)))
        assert len(steps) == 7
        assert len(list(tmp_path.glob("gptq-*"))) == 1


@pytest.mark.parametrize("name", ["VERSION", "DAMPING"])
def test_another_algorithm_begins_anew(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(BASE, random_source(BASE, 3), tmp_path)
    Gptq(task)
    monkeypatch.setattr(gptq_run, name, 7)
    steps: list[str] = []
    Gptq(replace(task, progress=lambda what, done, total: steps.append(what)))
    assert len(steps) == 7


def test_hidden_states_are_removed_as_the_run_goes_on(tmp_path: Path) -> None:
    most: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        most.append(len(list(tmp_path.rglob("hidden-*"))))

    Gptq(make_task(UNTIED, random_source(UNTIED, 3), tmp_path, progress=count))
    assert max(most) == 2


def test_too_little_space_is_refused_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(gptq_run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"free for hidden states of 120 tokens and codes in .*; expected 0.00 GB"):
        Gptq(make_task(BASE, random_source(BASE, 3), tmp_path))


def test_a_parallel_residual_needs_room_for_a_wider_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ABLATIONS["parallel_residual"]
    most = 0

    def count(what: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("hidden-*")))

    # Both streams before a block lie there, the wider ones at most: 2 of 2 hidden states in float32.
    Gptq(make_task(config, random_source(config, 3), tmp_path, progress=count))
    assert 2 * 2 * 4 * 120 * 32 <= most < 2 * 2 * 4 * 120 * 32 + 512
    codes = 2 * 2 * 12_000
    for free, enough in ((16 * 120 * 32 + codes, False), (24 * 120 * 32 + codes, True)):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(gptq_run.shutil, "disk_usage", lambda path, usage=usage: usage)
        task = make_task(config, random_source(config, 3), tmp_path / str(free))
        if enough:
            Gptq(task)
        else:
            with pytest.raises(OutputError, match="free for hidden states of 120 tokens"):
                Gptq(task)


def test_space_for_codes_counts_and_what_is_there_needs_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "layers.1.retention":
            raise Stopped

    states, codes = 16 * 120 * 32, 2 * 2 * 12_000
    task = make_task(BASE, random_source(BASE, 3), tmp_path, progress=stop)
    monkeypatch.setattr(gptq_run.shutil, "disk_usage", lambda path: type("usage", (), {"free": states}))
    with pytest.raises(OutputError):
        Gptq(task)
    monkeypatch.setattr(gptq_run.shutil, "disk_usage", lambda path: type("usage", (), {"free": states + codes}))
    with pytest.raises(Stopped):
        Gptq(task)
    # Half of the states and of the codes are there.
    left = (states + codes) * 2 // 3
    monkeypatch.setattr(gptq_run.shutil, "disk_usage", lambda path: type("usage", (), {"free": left}))
    Gptq(replace(task, progress=lambda *step: None))


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(BASE, random_source(BASE, 3), tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gptq_run, "write_states", full)
        with pytest.raises(OutputError, match=r"the disk is full: .* not written"):
            Gptq(task)
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["embedding.weight.npz"]
    whole = make_task(BASE, random_source(BASE, 3), tmp_path / "whole")
    assert equal(all_rows(Gptq(task), task), all_rows(Gptq(whole), whole))


@pytest.mark.parametrize("tensor", ["layers.1.ffn.up_proj.weight", "embedding.weight", "final_norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tensor: str, tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    source.tensors[tensor].flat[2] = np.nan
    with pytest.raises(InputError, match=f"tensor '{tensor}' holds 1 NaN"):
        Gptq(make_task(BASE, source, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_the_type_are_refused_before_anything_is_kept(tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    source.tensors["layers.1.ffn.down_proj.weight"][0, 0] = 1e5
    with pytest.raises(InputError, match=r"layers\.1\.ffn\.down_proj\.weight' has the value 100000, which float16"):
        Gptq(make_task(BASE, source, tmp_path, dtype="float16"))
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    source = random_source(ABLATIONS["no_head_norm"], 3)
    source.tensors["layers.0.retention.v_proj.weight"] *= np.float32(1e38)
    with (
        np.errstate(all="ignore"),
        pytest.raises(InputError, match=r"gives layers.0.retention inputs that are not finite"),
    ):
        Gptq(make_task(ABLATIONS["no_head_norm"], source, tmp_path))
    # No other run would get further.
    assert not list(tmp_path.glob("gptq-*"))
