"""The decoder of the Python API: text in, pieces of text out, and nothing left when it is closed."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from retnet_tools.errors import UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.runtime import Sampling, decoder, generate, open_decoder
from retnet_tools.runtime.decoder import Decoder
from retnet_tools.runtime.sampling import SamplingFields
from retnet_tools.runtime.session import DecoderSession
from tests.exports import export
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import BASE, random_source

CHECKPOINT = Path(__file__).parents[2] / "ckpt"

ALONE = """
import sys
for name in ("torch", "onnx_ir", "sympy"):
    sys.modules[name] = None
from pathlib import Path
from retnet_tools.runtime import open_decoder
from retnet_tools.runtime.bulk import BulkOptions, generate_bulk
from retnet_tools.runtime.decode import Stopping, generate_from
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.state_file import capture, read_state, write_state
folder, place = Path(sys.argv[1]), Path(sys.argv[2])
with open_decoder(folder, threads=1) as decoder:
    print(repr("".join(decoder.stream("ROMEO. ", max_tokens=5, temperature=0.8, top_k=9))))
    sequences = Sequences.start(decoder.session, 1, Sampling(1.0))
    kept = generate_from(sequences, [[1, 2, 3]], Stopping(3), keep=True).sequences
    write_state(place / "state", capture(kept))
    read_state(place / "state").sequences(decoder.session).sample()
    (place / "prompts").write_text('{"tokens": [1, 2]}')
    options = BulkOptions(Stopping(2), Sampling())
    print(generate_bulk(decoder.session, decoder.codec, place / "prompts", place / "answers", options).written)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with its tokenizer."""
    checkpoint = open_checkpoint(CHECKPOINT)
    out = export(checkpoint.config, checkpoint.weights, tmp_path_factory.mktemp("decoder") / "out")
    for file in checkpoint.tokenizer_files:
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.fixture(scope="module")
def opened(folder: Path) -> Decoder:
    return open_decoder(folder, threads=1)


def test_the_examples_of_the_documentation_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    failed, tried = doctest.testmod(decoder)
    assert tried > 5
    assert failed == 0


def test_running_an_export_takes_neither_torch_nor_onnx_ir(folder: Path, opened: Decoder, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, folder, tmp_path]
    result = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = "".join(opened.stream("ROMEO. ", max_tokens=5, temperature=0.8, top_k=9))
    assert result.stdout.splitlines() == [repr(text), "1"]


def test_a_stream_is_what_generate_gives(opened: Decoder) -> None:
    sampling = {"temperature": 0.8, "seed": 3, "top_k": 50, "repetition_penalty": 1.1}
    pieces = list(opened.stream("ROMEO. ", max_tokens=20, **sampling))
    tokens = [opened.codec.encode("ROMEO. ")]
    row = generate(opened.session, tokens, max_tokens=20, sampling=Sampling(**sampling), codec=opened.codec).rows[0]
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == row.text == opened.generate("ROMEO. ", max_tokens=20, **sampling).rows[0].text


def test_a_stream_stops_before_a_stop_string(opened: Decoder) -> None:
    text = "".join(opened.stream("ROMEO. ", max_tokens=40))
    stop = text[len(text) // 2 :][:5]
    assert "".join(opened.stream("ROMEO. ", max_tokens=40, stop=stop)) == text[: text.index(stop)]


def test_a_text_ends_at_the_models_end_of_text(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = opened.generate("ROMEO. ", max_tokens=20).rows[0].tokens
    end = tokens.index(tokens[7])
    monkeypatch.setattr(opened.codec, "end_ids", frozenset({tokens[7]}))
    row = opened.generate("ROMEO. ", max_tokens=20).rows[0]
    assert (row.tokens, row.stop_reason) == (tokens[:end], "end-of-text")
    assert "".join(opened.stream("ROMEO. ", max_tokens=20)) == row.text


def test_a_token_is_computed_when_it_is_asked_for(opened: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, step, prefill = [], DecoderSession.step, DecoderSession.prefill
    monkeypatch.setattr(DecoderSession, "step", lambda *a, **k: ran.append("step") or step(*a, **k))
    monkeypatch.setattr(DecoderSession, "prefill", lambda *a, **k: ran.append("prompt") or prefill(*a, **k))
    stream = opened.stream("ROMEO. To be", max_tokens=100)
    assert ran == []
    next(stream)
    assert ran[0] == "prompt"
    steps = len(ran)
    next(stream)
    assert len(ran) > steps
    steps = len(ran)
    stream.close()
    assert len(ran) == steps


def test_prompts_are_expected_unless_it_is_said_that_none_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the graphs then share their weights, for which both must have room."""
    given, init = [], DecoderSession.__init__
    monkeypatch.setattr(DecoderSession, "__init__", lambda *a, **k: given.append(k) or init(*a, **k))
    open_decoder(folder).close()
    open_decoder(folder, prompts=False, cuda_graph=False).close()
    assert given == [{"cuda_graph": None, "prompts": True}, {"cuda_graph": False, "prompts": False}]


