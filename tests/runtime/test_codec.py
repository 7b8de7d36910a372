from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retnet_tools.errors import InputError, UsageError
from retnet_tools.runtime.codec import IdCodec, StopMatcher, TextCodec, open_codec

END = "<|endoftext|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer without merges: every byte is a token, so most characters span several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["plain", "naïve café", "Größe 水 🎭🎭", " spaces  and\nlines\t"])
def test_streams_give_back_the_text_whole_characters_at_a_time(text: str, folder: Path) -> None:
    codec = open_codec(folder, 300, token_ids=False)
    stream = codec.stream()
    pieces = [stream.push(token) for token in codec.encode(text)]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


def test_the_end_of_text_comes_from_the_first_file_that_names_it(folder: Path) -> None:
    assert TextCodec(folder, 300).end_ids == frozenset()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert TextCodec(folder, 300).end_ids == set(TextCodec(folder, 300).encode("a"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    assert TextCodec(folder, 300).end_ids == {256}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert TextCodec(folder, 300).end_ids == {5, 7}


def test_special_tokens_are_not_shown(folder: Path) -> None:
    stream = TextCodec(folder, 300).stream()
    assert stream.push(256) == ""


def test_a_token_that_the_model_lacks_refuses_the_prompt_that_has_it(folder: Path) -> None:
    codec = TextCodec(folder, 256)
    assert codec.encode("plain") == TextCodec(folder, 300).encode("plain")
    with pytest.raises(UsageError, match=r"token '<\|endoftext\|>' \(id 256\) in the text; expected 0 to 255"):
        codec.encode(f"plain{END}")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(name: str, folder: Path) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=name):
        TextCodec(folder, 300)


def test_ids_go_in_and_out_without_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    codec = open_codec(empty, 61, token_ids=False)
    assert isinstance(codec, IdCodec)
    assert isinstance(open_codec(folder, 300, token_ids=True), IdCodec)
    assert codec.encode(" 12, 7\n300 ") == [12, 7, 300]
    stream = codec.stream()
    assert "".join(stream.push(token) for token in [12, 7, 300]) == "12 7 300"
    with pytest.raises(UsageError, match="'x' where token ids are read"):
        codec.encode("1 x")
    with pytest.raises(UsageError, match="where token ids are read"):
        codec.encode("99999999999999999999")


def test_end_ids_that_are_no_numbers_are_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [[1]]}')
    with pytest.raises(InputError, match=r"generation_config\.json has eos_token_id"):
        TextCodec(folder, 300)


def cut(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        text, complete = matcher.push(piece)
        shown.append(text)
        if complete:
            return shown, True
    shown.append(matcher.rest())
    return shown, False


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "complete"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["END"], ["some E", "N", "D more"], ["some ", "", ""], True),
        (["END"], ["some E", "N", "ough"], ["some ", "", "ENough", ""], False),
        (["END"], ["some EN"], ["some ", "EN"], False),
        (["aab"], ["aa", "ab"], ["", "a"], True),
        (["b", "ab"], ["xa", "b"], ["x", ""], True),
        (["\n\n", "."], ["one\n", "two. three"], ["one", "\ntwo"], True),
    ],
)
def test_text_is_held_back_while_it_may_become_a_stop_string(stops, pieces, shown, complete) -> None:
    assert cut(stops, pieces) == (shown, complete)


def test_every_cut_of_a_text_into_pieces_stops_at_the_same_place() -> None:
    text, stops = "the cat sat on the catalogue", ["cata", "on the cb"]
    for width in range(1, len(text)):
        pieces = [text[i : i + width] for i in range(0, len(text), width)]
        shown, complete = cut(stops, pieces)
        assert ("".join(shown), complete) == ("the cat sat on the ", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="an empty --stop"):
        StopMatcher(["x", ""])


def test_a_tokenizer_that_would_cut_long_texts_does_not(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(file))
    assert [len(open_codec(folder, 300).encode(text)) for text in ("abcdefgh", "ab")] == [8, 2]
