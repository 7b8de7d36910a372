import pytest

from retnet_tools.dtypes import parse_dtype
from retnet_tools.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name"),
    [("fp16", "float16"), ("f16", "float16"), ("BF16", "bfloat16"), ("float32", "float32"), (" fp64 ", "float64")],
)
def test_known_words_name_a_float_type(text, name):
    assert parse_dtype(text) == name


def test_an_unknown_word_gets_the_nearest_one():
    with pytest.raises(UsageError, match=r"'bfp16'; expected one of fp16, bf16, fp32, fp64; did you mean"):
        parse_dtype("bfp16")


def test_a_type_that_is_not_allowed_here_is_refused():
    with pytest.raises(UsageError, match=r"'fp64'; expected one of fp16, fp32;"):
        parse_dtype("fp64", ("float16", "float32"))