def test_wrong_input_is_refused_before_anything_runs(opened: Decoder) -> None:
    with pytest.raises(UsageError, match="an empty prompt"):
        opened.stream("")
    with pytest.raises(UsageError, match="--max-tokens 0"):
        opened.stream("a", max_tokens=0)
    with pytest.raises(UsageError, match="--temperature -1"):
        opened.stream("a", temperature=-1)
    with pytest.raises(UsageError, match="--samples 0"):
        opened.generate("a", samples=0)


@pytest.mark.parametrize(
    "options",
    [{name: "a"} for name in ("max_tokens", *SamplingFields.__annotations__) if name != "steps"],
    ids=lambda options: next(iter(options)),
)
def test_what_is_no_number_is_refused_by_name(opened: Decoder, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 'a'"):
        opened.stream("ROMEO. ", **options)


@pytest.mark.parametrize("prompt", [5, None, ["ROMEO. "], [1, 2, 3]], ids=str)
def test_what_is_no_text_is_refused_by_its_type(opened: Decoder, prompt: Any) -> None:
    with pytest.raises(UsageError, match=f"a prompt that is {type(prompt).__name__}"):
        opened.stream(prompt)
    with pytest.raises(UsageError, match="a prompt that is"):
        opened.generate([prompt])


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_that_cannot_be_are_refused(folder: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads {threads}; expected at least 1"):
        open_decoder(folder, threads=threads)


def test_token_ids_are_read_and_written_where_they_are_asked_for(folder: Path) -> None:
    with open_decoder(folder, threads=1, token_ids=True) as ids:
        assert all(word.isdecimal() for word in "".join(ids.stream("4 5 6", max_tokens=4)).split())


def test_a_closed_session_runs_nothing(folder: Path) -> None:
    with open_decoder(folder, threads=1) as decoder:
        state = decoder.session.new_state()
        decoder.session.step([3], state)
        stream = decoder.stream("ROMEO. ", max_tokens=40)
        next(stream)
    assert decoder.session.closed
    session = decoder.session
    calls = (lambda: session.step([3], state), lambda: session.prefill([[3, 4]], state), lambda: next(stream))
    for run in (session.new_state, session.open_prefill, *calls):
        with pytest.raises(UsageError, match=r"the session of .* is closed"):
            run()
    assert (state.position.tolist(), len(state.numpy())) == ([1], session.manifest.config.num_layers)
    decoder.close()


GONE = """
import gc, json, sys, weakref
from pathlib import Path
from typing import Any
import numpy as np
from retnet_tools.runtime import DecoderSession, Device, Sequences, Stopping, generate_from
gc.collect()
gc.disable()

def used(session):
    '''References to all that holds memory of a GPU.'''
    state = session.new_state(2)
    session.prefill(np.zeros((2, 5), dtype=int), state)
    for _ in range(5):
        session.step(np.zeros(2, dtype=int), state)
    generate_from(Sequences.start(session), [[3, 4]], Stopping(6), keep=True)
    held = [session, session._step, session._decoder]
    return state, [weakref.ref(value) for value in held]

found = []
for closed in (False, True):
    session = DecoderSession(Path(sys.argv[1]), Device(sys.argv[2]), prompts=True)
    state, references = used(session)
    if closed:
        # States may outlive a session that is closed; what is bound to them may not.
        session.close()
        found.append([reference() is None for reference in references[1:]])
    else:
        del state
    del session
    found.append([reference() is None for reference in references])
print(json.dumps(found))
"""


@pytest.mark.parametrize("environment", [{}, {"FAKE_CUDA_CAPTURE": "901"}])
@needs_fake_gpu
def test_no_cycle_keeps_a_session_alive_on_a_gpu(environment: dict[str, str], tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", device="cuda")
    assert FakeGpu(environment=environment).evaluate(GONE, out, "cuda") == [[True] * 3, [True] * 2, [True] * 3]


def test_no_cycle_keeps_a_session_alive_on_the_cpu(tmp_path: Path) -> None:
    session = DecoderSession(export(BASE, random_source(BASE, 1), tmp_path / "out"), threads=1)
    state = session.new_state()
    session.prefill([[3, 4, 5]], state)
    references = [weakref.ref(value) for value in (session, session._step, session._decoder)]
    gc.disable()
    try:
        del session, state
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
