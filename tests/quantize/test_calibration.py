"""Texts to calibrate on: whole sequences drawn by a seed, and one clear refusal for each text that cannot be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import InputError, UsageError
from retnet_tools.quantize.calibration import draw_sequences, read_calibration
from retnet_tools.quantize.options import DEFAULT_TOKENS, SEQUENCE, QuantizeOptions
from retnet_tools.tokenizing import text_files
from retnet_tools.tokenizing.files import load_tokenizer
from tests.helpers import ABLATIONS, BASE
from tests.quantize.calibrated import FIXTURE, fixture

TEXT = FIXTURE / "calibration.txt"


def test_sequences_are_windows_of_the_text_in_its_order() -> None:
    ids = np.arange(5000)
    found = draw_sequences(ids, 4 * 512, seed=1)
    assert found.shape == (4, 512)
    assert (np.diff(found, axis=1) == 1).all()
    assert (found[:, 0] % 512 == 0).all()
    assert (np.diff(found[:, 0]) > 0).all()
    np.testing.assert_array_equal(found, draw_sequences(ids, 4 * 512, seed=1))
    assert not np.array_equal(found, draw_sequences(ids, 4 * 512, seed=2))


@pytest.mark.parametrize(("available", "shape"), [(512, (1, 512)), (1500, (2, 512)), (100, (1, 100)), (1, (1, 1))])
def test_a_short_text_is_taken_as_it_is(available: int, shape: tuple[int, int]) -> None:
    assert draw_sequences(np.arange(available), 65536, seed=0).shape == shape


def test_the_record_names_the_text_and_what_was_taken() -> None:
    checkpoint = fixture()
    text = read_calibration(TEXT, 1100, 0, checkpoint.config, checkpoint.tokenizer_files)
    assert text.record.text == "calibration.txt"
    assert text.record.sha256 == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert text.record.tokens == text.sequences.size == 1024
    assert (text.record.sequence, text.record.seed) == (512, 0)
    assert text.record.ids_sha256 == hashlib.sha256(text.sequences.astype("<i8").tobytes()).hexdigest()
    ids = load_tokenizer(FIXTURE / "tokenizer.json").encode(TEXT.read_text(encoding="utf-8")).ids
    windows = np.array(ids[: len(ids) // 512 * 512]).reshape(-1, 512)
    for sequence in text.sequences:
        assert (windows == sequence).all(1).any()


def test_another_draw_has_another_record() -> None:
    checkpoint = fixture()
    records = [
        read_calibration(TEXT, 1024, seed, checkpoint.config, checkpoint.tokenizer_files).record for seed in (0, 1)
    ]
    assert (records[0].seed, records[1].seed) == (0, 1)
    assert records[0].ids_sha256 != records[1].ids_sha256


@pytest.mark.parametrize("size", [700, 4096, 50_000])
def test_a_text_in_pieces_gives_the_same_tokens(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = fixture()
    # Lines of spaces and several empty ones, which a token may reach across.
    text = tmp_path / "text"
    text.write_bytes(TEXT.read_bytes().replace(b"\n\n", b"\n\n\n  \n\n")[:150_000])
    monkeypatch.setattr(text_files, "PIECE", size)
    found = read_calibration(text, DEFAULT_TOKENS, 0, checkpoint.config, checkpoint.tokenizer_files)
    ids = load_tokenizer(FIXTURE / "tokenizer.json").encode(text.read_bytes().decode()).ids
    count = len(ids) // SEQUENCE
    assert len(found.sequences) == count > 30
    np.testing.assert_array_equal(found.sequences, np.array(ids[: count * SEQUENCE]).reshape(-1, SEQUENCE))


def test_newlines_of_another_system_stay_as_they_are(tmp_path: Path) -> None:
    checkpoint, text = fixture(), tmp_path / "text"
    text.write_bytes(TEXT.read_bytes()[:9000].replace(b"\n", b"\r\n"))
    found = read_calibration(text, DEFAULT_TOKENS, 0, checkpoint.config, checkpoint.tokenizer_files)
    ids = load_tokenizer(FIXTURE / "tokenizer.json").encode(text.read_bytes().decode()).ids
    np.testing.assert_array_equal(found.sequences[0], ids[:SEQUENCE])
    assert text_files.read_text(text) == text_files.Text("text", found.record.sha256, text.read_bytes().decode())


def test_the_held_out_play_is_no_part_of_the_text() -> None:
    held_out = {line.strip() for line in (FIXTURE / "heldout.txt").read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for line in TEXT.read_text(encoding="utf-8").splitlines()]
    spoken = [line for line in lines if len(line) > 40]
    assert len(spoken) > 1000
    assert not held_out & set(spoken)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", UsageError, "text holds no text; expected a text to calibrate on"),
        (b"caf\xe9\n", InputError, "text is not UTF-8"),
        (None, InputError, r"no file .*text; expected a file that can be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(content, error, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    checkpoint = fixture()
    with pytest.raises(error, match=message):
        read_calibration(tmp_path / "text", DEFAULT_TOKENS, 0, checkpoint.config, checkpoint.tokenizer_files)


def test_a_model_without_a_tokenizer_or_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"calibration\.txt, but no tokenizer\.json with the model"):
        read_calibration(TEXT, DEFAULT_TOKENS, 0, BASE, [])
    with pytest.raises(UsageError, match=r"token '.*' \(id \d+\) in the text; expected 0 to 60"):
        read_calibration(TEXT, DEFAULT_TOKENS, 0, BASE, [FIXTURE / "tokenizer.json"])
    with pytest.raises(UsageError, match="a text for a stack without embedding"):
        read_calibration(TEXT, DEFAULT_TOKENS, 0, ABLATIONS["stack"], [FIXTURE / "tokenizer.json"])


def test_less_than_a_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match="511 tokens to calibrate on; expected at least 512"):
        QuantizeOptions("int4", calibration=TEXT, calibration_tokens=511)
