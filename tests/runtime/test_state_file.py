"""Sequences as files: what is loaded goes on as if nothing had happened, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.graph import contract
from retnet_tools.runtime.decode import Stopping, generate_from
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import NO_TOKENS, Sequences, hash_tokens
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state_file import StateFile, capture, read_state, write_state
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.quantized import quantize

SAMPLING = Sampling(1.2, top_p=0.95, repetition_penalty=1.3, seed=4)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, seed=61), tmp_path_factory.mktemp("states") / "out")


@pytest.fixture(scope="module")
def session(folder: Path) -> DecoderSession:
    return DecoderSession(folder, threads=1)


def grown(session: DecoderSession, count: int = 10, sampling: Sampling = SAMPLING) -> Sequences:
    """Two sequences of a prompt and `count` tokens."""
    result = generate_from(Sequences.start(session, 2, sampling), PROMPTS, Stopping(count), keep=True)
    assert result.sequences is not None
    return result.sequences


def tokens_of(sequences: Sequences, count: int) -> list[tuple[int, ...]]:
    return [row.tokens for row in generate_from(sequences, [], Stopping(count)).rows]


def same(a: StateFile, b: StateFile) -> None:
    for x, y in zip((*a.states, a.position, a.logits, a.seen), (*b.states, b.position, b.logits, b.seen), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert (a.fingerprint, a.token_hashes, a.sampling) == (b.fingerprint, b.token_hashes, b.sampling)
    assert a.streams == b.streams


def test_a_file_holds_everything_bit_for_bit(session: DecoderSession, tmp_path: Path) -> None:
    state = capture(grown(session))
    write_state(tmp_path / "a.state", state)
    same(read_state(tmp_path / "a.state"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_the_safetensors_library_reads_it(session: DecoderSession, tmp_path: Path) -> None:
    sequences = grown(session)
    write_state(tmp_path / "a.state", capture(sequences))
    tensors = load_file(tmp_path / "a.state")
    np.testing.assert_array_equal(tensors["layers.1.recurrent_state"], sequences.state.numpy()[1])
    np.testing.assert_array_equal(tensors["position"], [15, 12])
    with safetensors.safe_open(tmp_path / "a.state", "numpy") as file:
        assert json.loads(file.metadata()["fingerprint"])["dtype"] == "float32"


def test_what_was_captured_or_read_does_not_change_when_sequences_go_on(
    session: DecoderSession, tmp_path: Path
) -> None:
    sequences = grown(session)
    state = capture(sequences)
    write_state(tmp_path / "a.state", state)
    sequences.state.position += 1
    tokens_of(sequences, 20)
    same(state, read_state(tmp_path / "a.state"))
    assert tokens_of(state.sequences(session), 20) == tokens_of(state.sequences(session), 20)
    same(state, read_state(tmp_path / "a.state"))


@pytest.mark.parametrize("name", ["stack", "jamie_stirling"])
def test_a_stack_without_vocabulary_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    session = DecoderSession(export(config, random_source(config, seed=66), tmp_path / "out"), threads=1)
    embeddings = random_tokens(config, 2, 30, seed=67)
    whole, part = Sequences.start(session, 2), Sequences.start(session, 2)
    whole.feed(embeddings, chunk_size=8)
    part.feed(embeddings[:, :13], chunk_size=8)
    assert part.token_hashes[0] != part.token_hashes[1]
    write_state(tmp_path / "a.state", capture(part))
    rest = read_state(tmp_path / "a.state").sequences(session)
    rest.feed(embeddings[:, 13:29], chunk_size=8)
    rest.append(embeddings[:, 29])
    np.testing.assert_allclose(rest.logits, whole.logits, rtol=0, atol=1e-4)
    assert rest.token_hashes == whole.token_hashes


@pytest.mark.parametrize("cut", [1, 7, 29])
@pytest.mark.parametrize("name", ["base", "key_decay", "shared_key_value_heads", "torchscale_2023", *OTHER_LAYERS])
def test_a_text_cut_anywhere_and_resumed_from_a_file_is_the_same(name: str, cut: int, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    out = export(config, random_source(config, seed=62), tmp_path / "out")
    whole = generate_from(Sequences.start(DecoderSession(out, threads=1), 2, SAMPLING), PROMPTS, Stopping(30))
    first = generate_from(
        Sequences.start(DecoderSession(out, threads=1), 2, SAMPLING), PROMPTS, Stopping(cut), keep=True
    )
    assert first.sequences is not None
    write_state(tmp_path / "a.state", capture(first.sequences))
    resumed = read_state(tmp_path / "a.state").sequences(DecoderSession(out, threads=1))
    rest = tokens_of(resumed, 30 - cut)
    assert [a.tokens + b for a, b in zip(first.rows, rest, strict=True)] == [row.tokens for row in whole.rows]


def test_a_prompt_saved_in_the_middle_goes_on_like_the_whole(session: DecoderSession, tmp_path: Path) -> None:
    (ids,) = random_tokens(BASE, 1, 80, seed=63)
    whole = Sequences.start(session)
    whole.feed([ids], chunk_size=16)
    for cut in (1, 15, 16, 17, 79):
        part = Sequences.start(session)
        part.feed([ids[:cut]], chunk_size=16)
        write_state(tmp_path / "a.state", capture(part), force=True)
        rest = read_state(tmp_path / "a.state").sequences(session)
        rest.feed([ids[cut:]], chunk_size=16)
        np.testing.assert_allclose(rest.logits, whole.logits, rtol=0, atol=1e-4)
        assert rest.token_hashes == whole.token_hashes == [hash_tokens(NO_TOKENS, ids)]


def test_the_size_does_not_depend_on_the_length(session: DecoderSession, tmp_path: Path) -> None:
    sizes = []
    for length in (1, 1000, 20_000):
        sequences = Sequences.start(session)
        sequences.feed(random_tokens(BASE, 1, length, seed=64), chunk_size=512)
        write_state(tmp_path / f"{length}.state", capture(sequences))
        sizes.append((tmp_path / f"{length}.state").stat().st_size)
    # Decimal numbers in the metadata may have a digit more.
    assert max(sizes) - min(sizes) < 64


def test_another_way_to_sample_may_be_chosen(session: DecoderSession, tmp_path: Path) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    state = read_state(tmp_path / "a.state")
    plain = tokens_of(state.sequences(session), 20)
    assert tokens_of(read_state(tmp_path / "a.state").sequences(session), 20) == plain
    fresh = [tokens_of(read_state(tmp_path / "a.state").sequences(session, {"seed": seed}), 20) for seed in (4, 5, 5)]
    assert fresh[1] == fresh[2] != fresh[0] != plain
    sequences = read_state(tmp_path / "a.state").sequences(session, {"temperature": 0.0})
    assert sequences.sampler.sampling == dataclasses.replace(SAMPLING, temperature=0.0)


def test_forked_rows_are_copies_that_draw_apart(session: DecoderSession) -> None:
    state = capture(grown(session))
    forked = state.select([1, 1, 0])
    np.testing.assert_array_equal(forked.states[0], state.states[0][[1, 1, 0]])
    assert forked.token_hashes == tuple(state.token_hashes[i] for i in (1, 1, 0))
    drawn = tokens_of(forked.sequences(session), 20)
    expected = tokens_of(capture(grown(session)).sequences(session), 20)
    assert drawn[0] == expected[1] != drawn[1]
    assert drawn[2] == expected[0]
    with pytest.raises(UsageError, match=r"rows \[2\]; expected some of 0 to 1"):
        state.select([2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 65}, None),
        ({"dtype": "float16"}, r"a state of dtype float32; expected dtype float16, as .* has"),
        ({"config": ABLATIONS["silu_glu"]}, "a state of model .*; expected model"),
    ],
)
def test_another_model_is_refused_by_name(
    change: dict, message: str | None, session: DecoderSession, tmp_path: Path
) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    config = change.pop("config", BASE)
    seed = change.pop("seed", 61)
    out = export(config, random_source(config, seed=seed), tmp_path / "out", **change)
    if message is None:
        # The same configuration from other files: the sha256 of its sources differ.
        document = json.loads((out / contract.MANIFEST_FILE).read_text())
        document["provenance"]["source_files"] = [{"name": "model.pt", "sha256": "0" * 64}]
        (out / contract.MANIFEST_FILE).write_text(json.dumps(document))
        message = "a state of model"
    other = DecoderSession(out, threads=1)
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "a.state").sequences(other)


def test_a_state_that_does_not_say_all_of_its_model_is_refused(session: DecoderSession, tmp_path: Path) -> None:
    write_state(tmp_path / "a.state", state := capture(grown(session)))
    for name in state.fingerprint:
        less = {key: value for key, value in state.fingerprint.items() if key != name}
        path = rewritten(tmp_path / "a.state", metadata={"fingerprint": json.dumps(less)})
        with pytest.raises(InputError, match=f"a state of {name.replace('_', ' ')} None"):
            read_state(path).sequences(session)


def test_an_export_without_younger_fields_opens_and_takes_the_states_that_it_made(
    session: DecoderSession, tmp_path: Path
) -> None:
    """As an earlier version wrote both: a configuration without these fields, and its hash."""
    sequences = grown(session)
    out = export(BASE, random_source(BASE, seed=61), tmp_path / "out")
    document = json.loads((out / contract.MANIFEST_FILE).read_text())
    for name in ("parallel_residual", "shared_block_norm", "output_norm"):
        del document["config"][name]
    (out / contract.MANIFEST_FILE).write_text(json.dumps(document))
    sources = [file["sha256"] for file in document["provenance"]["source_files"]]
    model = hashlib.sha256(json.dumps([document["config"], sources], sort_keys=True).encode()).hexdigest()
    state = capture(sequences)
    write_state(tmp_path / "a.state", dataclasses.replace(state, fingerprint={**state.fingerprint, "model": model}))
    resumed = read_state(tmp_path / "a.state").sequences(DecoderSession(out, threads=1))
    assert tokens_of(resumed, 20) == tokens_of(grown(session), 20)


def test_the_other_operators_of_the_same_model_take_it(session: DecoderSession, tmp_path: Path) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    out = export(BASE, random_source(BASE, seed=61), tmp_path / "out", ops="standard")
    sequences = read_state(tmp_path / "a.state").sequences(DecoderSession(out, threads=1))
    assert tokens_of(sequences, 10) == tokens_of(grown(session), 10)


def rewritten(path: Path, *, tensors: dict | None = None, metadata: dict | None = None) -> Path:
    with safetensors.safe_open(path, "numpy") as file:
        old, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arrays |= tensors or {}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(arrays, path, metadata=old | (metadata or {}))
    return path


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "pt"}, "is no state"),
        ({}, {"schema_version": "2"}, "schema_version 2; expected 1"),
        ({}, {"streams": "[{}, {}]"}, "is broken"),
        ({}, {"streams": "[]"}, "not 2 token hashes and streams"),
        ({}, {"sampling": '{"temperature": -1}'}, "--temperature -1"),
        ({}, {"sampling": '{"heat": 1}'}, "is broken"),
        ({}, {"token_hashes": '["00", "00"]'}, "no sha256"),
        ({}, {"fingerprint": "{"}, "is broken"),
        ({}, {"fingerprint": "[]"}, "is broken"),
        ({}, {"fingerprint": '{"model": 5}'}, "a fingerprint that is not text"),
        ({}, {"streams": "[" * 100_000}, "is broken"),
        ({}, {"sampling": '{"temperature": 1, "top_k": 1.5}'}, "no whole number"),
        ({"logits": np.zeros((), np.float32)}, {}, "is broken"),
        ({"seen": np.zeros((2, 7), bool)}, {}, r"seen is bool of \(2, 7\)"),
        ({"position": np.array([15, -1])}, {}, r"positions \[15, -1\]"),
        ({"position": np.array([15, 0])}, {}, "positions"),
        ({"position": np.array([15, (1 << 24) + 1])}, {}, "positions"),
        ({"position": np.array([15, 1 << 30])}, {}, "positions"),
        ({"position": np.array([15.0, 3.0])}, {}, "position is float64"),
        ({"logits": None}, {}, "is broken"),
        ({"layers.1.recurrent_state": None, "layers.5.recurrent_state": np.zeros((2, 1, 1, 1))}, {}, "is broken"),
        (
            {"layers.0.recurrent_state": np.full((2, 4, 8, 12), np.nan, np.float32)},
            {},
            "768 NaN or infinite values in the state of layer 0, heads 0, 1, 2, 3",
        ),
        ({"logits": np.full((2, 61), np.inf, np.float32)}, {}, "122 NaN or infinite logits"),
        ({"layers.0.recurrent_state": np.zeros((1, 4, 8, 12), np.float32)}, {}, "do not have 2 rows"),
    ],
)
def test_a_broken_file_is_refused(
    tensors: dict, metadata: dict, message: str, session: DecoderSession, tmp_path: Path
) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    with pytest.raises(InputError, match=message):
        read_state(rewritten(tmp_path / "a.state", tensors=tensors, metadata=metadata))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_state_that_is_no_number_is_not_written(dtype: type, session: DecoderSession, tmp_path: Path) -> None:
    state = capture(grown(session))
    states = [layer.astype(dtype) for layer in state.states]
    states[1][1, 2, 3, 4], states[1][0, 2, 0, 0] = np.nan, -np.inf
    message = "2 NaN or infinite values in the state of layer 1, head 2; expected a state of finite numbers"
    with pytest.raises(InputError, match=message):
        write_state(tmp_path / "a.state", dataclasses.replace(state, states=tuple(states)))
    logits = state.logits.copy()
    logits[0, 5] = np.nan
    with pytest.raises(InputError, match="1 NaN or infinite logits"):
        write_state(tmp_path / "a.state", dataclasses.replace(state, logits=logits))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"layers.0.recurrent_state": np.zeros((2, 4, 8, 13), np.float32)},
            r"states of .*13.*; expected 2 of \(2, 4, 8, 12\)",
        ),
        ({"layers.0.recurrent_state": np.zeros((2, 4, 8, 12))}, r"states of .*float64.*; expected float32"),
        ({"logits": np.zeros((2, 7), np.float32), "seen": np.zeros((2, 7), bool)}, r"logits \[2, 7\]; .* \[2, 61\]"),
    ],
)
def test_states_of_another_shape_or_type_are_refused_by_the_session(
    tensors: dict, message: str, session: DecoderSession, tmp_path: Path
) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    path = rewritten(tmp_path / "a.state", tensors=tensors)
    with pytest.raises(InputError, match=message):
        read_state(path).sequences(session)


def test_a_cut_file_is_refused(session: DecoderSession, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    write_state(path, capture(grown(session)))
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            read_state(path)
    with pytest.raises(InputError, match="no file"):
        read_state(tmp_path / "b.state")


def test_an_existing_file_is_replaced_only_when_asked(session: DecoderSession, tmp_path: Path) -> None:
    state, path = capture(grown(session)), tmp_path / "a.state"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_state(path, state)
    assert path.read_text() == "mine"
    write_state(path, state, force=True)
    same(read_state(path), state)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_state(tmp_path / "folder", state, force=True)
    with pytest.raises(UsageError, match="a state without tokens"):
        capture(Sequences.start(session))


def test_another_quantization_is_refused_by_name(session: DecoderSession, folder: Path, tmp_path: Path) -> None:
    write_state(tmp_path / "a.state", capture(grown(session)))
    int8 = DecoderSession(quantize(folder, tmp_path / "int8", "int8"), threads=1)
    with pytest.raises(InputError, match=r"a state of quantization none; expected quantization int8 by rtn \("):
        read_state(tmp_path / "a.state").sequences(int8)
    write_state(tmp_path / "b.state", capture(grown(int8)))
    same(read_state(tmp_path / "b.state"), capture(read_state(tmp_path / "b.state").sequences(int8)))
    int4 = DecoderSession(quantize(folder, tmp_path / "int4", "int4"), threads=1)
    for other in (session, int4):
        with pytest.raises(InputError, match="a state of quantization int8"):
            read_state(tmp_path / "b.state").sequences(other)
