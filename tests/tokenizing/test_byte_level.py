"""GPT-2's BPE files as tokenizers, against the tokenizers library's own and an example worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from retnet_tools.errors import InputError
from retnet_tools.tokenizing.fairseq import END_OF_TEXT, byte_level_tokenizer, read_byte_level
from retnet_tools.tokenizing.files import find_tokenizer

TEXT = Path(__file__).parents[2] / "fixtures" / "shakespeare" / "calibration.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT.read_text(encoding="utf-8")[:50_000]], 400, special_tokens=[END_OF_TEXT])
    tokenizer.save_model(str(path))
    return path


def found(path: Path, vocab_size: int = 400) -> Tokenizer:
    tokenizer = find_tokenizer(sorted(path.iterdir()), vocab_size).require("a text").tokenizer
    return Tokenizer.from_str(tokenizer.to_str())


@pytest.mark.parametrize("prefix_space", [False, True])
def test_every_text_becomes_the_tokens_of_the_library(prefix_space: bool, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix_space}))
    names = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    expected, tokenizer = ByteLevelBPETokenizer(*names, add_prefix_space=prefix_space), found(tmp_path)

    @settings(max_examples=200, deadline=None)
    @given(text=st.text() | st.text(st.sampled_from(" \n'thestllre.1é")))
    def check(text: str) -> None:
        assert tokenizer.encode(text).ids == expected.encode(text).ids

    check()


def test_an_example_by_hand(tmp_path: Path) -> None:
    """`Ġ` is a space: "to be" is `to`, `Ġb` `e`, since `b e` comes after `Ġ b` among the merges."""
    ids = {"t": 0, "o": 1, "b": 2, "e": 3, "Ġ": 4, "to": 5, "Ġb": 6, "be": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt o\nĠ b\nb e\n")
    tokenizer = found(tmp_path, 8)
    assert tokenizer.encode("to be").ids == [5, 6, 3]
    assert tokenizer.encode("be").ids == [7]
    assert tokenizer.decode([5, 6, 3]) == "to be"


def test_a_byte_without_a_token_is_past_the_model(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("a b\n")
    search = find_tokenizer(sorted(tmp_path.iterdir()), 10)
    assert found(tmp_path, 10).encode("ab").ids == [2]
    assert min(found(tmp_path, 10).encode("cd e").ids) >= 10
    assert search.notes == ("vocab.json has no token for 254 bytes: a prompt with one is refused",)


def test_end_of_text_is_its_own_special_token(folder: Path) -> None:
    tokenizer, search = found(folder), find_tokenizer(sorted(folder.iterdir()), 400)
    assert tokenizer.encode(f"be{END_OF_TEXT}").ids[-1] == 0
    assert tokenizer.decode([0]) == ""
    assert search.found is not None
    assert search.found.special_ids == {"bos": 0, "eos": 0}


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", "a b\n", "cannot be read"),
        ('{"a": 0, "b": 1}', "a b\n", "merges 'a' and 'b'"),
        ('{"a": 0, "b</w>": 1, "ab</w>": 2}', "a b</w>\n", "marks the ends of words"),
    ],
)
def test_other_files_are_refused(vocab: str, merges: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(InputError, match=message):
        read_byte_level(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_no_special_tokens_are_made_up() -> None:
    tokenizer, missing = byte_level_tokenizer({"a": 0}, [], (), beyond=1)
    assert (tokenizer.get_vocab_size(), missing) == (256, 255)
