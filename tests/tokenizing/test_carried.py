"""What an export or a conversion carries: a tokenizer that can be used, special tokens, notes on the rest."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models

from retnet_tools.tokenizing.carried import CarriedText, carried_text
from tests.tokenizing.pieces import processor, train

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def carried(folder: Path, vocab_size: int = 400, **settings: object) -> CarriedText:
    return carried_text(sorted(folder.iterdir()), settings, vocab_size)


def write_companions(folder: Path) -> None:
    for name in COMPANIONS:
        (folder / name).write_text("{}")


def test_a_tokenizer_comes_with_its_settings_and_chat_templates(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"to": 0}, unk_token="to")).save(str(tmp_path / "tokenizer.json"))
    write_companions(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    text = carried(tmp_path)
    assert text.tokenizer_files == tuple(sorted(("tokenizer.json", *COMPANIONS)))
    assert (dict(text.made), text.notes) == ({}, ())


def test_one_that_is_made_is_the_same_when_read_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train())
    write_companions(tmp_path)
    text = carried(tmp_path)
    assert text.tokenizer_files == tuple(sorted(("tokenizer.json", *COMPANIONS)))
    made = Tokenizer.from_str(text.made["tokenizer.json"])
    assert made.encode("To be").ids == processor(train()).encode("To be")
    assert json.loads(text.made["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}


def test_files_that_cannot_be_used_are_noted_and_not_listed(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("the 1\n")
    write_companions(tmp_path)
    text = carried(tmp_path, eos_token_id=2)
    assert (text.tokenizer, text.copies, text.tokenizer_files) == (None, (), ())
    assert text.notes[0].startswith("no tokenizer: dict.txt")
    assert json.loads(text.made["generation_config.json"]) == {"eos_token_id": 2}


def test_generation_settings_are_kept_and_noted(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.9}))
    text = carried(tmp_path, eos_token_id=[2, 3])
    assert json.loads(text.made["generation_config.json"]) == {"top_p": 0.9, "eos_token_id": [2, 3]}
    assert text.notes == ("generation_config.json says top_p = 0.9: give --top-p 0.9 to generate",)


def test_a_stack_carries_nothing(tmp_path: Path) -> None:
    write_companions(tmp_path)
    text = carried(tmp_path, vocab_size=0, eos_token_id=2)
    assert (text.tokenizer_files, dict(text.made), text.notes) == ((), {}, ())
