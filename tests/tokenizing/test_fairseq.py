"""fairseq's dict.txt: ids by hand from its rule, pieces from the sentencepiece library or from GPT-2's BPE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from retnet_tools.errors import InputError
from retnet_tools.tokenizing.fairseq import read_dictionary
from retnet_tools.tokenizing.files import FoundTokenizer, find_tokenizer
from tests.tokenizing.pieces import TEXT, processor, train

PLAIN = st.text(st.sampled_from(" \n▁abcdefgh.,'éx1水🎭"))


def found(folder: Path, vocab_size: int) -> tuple[FoundTokenizer, Tokenizer]:
    tokenizer = find_tokenizer(sorted(folder.iterdir()), vocab_size).require("a text")
    return tokenizer, Tokenizer.from_str(tokenizer.tokenizer.to_str())


def rule(lines: list[str]) -> dict[str, int]:
    """Four special words, then the lines."""
    return {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {line.split(" ")[0]: 4 + i for i, line in enumerate(lines)}


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pieces_have_the_ids_of_the_dictionary(model_type: str, fallback: bool, tmp_path: Path) -> None:
    model = train(model_type, byte_fallback=fallback)
    pieces = processor(model)
    # A dictionary is sorted by frequency, lacks rare pieces and is filled up.
    kept = [pieces.id_to_piece(i) for i in range(len(pieces) - 1, 2, -1) if i % 10]
    lines = [f"{piece} {i}" for i, piece in enumerate(kept)] + ["madeupword0000 0", "<mask> 0"]
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    ids, size = rule(lines), 4 + len(lines) + 8  # embeddings are padded: what has no word lies behind them all
    record, tokenizer = found(tmp_path, size)
    assert record.special_ids == {"bos": 0, "pad": 1, "eos": 2}
    assert record.notes[0].startswith(f"dict.txt lacks {len(pieces) - 3 - len(kept)} pieces of sentencepiece.bpe.model")

    @settings(max_examples=200, deadline=None)
    @given(text=PLAIN | st.sampled_from(TEXT.read_text(encoding="utf-8").splitlines()[:500]))
    def check(text: str) -> None:
        encoding = tokenizer.encode(text)
        expected = pieces.encode(text, out_type=str)
        for piece, number in zip(expected, encoding.ids, strict=True):
            in_model = pieces.piece_to_id(piece) != pieces.unk_id()
            assert number == ids[piece] if piece in ids else (number >= size if in_model else number == 3)

    check()
    for special, number in (("<s>", 0), ("<pad>", 1), ("</s>", 2), ("<unk>", 3)):
        assert tokenizer.token_to_id(special) == number
        assert tokenizer.decode([number]) == ""
    assert 4 + len(kept) not in tokenizer.encode("madeupword0000").ids


def test_gpt2_words_are_its_ids_in_decimal(tmp_path: Path) -> None:
    gpt2 = ByteLevelBPETokenizer()
    gpt2.train_from_iterator([TEXT.read_text(encoding="utf-8")[:50_000]], 400)
    gpt2.save_model(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    lines = [f"{i} 9" for i in range(399, -1, -1) if i != 300] + ["madeupword0000 0"]
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n")
    ids, size = rule(lines), 4 + len(lines) + 8
    record, tokenizer = found(tmp_path, size)
    assert record.notes[0].startswith(f"dict.txt lacks 1 pieces of encoder.json, such as {gpt2.id_to_token(300)!r}")

    @settings(max_examples=200, deadline=None)
    @given(text=st.text())
    def check(text: str) -> None:
        expected = [ids.get(str(number), size) for number in gpt2.encode(text).ids]
        assert tokenizer.encode(text).ids == expected

    check()
    assert tokenizer.decode([ids[str(n)] for n in gpt2.encode("to be").ids]) == "to be"


def test_of_two_models_beside_a_dictionary_its_words_tell_which_made_it(tmp_path: Path) -> None:
    gpt2 = ByteLevelBPETokenizer()
    gpt2.train_from_iterator([TEXT.read_text(encoding="utf-8")[:50_000]], 400)
    gpt2.save_model(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(train())
    pieces = processor(train())
    words = {
        "sentencepiece.bpe.model": [pieces.id_to_piece(i) for i in range(3, len(pieces))],
        "encoder.json": [str(i) for i in range(400)],
    }
    for name, lines in words.items():
        (tmp_path / "dict.txt").write_text("".join(f"{word} 1\n" for word in lines), encoding="utf-8")
        assert name in [file.name for file in found(tmp_path, 500)[0].files]


def test_a_dictionary_is_read_as_fairseq_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "dict.txt"
    file.write_text("the 100\n▁a b 7\n<pad> 3 #fairseq:overwrite\nrare -4.5\n", encoding="utf-8")
    expected = {"<s>": 0, "</s>": 2, "<unk>": 3, "the": 4, "▁a b": 5, "<pad>": 6, "rare": 7}
    assert read_dictionary(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("the\n", "has 'the' in line 1"), ("a 1\na 2\n", "'a' twice"), ("the many\n", "expected a word and its count")],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_dictionary(tmp_path / "dict.txt")


def test_a_dictionary_alone_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("the 1\n")
    (note,) = find_tokenizer([tmp_path / "dict.txt"], 5).notes
    assert "its SentencePiece model, or GPT-2's encoder.json and vocab.bpe, beside it" in note


def test_a_dictionary_of_other_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "dict.txt").write_text("the 1\n")
    (problem,) = find_tokenizer(sorted(tmp_path.iterdir()), 5).problems
    assert "dict.txt holds no number" in str(problem)
