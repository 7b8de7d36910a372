from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from retnet_tools.errors import InputError, UsageError
from retnet_tools.tokenizing.token_ids import choose_tokens, random_tokens
from tests.helpers import BASE


def model_of(vocab_size):
    return replace(BASE, vocab_size=vocab_size)


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_random_tokens_depend_on_the_seed_alone_and_cover_the_vocabulary():
    first, again, other = (random_tokens(5, 2, 200, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert sorted(set(first.flatten().tolist())) == [0, 1, 2, 3, 4]


def test_a_text_is_encoded_and_cut(tokenizer_file):
    chosen = choose_tokens(model_of(3), [tokenizer_file], "to be or", length=10, seed=0)
    assert chosen.ids.tolist() == [[1, 2, 0]]
    assert choose_tokens(model_of(3), [tokenizer_file], "to be or", length=2, seed=0).ids.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("vocab_size", "text", "length", "message"),
    [(3, "", 10, "without tokens"), (2, "to be", 10, r"token 'be' \(id 2\) .* 0 to 1"), (3, None, 0, "0 tokens")],
)
def test_tokens_that_cannot_be_run_are_refused(tokenizer_file, vocab_size, text, length, message):
    with pytest.raises(UsageError, match=message):
        choose_tokens(model_of(vocab_size), [tokenizer_file], text, length=length, seed=0)


def test_a_text_needs_a_tokenizer_that_can_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        choose_tokens(model_of(3), [], "to be", length=10, seed=0)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        choose_tokens(model_of(3), [broken], "to be", length=10, seed=0)
