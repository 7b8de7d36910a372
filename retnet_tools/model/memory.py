"""Whether a comparison of forms fits into memory, estimated before anything is loaded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import partial

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError
from retnet_tools.machine import available_memory
from retnet_tools.model.retention import RetentionForm, retention_parallel

SCORE_BUFFERS = 3
_FLOAT64 = 8


def check_memory(config: RetNetConfig, rows: int, tokens: int, forms: Mapping[str, RetentionForm]) -> None:
    """Refuse more tokens than the memory that is available can hold; do nothing where that is not known.

    Raises:
        UsageError: too many, with the number that fits.
    """
    available = available_memory()
    if available is None or estimated_memory(config, rows, tokens, forms) <= available:
        return

    def needed(count: int) -> int:
        return estimated_memory(config, rows, count, forms)

    parallel = retention_parallel in forms.values()
    fitting = bisect_right(range(1, tokens + 1), available, key=needed)
    raise UsageError(
        f"{tokens} tokens need about {needed(tokens) / 1e9:.1f} GB for scores and logits, and {available / 1e9:.1f} GB "
        "are available",
        f"at most {fitting} tokens",
        "take fewer, or leave the parallel form out" if parallel else "take fewer, or smaller chunks",
    )


def estimated_memory(config: RetNetConfig, rows: int, tokens: int, forms: Mapping[str, RetentionForm]) -> int:
    """Bytes of a float64 run of all forms on `rows` x `tokens`, parameters aside.

    Scores, [rows, H, L, L] three times over (before and after decay, and their absolute values), L being all tokens
    for the parallel form and a chunk's for the chunkwise one; and the logits and hidden states that are kept of each
    form.
    """
    length = max(_score_length(form, tokens) for form in forms.values())
    scores = SCORE_BUFFERS * rows * config.num_heads * length**2
    width = config.vocab_size + (config.num_layers + 1) * config.hidden_size
    return _FLOAT64 * (scores + len(forms) * rows * tokens * width)


def _score_length(form: RetentionForm, tokens: int) -> int:
    if isinstance(form, partial):
        return min(tokens, int(form.keywords.get("chunk_size", tokens)))
    return tokens if form is retention_parallel else 0
