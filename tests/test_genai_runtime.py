"""onnxruntime-genai on the trained fixture: the tokens that our own runtime gives, alone, in ragged batches, and going
on; its tokenizer against the tokenizers library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retnet_tools.formats import open_checkpoint
from retnet_tools.graph import contract
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.runtime.decode import generate
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.tokenizing.files import load_tokenizer
from retnet_tools.weights import Array
from tests.tolerances import GRAPH_FLOAT32

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai-cuda is not installed (Linux and Windows only)")

FIXTURE = Path(__file__).parent.parent / "fixtures" / "shakespeare"
TOKENIZER = load_tokenizer(FIXTURE / "tokenizer.json")
TEXT = (FIXTURE / "heldout.txt").read_text(encoding="utf-8")
CONFIG = open_checkpoint(FIXTURE).config
PADDING = contract.padding_id(CONFIG)
END, VOCAB = 0, CONFIG.vocab_size
ONE_THREAD = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}'

PROMPTS: list[list[int]] = [
    TOKENIZER.encode("ROMEO. ").ids,
    TOKENIZER.encode("HAMLET.\nTo be, or not to be").ids,
    TOKENIZER.encode(TEXT[30_000:31_200]).ids,
    [END],
    TOKENIZER.encode("Enter the KING, with").ids,
    [*TOKENIZER.encode(TEXT[60_000:60_500]).ids, END],
]
"""From one token to more than two chunks; two of them end with the token that ends a text."""


def export(folder: Path, target: str, ops: str, dtype: str) -> Path:
    plan = plan_export(open_checkpoint(FIXTURE), dtype=dtype, ops=ops, target=target)
    write_export(plan, folder / target, force=False, progress=lambda count: None)
    return folder / target


def open_genai(folder: Path) -> Any:
    config = og.Config(str(folder))
    config.overlay(ONE_THREAD)
    return og.Model(config)


class Pair:
    """The fixture in both runtimes."""

    def __init__(self, folder: Path, ops: str = "fused", dtype: str = "float32") -> None:
        self.folder = export(folder, "genai", ops, dtype)
        self.model = open_genai(self.folder)
        self.session = DecoderSession(export(folder, "onnx", ops, dtype), threads=1)

    def ours(self, prompt: Sequence[int], count: int) -> list[int]:
        return list(generate(self.session, [prompt], max_tokens=count).rows[0].tokens)

    def our_logits(self, prompt: Sequence[int]) -> Array:
        return self.session.prefill([list(prompt)], self.session.new_state())[0]


def generator(model: Any, batch: int, length: int, **options: Any) -> Any:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, batch_size=batch, **options)
    return og.Generator(model, parameters)


def padded(prompts: Sequence[Sequence[int]]) -> Array:
    rows = np.full((len(prompts), max(map(len, prompts))), PADDING, dtype=np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def run(model: Any, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[list[int]]:
    """Greedy tokens of each row."""
    ids = padded(prompts)
    length = ids.shape[1]
    running = generator(model, len(prompts), length + count, **options)
    running.append_tokens(ids if len(prompts) > 1 else ids[0])
    while not running.is_done():
        running.generate_next_token()
    return [[int(token) for token in running.get_sequence(i)[length:]] for i in range(len(prompts))]


def logits(running: Any) -> Array:
    return np.array(running.get_logits())[:, 0, :VOCAB]


@pytest.fixture(scope="module", params=OPERATOR_SETS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("genai"), request.param)


def without_end(tokens: Sequence[int]) -> list[int]:
    """What precedes the token that ends a text: our runtime is not told about it here, and goes on."""
    return list(tokens[: tokens.index(END)] if END in tokens else tokens)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_of_one_prompt_are_ours(prompt: list[int], pair: Pair) -> None:
    (found,) = run(pair.model, [prompt], 80)
    assert without_end(found) == without_end(pair.ours(prompt, 80))
    assert len(without_end(found)) > 20


def test_greedy_tokens_of_a_ragged_batch_are_ours(pair: Pair) -> None:
    found = run(pair.model, PROMPTS, 80)
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert without_end(row) == without_end(pair.ours(prompt, 80))


def test_logits_of_a_ragged_batch_are_ours_at_every_step(pair: Pair) -> None:
    ids = padded(PROMPTS)
    running = generator(pair.model, len(PROMPTS), ids.shape[1] + 8)
    running.append_tokens(ids)
    sequences = [list(prompt) for prompt in PROMPTS]
    for _ in range(8):
        found = logits(running)
        for row, sequence in zip(found, sequences, strict=True):
            np.testing.assert_allclose(row, pair.our_logits(sequence), rtol=0, atol=GRAPH_FLOAT32)
        running.generate_next_token()
        for i, sequence in enumerate(sequences):
            sequence.append(int(running.get_sequence(i)[-1]))


def test_positions_are_each_rows_own(pair: Pair) -> None:
    ids = padded(PROMPTS)
    running = generator(pair.model, len(PROMPTS), ids.shape[1] + 4)
    running.append_tokens(ids)
    running.get_logits()
    for step in range(3):
        running.generate_next_token()
        running.get_logits()
        found = np.array(running.get_input(contract.POSITION_IDS)).ravel().tolist()
        assert found == [len(prompt) + step for prompt in PROMPTS]


@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_float16_gives_the_tokens_of_our_float16_graphs(ops: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, ops, "float16")
    found = run(pair.model, PROMPTS[:3], 40)
    for row, prompt in zip(found, PROMPTS, strict=False):
        assert without_end(row) == without_end(pair.ours(prompt, 40))
        assert run(pair.model, [prompt], 40) == [row]


def test_a_conversation_goes_on_from_where_it_stands(pair: Pair) -> None:
    running = generator(pair.model, 1, 1000)
    running.append_tokens(PROMPTS[0])
    for turn in (PROMPTS[1], PROMPTS[2], PROMPTS[3], PROMPTS[4]):
        for _ in range(5):
            running.generate_next_token()
        running.get_logits()
        running.append_tokens(turn)
        sequence = [int(token) for token in running.get_sequence(0)]
        np.testing.assert_allclose(logits(running)[0], pair.our_logits(sequence), rtol=0, atol=GRAPH_FLOAT32)
    for _ in range(30):
        running.generate_next_token()
    assert [int(token) for token in running.get_sequence(0)[len(sequence) :]] == pair.ours(sequence, 30)


def test_a_prompt_in_pieces_is_the_prompt(pair: Pair) -> None:
    whole = [token for prompt in PROMPTS for token in prompt]
    running = generator(pair.model, 1, len(whole) + 20)
    for prompt in PROMPTS:
        running.append_tokens(prompt)
    np.testing.assert_allclose(logits(running)[0], pair.our_logits(whole), rtol=0, atol=GRAPH_FLOAT32)
    assert run(pair.model, [whole], 20, chunk_size=50) == run(pair.model, [whole], 20)


def test_a_codeword_in_one_row_shows_in_no_other(pair: Pair) -> None:
    planted = [list(prompt) for prompt in PROMPTS]
    planted[2][10:14] = [(token + 700) % VOCAB for token in planted[2][10:14]]
    results = []
    for prompts in (PROMPTS, planted):
        ids = padded(prompts)
        running = generator(pair.model, len(prompts), ids.shape[1] + 6)
        running.append_tokens(ids)
        steps = []
        for _ in range(5):
            steps.append(logits(running).copy())
            running.generate_next_token()
        results.append(np.stack(steps, 1))
    others = [i for i in range(len(PROMPTS)) if i != 2]
    np.testing.assert_array_equal(results[0][others], results[1][others])
    assert (results[0][2] != results[1][2]).any()


def test_a_row_that_ends_leaves_the_others_alone(pair: Pair, tmp_path: Path) -> None:
    folder = shutil.copytree(pair.folder, tmp_path / "out")
    file = folder / contract.GENAI_CONFIG_FILE
    document = json.loads(file.read_text())
    expected = [pair.ours(prompt, 40) for prompt in PROMPTS]
    (end,) = {expected[0][4]} - {expected[0][i] for i in range(4)}
    document["model"]["eos_token_id"] = end
    file.write_text(json.dumps(document))
    for row, tokens in zip(run(open_genai(folder), PROMPTS, 40), expected, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert row == (tokens[:stop] + [PADDING] * 40)[: len(row)]
    assert expected[0].index(end) == 4


def test_padding_is_not_a_repeated_token(pair: Pair) -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    together = run(pair.model, PROMPTS, 40, **options)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = without_end(run(pair.model, [prompt], 40, **options)[0])
        assert row[: len(alone)] == alone


@pytest.mark.parametrize(
    "options", [{"top_k": 50}, {"top_k": 0, "top_p": 0.95}, {"top_k": 40, "top_p": 0.9}, {"temperature": 3.0}]
)
def test_the_padding_token_is_never_drawn(options: dict[str, Any], pair: Pair) -> None:
    for seed in range(5):
        (tokens,) = run(pair.model, [PROMPTS[1]], 60, do_sample=True, random_seed=seed, **options)
        assert max(tokens) < VOCAB


def test_rewinding_needs_a_snapshot_and_then_is_exact(pair: Pair) -> None:
    running = generator(pair.model, 1, 400)
    running.append_tokens(PROMPTS[1])
    running.snapshot_state()
    for _ in range(5):
        running.generate_next_token()
    running.rewind_to(len(PROMPTS[1]))
    running.append_tokens(PROMPTS[0])
    expected = pair.our_logits([*PROMPTS[1], *PROMPTS[0]])
    np.testing.assert_allclose(logits(running)[0], expected, rtol=0, atol=GRAPH_FLOAT32)
    running.rewind_to(0)
    running.append_tokens(PROMPTS[0])
    np.testing.assert_allclose(logits(running)[0], pair.our_logits(PROMPTS[0]), rtol=0, atol=GRAPH_FLOAT32)
    with pytest.raises(RuntimeError, match="without a snapshot"):
        running.rewind_to(2)


def test_its_tokenizer_is_that_of_the_tokenizers_library(pair: Pair) -> None:
    tokenizer = og.Tokenizer(pair.model)
    ids = TOKENIZER.encode(TEXT).ids
    assert [int(token) for token in tokenizer.encode(TEXT)] == ids
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.pad_token_id, list(tokenizer.eos_token_ids), tokenizer.bos_token_id) == (PADDING, [END], END)
    batch = np.array(tokenizer.encode_batch(["ROMEO. ", "HAMLET.\nTo be, or not to be"]).as_numpy())
    np.testing.assert_array_equal(batch, padded(PROMPTS[:2]))
    assert tokenizer.decode([*PROMPTS[0], PADDING, PADDING]) == "ROMEO. "


def test_token_ids_run_without_a_tokenizer(pair: Pair, tmp_path: Path) -> None:
    folder = shutil.copytree(pair.folder, tmp_path / "out", ignore=shutil.ignore_patterns("tokenizer*"))
    assert run(open_genai(folder), PROMPTS[:2], 20) == run(pair.model, PROMPTS[:2], 20)


def test_the_context_length_is_the_last_position_of_the_graph(pair: Pair) -> None:
    generator(pair.model, 1, contract.MAX_POSITION + 1)
    with pytest.raises(RuntimeError, match="context_length"):
        generator(pair.model, 1, contract.MAX_POSITION + 2)
