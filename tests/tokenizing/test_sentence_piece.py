"""SentencePiece models as tokenizers, against the sentencepiece library's own encoding and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from retnet_tools.errors import InputError, UsageError
from retnet_tools.tokenizing.files import find_tokenizer
from retnet_tools.tokenizing.sentence_piece import read_sentence_piece, sentence_piece_tokenizer
from tests.tokenizing.pieces import TEXT, processor, spm, train

# Several combining marks on a letter, and what else Unicode joins to one character, are not exact with a map.
JOINED = {"categories": ("L", "N", "P", "S", "Z", "Cc"), "exclude_characters": "ﾞﾟ"}
PLAIN = st.text(st.characters(**JOINED, max_codepoint=0x10FF) | st.characters(min_codepoint=0x2000, **JOINED))
SPACES = st.text(st.sampled_from(" \n\t▁ab.\u00a0\u3000thé①"))
WORDS = st.lists(st.sampled_from(["the", "ROMEO.", "naïve", "水", "🎭", "xqz", "aaaa", "..", "<0x41>", "\r\n"]))
# These are recognised in a text, which the library does not do; hypothesis tries words that it finds in the package.
CONTROL = ("<unk>", "<s>", "</s>", "<pad>")
MODELS = {
    "bpe": train(),
    "bpe_bytes": train(byte_fallback=True, character_coverage=0.99),
    "bpe_identity": train(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True),
    "bpe_no_prefix": train(add_dummy_prefix=False),
    "bpe_whitespace_pieces": train(
        split_by_whitespace=False, remove_extra_whitespaces=False, normalization_rule_name="identity"
    ),
    "bpe_user_defined": train(user_defined_symbols="ROMEO,<sep>,\n", normalization_rule_name="identity"),
    "bpe_pad": train(pad_id=0, unk_id=3, bos_id=1, eos_id=2),
    "bpe_digits": train(split_digits=True, byte_fallback=True),
    "unigram": train("unigram"),
    "unigram_bytes": train("unigram", byte_fallback=True, character_coverage=0.99),
    "unigram_identity": train("unigram", normalization_rule_name="identity", remove_extra_whitespaces=False),
    "unigram_user_defined": train("unigram", user_defined_symbols="ROMEO,<sep>"),
    "unigram_nfkc_cf": train("unigram", normalization_rule_name="nmt_nfkc_cf"),
    "char": train("char", 90),
}


def converted(model: bytes, folder: Path, **options: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    read = read_sentence_piece(folder / "tokenizer.model")
    ids = {piece: number for number, (piece, _, _) in enumerate(read.pieces)}
    # As it is after it was written and read.
    return Tokenizer.from_str(sentence_piece_tokenizer(read, ids, read.control, **options).to_str())


@pytest.mark.parametrize("name", MODELS)
def test_every_text_becomes_the_pieces_of_the_library(name: str, tmp_path: Path) -> None:
    expected, found = processor(MODELS[name]), converted(MODELS[name], tmp_path)
    assert found.get_vocab_size() == len(expected)

    @settings(max_examples=150, deadline=None)
    @given(text=PLAIN | SPACES | WORDS.map("".join) | WORDS.map(" ".join))
    def check(text: str) -> None:
        encoding = found.encode(text)
        if "unigram" in name and "<0x" in text:
            return
        assert encoding.ids == expected.encode(text), encoding.tokens

    check()
    for line in TEXT.read_text(encoding="utf-8").splitlines()[:400]:
        assert found.encode(line).ids == expected.encode(line)


@pytest.mark.parametrize("name", ["bpe_identity", "unigram_identity", "bpe_whitespace_pieces"])
def test_without_a_map_any_unicode_is_exact(name: str, tmp_path: Path) -> None:
    expected, found = processor(MODELS[name]), converted(MODELS[name], tmp_path)

    @settings(max_examples=300, deadline=None)
    @given(text=st.text().filter(lambda text: not any(token in text for token in CONTROL)))
    def check(text: str) -> None:
        assert found.encode(text).ids == expected.encode(text)

    check()


@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_back_the_text_as_the_library_does(name: str, tmp_path: Path) -> None:
    expected, found = processor(MODELS[name]), converted(MODELS[name], tmp_path)
    for text in ("To be, or not to be", "naïve café", "ROMEO. I am", "two  spaces", "水 is water"):
        ids = expected.encode(text)
        if expected.unk_id() not in ids:
            assert found.decode(ids) == expected.decode(ids)


def test_control_tokens_are_recognised_and_not_shown(tmp_path: Path) -> None:
    found = converted(MODELS["bpe"], tmp_path)
    ids = found.encode("be</s>").ids
    assert ids[-1] == processor(MODELS["bpe"]).eos_id() == 2
    assert found.decode(ids) == "be"


def test_a_long_text_is_the_same(tmp_path: Path) -> None:
    text, model = TEXT.read_text(encoding="utf-8")[:60_000], MODELS["bpe_identity"]
    assert converted(model, tmp_path).encode(text).ids == processor(model).encode(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word"}, "expected model_type unigram, bpe or char"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_kinds_without_an_equal_are_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        converted(train(**{"model_type": "bpe"} | options), tmp_path)


def test_unused_pieces_are_refused(tmp_path: Path) -> None:
    model = spm.sentencepiece_model_pb2.ModelProto.FromString(MODELS["bpe"])
    model.pieces[300].type = 5
    with pytest.raises(InputError, match="no unused pieces"):
        converted(model.SerializeToString(), tmp_path)


def test_what_is_no_model_is_refused_and_a_missing_library_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"tokenizer\.model cannot be read .*expected a SentencePiece model"):
        read_sentence_piece(file)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UsageError, match="pip install sentencepiece"):
        read_sentence_piece(file)
    (problem,) = find_tokenizer([file], 400).problems
    assert "pip install sentencepiece" in str(problem)
