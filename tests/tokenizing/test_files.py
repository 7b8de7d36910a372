"""Which files are a model's tokenizer, and what transformers' settings beside them add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from retnet_tools.errors import UsageError
from retnet_tools.tokenizing.files import TokenizerSearch, find_tokenizer
from tests.tokenizing.pieces import processor, train

MODEL = train()


def search(folder: Path, vocab_size: int = 400) -> TokenizerSearch:
    return find_tokenizer(sorted(folder.iterdir()), vocab_size)


def write_pieces(folder: Path, name: str = "tokenizer.model", **settings: Any) -> Path:
    (folder / name).write_bytes(MODEL)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def encode(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_str(search(folder).require("a text").tokenizer.to_str()).encode(text).ids


def test_tokenizer_json_comes_first_and_is_not_made(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"to": 0}, unk_token="to")).save(str(tmp_path / "tokenizer.json"))
    write_pieces(tmp_path)
    found = search(tmp_path).require("a text")
    assert (found.made, [file.name for file in found.files]) == (False, ["tokenizer.json"])
    (tmp_path / "tokenizer.json").write_text("{")
    found = search(tmp_path).require("a text")
    assert (found.made, [file.name for file in found.files]) == (True, ["tokenizer.model"])
    assert "tokenizer.json cannot be read" in search(tmp_path).notes[0]


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_sentence_piece_model_of_any_usual_name_is_one(name: str, tmp_path: Path) -> None:
    pieces = processor(MODEL)
    found = search(write_pieces(tmp_path, name)).require("a text")
    assert found.tokenizer.encode("To be").ids == pieces.encode("To be")
    assert found.special_ids == {"bos": 1, "eos": 2}


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, [1], []),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, [], []),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, [1], [2]),
        ({"tokenizer_class": "CodeLlamaTokenizer"}, [1], []),
        ({"tokenizer_class": "GemmaTokenizer"}, [1], []),
        ({"tokenizer_class": "T5Tokenizer"}, [], [2]),
        ({"add_bos_token": True, "bos_token": {"content": "</s>"}}, [2], []),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, [], []),
    ],
)
def test_tokens_around_a_text_follow_its_settings(
    settings: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    assert encode(write_pieces(tmp_path, **settings), "To be") == [*before, *processor(MODEL).encode("To be"), *after]


def test_the_map_of_special_tokens_says_what_the_settings_leave_out(tmp_path: Path) -> None:
    """As transformers reads them: tokenizer_config.json decides."""
    write_pieces(tmp_path, add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "<s>"}))
    assert encode(tmp_path, "To be") == [1, *processor(MODEL).encode("To be"), 1]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    write_pieces(tmp_path, added_tokens_decoder={"0": {"content": "<unk>"}, "410": {"content": "<|user|>"}})
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    assert encode(tmp_path, "<|user|><pad>") == [410, 400]


def test_no_space_before_a_text_where_the_settings_say_so(tmp_path: Path) -> None:
    expected = processor(train(add_dummy_prefix=False))
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False}))
    found = search(tmp_path).require("a text").tokenizer.encode("be")
    assert "".join(found.tokens) == "".join(expected.encode("be", out_type=str)) == "be"


@pytest.mark.parametrize("name", ["XLMRobertaTokenizer", "PegasusTokenizer"])
def test_a_class_that_changes_ids_is_not_guessed(name: str, tmp_path: Path) -> None:
    result = search(write_pieces(tmp_path, tokenizer_class=name))
    assert result.found is None
    assert f"a {name}, which may change its ids" in result.notes[0]
    assert "AutoTokenizer" in result.notes[0]


def test_an_id_that_two_tokens_share_is_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 5}))
    assert "share the id 5" in search(tmp_path).notes[0]


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json", "vocab.bpe"])
def test_a_file_of_no_kind_that_is_known_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[UNK]\n")
    (note,) = search(tmp_path).notes
    assert note.startswith(f"no tokenizer: {name} alone")
    assert "save_pretrained" in note


def test_no_file_is_no_tokenizer(tmp_path: Path) -> None:
    assert search(tmp_path) == TokenizerSearch(None, ())
    with pytest.raises(UsageError, match=r"a text, but no tokenizer\.json"):
        search(tmp_path).require("a text")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.tiktoken"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    search = find_tokenizer([file], 100)
    assert search.found is None
    assert search.notes == (
        f"no tokenizer: {name} is a Git-LFS pointer; expected the file itself; run git lfs pull in its folder",
    )


def test_a_file_of_tiktoken_is_named(tmp_path: Path) -> None:
    file = tmp_path / "vocab.tiktoken"
    file.write_text("IQ== 0\n")
    (note,) = find_tokenizer([file], 100).notes
    assert note.startswith("no tokenizer: vocab.tiktoken alone")
    assert "AutoTokenizer" in note
