"""Texts become tokens whose bytes add up to the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from retnet_tools.errors import InputError, UsageError
from retnet_tools.evaluate.scored_text import byte_sizes, read_tokens
from tests.sources import MarkovLogits

TEXT = "Où est-ce? 日本語, naïve 🎭🎭 end\n"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["est est est"], trainer)
    return tokenizer


def word_level(**words: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **words}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def source(folder: Path, tokenizer: Tokenizer | None, vocab: int = 300, name: str = "model") -> MarkovLogits:
    files = ()
    if tokenizer is not None:
        (folder / name).mkdir(exist_ok=True)
        files = (folder / name / "tokenizer.json",)
        tokenizer.save(str(files[0]))
    return MarkovLogits(vocab, tokenizer_files=files, name=name)


def test_bytes_of_tokens_add_up_to_the_text_where_characters_take_several_tokens(tmp_path: Path) -> None:
    found = read_tokens(TEXT, source(tmp_path, byte_level()))
    assert found.sizes.sum() == len(TEXT.encode())
    assert (found.sizes == 0).any()
    # What the first n tokens cover is what decoding them gives, wherever a character ends.
    tokenizer = byte_level()
    for n in range(1, len(found.ids) + 1):
        text = tokenizer.decode(found.ids[:n].tolist())
        if "\ufffd" not in text:
            assert found.sizes[:n].sum() == len(text.encode())


def test_what_the_tokenizer_drops_counts_with_the_next_token_and_what_it_adds_has_no_bytes(tmp_path: Path) -> None:
    tokenizer = word_level(to=1, be=2, end=3)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [UNK]", special_tokens=[("[UNK]", 0)])
    found = read_tokens("to   é be end  ", source(tmp_path, tokenizer))
    assert found.ids.tolist() == [1, 0, 2, 3, 0]
    assert found.sizes.tolist() == [2, 5, 3, 4, 0]


def test_settings_of_training_in_the_tokenizer_do_not_cut_or_pad_the_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    found = read_tokens(TEXT, source(tmp_path, tokenizer))
    assert found.sizes.sum() == len(TEXT.encode())
    assert 5 < len(found.ids) < 500


def test_a_start_token_by_name_or_id_comes_first_and_has_no_bytes(tmp_path: Path) -> None:
    model = source(tmp_path, byte_level())
    plain, named = read_tokens(TEXT, model), read_tokens(TEXT, model, start_token="<s>")
    assert named.ids.tolist() == [0, *plain.ids]
    assert named.sizes.tolist() == [0, *plain.sizes]
    assert read_tokens(TEXT, model, start_token="17", limit=2).ids.tolist() == [17, *plain.ids[:2]]
    with pytest.raises(UsageError, match="start token 'nonsense'"):
        read_tokens(TEXT, model, start_token="nonsense")


def test_token_ids_need_no_tokenizer_and_have_no_bytes(tmp_path: Path) -> None:
    found = read_tokens("3 1, 4\n1 5", source(tmp_path, None), token_ids=True, limit=4)
    assert (found.ids.tolist(), found.sizes) == ([3, 1, 4, 1], None)
    with pytest.raises(UsageError, match=r"but no tokenizer\.json .*--token-ids"):
        read_tokens("text", source(tmp_path, None))


@pytest.mark.parametrize("text", ["3 300", "300"])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="token id 300; expected 0 to 299"):
        read_tokens(text, source(tmp_path, None), token_ids=True)


def test_a_token_past_the_vocabulary_refuses_the_text_that_has_it(tmp_path: Path) -> None:
    model = source(tmp_path, word_level(to=1, be=9), vocab=9)
    with pytest.raises(InputError, match=r"token 'be' \(id 9\) in the text; expected 0 to 8"):
        read_tokens("to be", model)
    assert read_tokens("to to", model).ids.tolist() == [1, 1]


def test_a_baseline_of_another_vocabulary_or_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    model = source(tmp_path, word_level(to=1, be=2))
    with pytest.raises(UsageError, match="other has a vocabulary of 299, model of 300"):
        read_tokens("to be", model, source(tmp_path, word_level(to=1, be=2), vocab=299, name="other"))
    with pytest.raises(UsageError, match="the tokenizers of model and other differ"):
        read_tokens("to be", model, source(tmp_path, word_level(to=2, be=1), name="other"))
    split = word_level(to=1, be=2)
    split.pre_tokenizer = pre_tokenizers.Split("o", "isolated")
    with pytest.raises(UsageError, match="differ"):
        read_tokens("to be", model, source(tmp_path, split, name="other"))


def test_a_baseline_of_the_same_tokenizer_passes_and_one_without_is_noted(tmp_path: Path) -> None:
    model = source(tmp_path, word_level(to=1, be=2))
    assert read_tokens("to be", model, source(tmp_path, word_level(to=1, be=2), name="other")).notes == ()
    (note,) = read_tokens("to be", model, source(tmp_path, None, name="other")).notes
    assert "other has no tokenizer" in note


def test_an_empty_text_has_no_tokens(tmp_path: Path) -> None:
    found = read_tokens("", source(tmp_path, byte_level()))
    assert (len(found.ids), len(found.sizes)) == (0, 0)
    assert len(read_tokens("", source(tmp_path, None), token_ids=True).ids) == 0
    np.testing.assert_array_equal(read_tokens("", source(tmp_path, byte_level()), start_token="<s>").ids, [0])


def test_characters_have_the_bytes_of_utf_8() -> None:
    text = "\x7f\x80\u07ff\u0800\uffff\U00010000"
    assert byte_sizes(text, np.arange(1, 7)).tolist() == [len(c.encode()) for c in text] == [1, 2, 2, 3, 3, 4]
