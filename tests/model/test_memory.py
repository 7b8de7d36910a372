from functools import partial

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.model import runs
from retnet_tools.model.agreement import compare_forms, select_forms
from retnet_tools.model.retention import FORMS, retention_chunkwise
from retnet_tools.model.runs import check_run_memory, estimated_memory
from tests.helpers import BASE, random_source

PARALLEL = select_forms(["parallel", "recurrent"], chunk_size=48)
CHUNKS = select_forms(["chunkwise", "recurrent"], chunk_size=10)


def test_scores_of_the_parallel_form_grow_with_the_square_of_the_tokens():
    scores = 3 * 2 * BASE.num_heads * 1000**2 * 8
    kept = 2 * 2 * 1000 * (61 + 3 * 32) * 8
    assert estimated_memory(BASE, 2, 1000, PARALLEL) == scores + kept
    assert estimated_memory(BASE, 2, 1000, CHUNKS) == scores // 100**2 + kept
    whole = {"recurrent": FORMS["recurrent"], "chunkwise": partial(retention_chunkwise, chunk_size=5000)}
    assert estimated_memory(BASE, 2, 1000, whole) == scores + kept


def test_more_tokens_than_fit_are_refused_with_the_number_that_fits(monkeypatch):
    monkeypatch.setattr(runs, "available_memory", lambda: estimated_memory(BASE, 2, 700, PARALLEL))
    check_run_memory(BASE, 2, 700, PARALLEL)
    with pytest.raises(UsageError, match=r"701 tokens need .* at most 700 tokens; .* leave the parallel form out"):
        check_run_memory(BASE, 2, 701, PARALLEL)
    with pytest.raises(UsageError, match="at most 700 tokens"):
        check_run_memory(BASE, 2, 10**9, PARALLEL)
    check_run_memory(BASE, 2, 701, CHUNKS)


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(runs, "available_memory", lambda: None)
    check_run_memory(BASE, 2, 10**9, PARALLEL)


def test_a_comparison_that_cannot_fit_allocates_nothing():
    ids = np.broadcast_to(np.zeros((), dtype=np.int64), (2, 10_000_000))
    with pytest.raises(UsageError, match="10000000 tokens need"):
        compare_forms(BASE, random_source(BASE, 1), ids, dict(FORMS))
