"""Special tokens: the first document that names an id decides, for each id by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from retnet_tools.errors import InputError
from retnet_tools.tokenizing.special import generation_notes, generation_settings, special_tokens

TOKENIZER = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(40)}, unk_token="<0>"))


def write(folder: Path, **documents: Any) -> Path:
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def test_each_id_comes_from_the_first_document_that_names_it(tmp_path: Path) -> None:
    def eos(**settings: Any) -> Any:
        return special_tokens([tmp_path], 40, TOKENIZER, settings=settings, own={"eos": 9}).ids.get("eos")

    assert eos() == (9,)
    write(tmp_path, special_tokens_map={"eos_token": {"content": "<5>"}})
    assert eos() == (5,)
    write(tmp_path, tokenizer_config={"eos_token": "<6>"})
    assert eos() == (6,)
    assert eos(eos_token_id=[38, 7, 38]) == (38, 7)
    assert eos(eos_token_id=None) == (6,)
    write(tmp_path, generation_config={"eos_token_id": 8, "bos_token_id": None})
    assert eos(eos_token_id=38) == (8,)
    found = special_tokens(
        [tmp_path], 40, TOKENIZER, settings={"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3}
    )
    assert found.ids == {"bos": (1,), "eos": (8,), "pad": (2,)}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"eos_token": "<4>"}, (4,)),
        ({"eos_token": {"content": "<4>", "lstrip": False}}, (4,)),
        ({"eos_token": ["<4>", {"content": "<5>"}, 6]}, (4, 5, 6)),
        ({"eos_token": 4}, (4,)),
        ({"eos_token_id": [4, 5]}, (4, 5)),
        ({"eos_token": "</s>", "added_tokens_decoder": {"7": {"content": "</s>"}}}, (7,)),
        ({"eos_token": "unknown"}, None),
        ({"eos_token": None}, None),
        ({}, None),
    ],
)
def test_the_tokenizers_own_settings_name_tokens_or_ids(document: Any, expected: Any, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=document)
    assert special_tokens([tmp_path], 40, TOKENIZER).ids.get("eos") == expected


def test_without_a_tokenizer_ids_alone_count(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "<4>", "bos_token_id": 3})
    assert special_tokens([tmp_path], 40).ids == {"bos": (3,)}
    assert special_tokens([], 40, settings={"eos_token_id": 5}).ids == {"eos": (5,)}


def test_ids_that_the_model_lacks_are_noted_and_stay_as_they_were_said(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"eos_token_id": [5, 40], "pad_token_id": -1})
    found = special_tokens([tmp_path], 40, settings={"eos_token_id": 6, "pad_token_id": 3})
    assert found.ids == {"eos": (5,)}
    assert found.notes == (
        "generation_config.json has eos_token_id 40, which is none of the model's 40 tokens",
        "generation_config.json has pad_token_id -1, which is none of the model's 40 tokens",
    )
    assert generation_settings([tmp_path], found) == {"eos_token_id": [5, 40], "pad_token_id": -1}


@pytest.mark.parametrize("value", ["2", [[1]], 2.0, True, {"id": 2}])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_ids_that_are_no_numbers_are_refused_by_their_place(value: Any, place: str, tmp_path: Path) -> None:
    settings = {"eos_token_id": value} if place == "config.json" else {}
    if not settings:
        write(tmp_path, **{place.removesuffix(".json"): {"eos_token_id": value}})
    with pytest.raises(InputError, match=rf"{place} has eos_token_id .*expected a token id or a list of them"):
        special_tokens([tmp_path], 40, settings=settings)


def test_a_document_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8-sig")
    assert special_tokens([tmp_path], 40).ids == {"eos": (5,)}


def test_other_generation_settings_stay_in_the_document(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"temperature": 0.7, "eos_token_id": None})
    found = special_tokens([tmp_path], 40, settings={"eos_token_id": 5})
    assert generation_settings([tmp_path], found) == {"temperature": 0.7, "eos_token_id": 5}


def test_settings_that_generate_does_not_apply_are_noted_by_key_and_value() -> None:
    document = {
        **{"_from_model_config": True, "transformers_version": "4.46", "eos_token_id": 2, "bos_token_id": 1},
        **{"temperature": 0.7, "top_k": 40, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.2},
        **{"max_length": 4096, "forced_eos_token_id": 2, "suppress_tokens": [3, 4], "num_beams": 4},
    }
    assert generation_notes(document) == [
        "generation_config.json says temperature = 0.7: give --temperature 0.7 to generate",
        "generation_config.json says top_k = 40: give --top-k 40 to generate",
        "generation_config.json says top_p = 0.9: give --top-p 0.9 to generate",
        "generation_config.json says do_sample = true: give --temperature above 0 to generate",
        "generation_config.json says repetition_penalty = 1.2: give --repetition-penalty 1.2 to generate",
        "generation_config.json says max_length = 4096: generate has no such option",
        "generation_config.json says forced_eos_token_id = 2: generate has no such option",
        "generation_config.json says suppress_tokens = [3, 4]: generate has no such option",
        "generation_config.json says num_beams = 4: generate has no such option",
    ]


def test_neutral_settings_are_not_noted() -> None:
    ones = dict.fromkeys(("temperature", "top_p", "repetition_penalty", "length_penalty", "num_beams"), 1.0)
    nothing = {"do_sample": False, "suppress_tokens": [], "forced_bos_token_id": None, "top_k": 0, "min_length": 0}
    assert generation_notes({**ones, **nothing, "max_length": 20, "use_cache": True}) == []
