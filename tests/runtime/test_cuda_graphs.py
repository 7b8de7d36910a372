"""Steps as CUDA graphs: which runs are captured, which replayed, and into which buffers states move."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.paper import paper_config
from retnet_tools.runtime import DecoderSession, Device
from retnet_tools.runtime.cuda_graphs import EAGER_STEPS, FREE_PAIRS, StepGraphs
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, graph_bytes
from tests.exports import export
from tests.fake_gpu import COUNTS, FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, random_source

STEPS = (
    COUNTS
    + """
import json, sys
from pathlib import Path
import numpy as np
from retnet_tools.runtime import DecoderSession, Device
session = DecoderSession(Path(sys.argv[1]), Device("cuda"))

def steps(state, count):
    '''Captures and replays so far after each step.'''
    found = []
    for _ in range(count):
        session.step(np.zeros(state.batch, dtype=int), state)
        found.append(counts()[1:])
    return found
"""
)


class State:
    """A state whose buffers are numbers."""

    made = 0

    def __init__(self, batch: int = 1) -> None:
        State.made += 1
        self.batch, self.current, self.spare = batch, [f"current {State.made}"], [f"spare {State.made}"]
        self.moves: list[tuple[list[str], list[str]]] = []
        self.bindings: dict[object, object] = {}

    def move_into(self, current: list[str], spare: list[str]) -> None:
        self.moves.append((current, spare))
        self.current, self.spare = current, spare

    def advance(self) -> None:
        self.current, self.spare = self.spare, self.current


class Session:
    """Notes which graphs are released."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)


def step(graphs: StepGraphs, state: State) -> object:
    """The binding of one step, after which the buffers change places."""
    binding = graphs.binding(state, {"input_ids": np.zeros((state.batch, 1))})  # type: ignore[arg-type]
    state.advance()
    return binding


@pytest.fixture
def graphs() -> StepGraphs:
    """Bindings are `(past, present, graph id)`."""
    bind = lambda feeds, past, present, number: (past, present, number)  # noqa: E731
    return StepGraphs(Session(), bind)  # type: ignore[arg-type]


def test_the_first_steps_of_a_state_are_not_captured(graphs: StepGraphs) -> None:
    state = State()
    found = [step(graphs, state) for _ in range(EAGER_STEPS + 2)]
    assert found[:EAGER_STEPS] == [None] * EAGER_STEPS
    assert None not in found[EAGER_STEPS:]
    assert state.moves == []


def test_two_graphs_take_turns_between_two_sets_of_buffers(graphs: StepGraphs) -> None:
    state = State()
    for _ in range(EAGER_STEPS):
        step(graphs, state)
    a, b = state.current, state.spare
    found = [step(graphs, state) for _ in range(5)]
    assert found == [(a, b, 1), (b, a, 2), (a, b, 1), (b, a, 2), (a, b, 1)]


def test_a_prompt_in_between_leaves_the_graphs_where_they_are(graphs: StepGraphs) -> None:
    """Prefill swaps the same two sets; the next step reads whichever holds the state."""
    state = State()
    for _ in range(EAGER_STEPS):
        step(graphs, state)
    a, b = state.current, state.spare
    assert step(graphs, state) == (a, b, 1)
    state.advance()
    assert step(graphs, state) == (a, b, 1)


def test_no_two_states_share_a_graph(graphs: StepGraphs) -> None:
    states = [State(), State(), State(batch=2)]
    found = [step(graphs, state) for _ in range(EAGER_STEPS + 2) for state in states][len(states) * EAGER_STEPS :]
    assert sorted(number for _, _, number in found) == [1, 2, 3, 4, 5, 6]


def left_behind(graphs: StepGraphs) -> tuple[Any, Any]:
    """The two sets of buffers of a state that has had captured steps and is gone."""
    state = State()
    for _ in range(EAGER_STEPS + 2):
        step(graphs, state)
    return state.current, state.spare


def test_a_later_state_moves_into_the_buffers_of_one_that_is_gone(graphs: StepGraphs) -> None:
    sets = left_behind(graphs)
    other = State()
    # At once, and with the graphs that are there: no step runs kernel by kernel.
    assert step(graphs, other) == (*sets, 1)
    assert other.moves == [sets]
    assert step(graphs, other) == (*sets[::-1], 2)


def test_a_prompt_finds_the_buffers_of_a_state_that_is_gone(graphs: StepGraphs) -> None:
    sets = left_behind(graphs)
    other = State()
    graphs.settle(other)  # type: ignore[arg-type]
    assert (other.moves, other.current) == ([sets], sets[0])
    graphs.settle(other)  # type: ignore[arg-type]
    assert len(other.moves) == 1


def test_buffers_of_another_batch_size_are_given_back_with_the_first_step(graphs: StepGraphs) -> None:
    state = State()
    for _ in range(EAGER_STEPS + 2):
        step(graphs, state)
    del state
    gc.collect()
    wider = State(batch=2)
    assert step(graphs, wider) is None
    assert graphs._session.released == [1, 2]  # type: ignore[attr-defined]
    assert wider.moves == []


def test_nothing_of_a_closed_session_is_kept(graphs: StepGraphs) -> None:
    states = [State(), State(), State(batch=2)]
    states[0].bindings["a step"] = "of the session"
    for _ in range(EAGER_STEPS + 2):
        for state in states:
            step(graphs, state)
    held = [(state.current, state.spare) for state in states]
    del states[1], state
    gc.collect()
    graphs.close()
    assert states[0].bindings == {}
    assert [(state.current, state.spare) for state in states] == [held[0], held[2]]
    states.clear()
    gc.collect()
    assert graphs._free == {}


def test_buffers_beyond_what_is_kept_let_their_graphs_go(graphs: StepGraphs) -> None:
    states = [State() for _ in range(FREE_PAIRS + 2)]
    for state in states:
        for _ in range(EAGER_STEPS + 1):
            step(graphs, state)
    while states:
        states.pop()
    del state
    gc.collect()
    assert len(graphs._session.released) == 2 * 2  # type: ignore[attr-defined]


def test_buffers_of_another_batch_size_are_given_back_when_a_state_is_made(graphs: StepGraphs) -> None:
    for batch in (1, 2):
        state = State(batch)
        for _ in range(EAGER_STEPS + 2):
            step(graphs, state)
        del state
        gc.collect()
        graphs.keep_only(2)
    assert graphs._session.released == [1, 2]  # type: ignore[attr-defined]
    assert step(graphs, State(2))[2] == 3  # type: ignore[index]


def test_there_are_no_graphs_on_the_cpu_and_a_session_says_so(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    session = DecoderSession(out, Device("cpu"), 1, cuda_graph=True)
    assert session.eager_reason == "it runs on the CPU"
    with pytest.raises(UsageError, match="CUDA graphs of steps in place"):
        DecoderSession(out, Device("cpu"), 1, in_place=True, cuda_graph=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("graphs") / "out", device="cuda")


@needs_fake_gpu
def test_the_provider_captures_each_direction_once_and_replays_it(folder: Path) -> None:
    code = STEPS + f"print(json.dumps([session.eager_reason, steps(session.new_state(3), {EAGER_STEPS + 5})]))"
    reason, found = FakeGpu().evaluate(code, folder)
    assert reason is None
    assert found[:EAGER_STEPS] == [[0, 0]] * EAGER_STEPS
    # A capture is replayed at once.
    assert found[EAGER_STEPS:] == [[1, 1], [2, 2], [2, 3], [2, 4], [2, 5]]


@needs_fake_gpu
def test_a_capture_runs_the_step_three_times_so_states_in_place_would_be_wrong(folder: Path) -> None:
    """What rules out states in place: if this ever changes, they may be allowed."""
    code = (
        STEPS
        + """
state, kernels = session.new_state(), []
for _ in range(COUNT):
    before = counts()[0]
    session.step(np.zeros(1, dtype=int), state)
    kernels.append(counts()[0] - before)
print(json.dumps(kernels))
""".replace("COUNT", str(EAGER_STEPS + 2))
    )
    kernels = FakeGpu().evaluate(code, folder)
    once = kernels[0]
    assert kernels[:EAGER_STEPS] == [once] * EAGER_STEPS
    # Twice to settle its memory; the third is the replay, whose kernels are not launched one by one.
    assert kernels[EAGER_STEPS:] == [2 * once, 2 * once]


@needs_fake_gpu
def test_later_states_of_a_batch_size_capture_nothing(folder: Path) -> None:
    code = (
        STEPS
        + """
import gc
found = []
for _ in range(3):
    state = session.new_state(2)
    found.append(steps(state, 8)[-1])
    del state
    gc.collect()
print(json.dumps(found))
"""
    )
    captures = [row[0] for row in FakeGpu().evaluate(code, folder)]
    assert captures == [2, 2, 2]


@needs_fake_gpu
def test_a_profile_and_states_in_place_run_kernel_by_kernel(folder: Path, tmp_path: Path) -> None:
    code = (
        STEPS
        + f"""
reasons = [session.eager_reason]
for options in ({{"in_place": True}}, {{"cuda_graph": False}}, {{"profile": Path({str(tmp_path)!r}) / "profile"}}):
    session = DecoderSession(Path(sys.argv[1]), Device("cuda"), **options)
    steps(session.new_state(), EAGER + 3)
    reasons.append(session.eager_reason)
print(json.dumps([reasons, counts()[1:]]))
""".replace("EAGER", str(EAGER_STEPS))
    )
    reasons, counts = FakeGpu().evaluate(code, folder)
    assert reasons == [None, "states are written in place", "it was asked for", "a profile is taken"]
    assert counts == [0, 0]


@needs_fake_gpu
def test_a_graph_that_cannot_be_captured_runs_kernel_by_kernel_with_the_reason(tmp_path: Path) -> None:
    """decoder.onnx has branches."""
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", device="cuda")
    code = """
import json, sys
from pathlib import Path
from dataclasses import replace
from retnet_tools.graph.contract import DECODER_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime import opening
from retnet_tools.runtime.providers import CUDA, PROVIDERS, Device
manifest = read_manifest(Path(sys.argv[1]))
PROVIDERS["cuda"] = replace(CUDA, step_file=DECODER_FILE)
opener = opening.GraphOpener(Path(sys.argv[1]), manifest, Device("cuda"), None, None)
session = opener.open_step()
print(json.dumps([session.get_providers()[0], opener.eager_reason]))
"""
    provider, reason = FakeGpu().evaluate(code, out)
    assert provider == "CUDAExecutionProvider"
    assert "control flow nodes" in reason


@needs_fake_gpu
def test_states_are_copied_on_the_device_and_swapped_with_their_logits(folder: Path) -> None:
    """Kernels do nothing here, so that what is in a buffer is what was put there."""
    code = (
        STEPS
        + """
from retnet_tools.runtime.recurrent_state import RecurrentState
shape = (3, *session.new_state().current[0].shape[1:])
arrays = [np.arange(np.prod(shape), dtype="f4").reshape(shape) + 1000 * i for i in range(2)]
state = RecurrentState(arrays, np.array([5, 6, 7]), session.device)
chosen = state.select([2, 0, 2, 1])
ok = all((new == old[[2, 0, 2, 1]]).all() for new, old in zip(chosen.numpy(), arrays))
empty = session.new_state(2)
zero = all((layer == 0).all() for layer in empty.numpy())
print(json.dumps([bool(ok), bool(zero), chosen.position.tolist(), chosen.batch]))
"""
    )
    assert FakeGpu().evaluate(code, folder) == [True, True, [7, 5, 7, 6], 4]


LIVE = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np
from retnet_tools.graph.contract import state_shape
from retnet_tools.runtime import DecoderSession, Device, RecurrentState
from retnet_tools.runtime.cuda import CudaRuntime
from retnet_tools.runtime.device_memory import state_bytes
live = {}
allocate, release = CudaRuntime.allocate, CudaRuntime.release
def counted(self, size):
    address = allocate(self, size)
    live[address] = size
    return address
CudaRuntime.allocate = counted
CudaRuntime.release = lambda self, address: (live.pop(address), release(self, address))
session = DecoderSession(Path(sys.argv[1]), Device("cuda"))

def placed(batch):
    '''A state that no one told the session of, as from a file.'''
    shape, layers = (batch, *state_shape(session.manifest.config)), range(session.manifest.config.num_layers)
    return RecurrentState([np.zeros(shape, dtype="f4") for _ in layers], np.zeros(batch), session.device)

def sets(batch):
    '''Sets of state buffers of a batch that there are, with what little else there is.'''
    gc.collect()
    return sum(live.values()) / state_bytes(session.manifest, batch, buffers=1)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of 0.5 MB a sequence, beside which tokens and logits are nothing."""
    config = paper_config(vocab_size=61, hidden_size=256, value_dim=512, ffn_dim=32, num_layers=2, num_heads=2)
    return export(config, random_source(config, 1), tmp_path_factory.mktemp("wide") / "out", device="cuda")


@needs_fake_gpu
def test_states_of_many_batch_sizes_never_have_more_than_two_sets(wide: Path) -> None:
    code = (
        LIVE
        + """
found = []
for batch in (32, 8, 64, 64, 1, 32):
    state = None
    gc.collect()
    state = placed(batch)
    for feed in ("prompt", "step", "step", "step"):
        if feed == "prompt":
            session.prefill(np.zeros((batch, 4), dtype=int), state)
        else:
            session.step(np.zeros(batch, dtype=int), state)
        found.append(sets(batch))
    if batch == 64:
        # The next one is as large, and finds free buffers.
        continue
    chosen = state.select(range(max(1, batch // 2)))
    state = None
    for _ in range(3):
        session.step(np.zeros(chosen.batch, dtype=int), chosen)
        found.append(sets(chosen.batch))
    chosen = None
print(json.dumps(found))
"""
    )
    found = FakeGpu(memory_bytes=4 << 30).evaluate(code, wide)
    assert max(found) < 2.1, found


FAILURE = """
import gc, json, sys
from pathlib import Path
import numpy as np
from retnet_tools.runtime import DecoderSession, Device, RecurrentState
from retnet_tools.runtime.cuda import cuda_runtime
session = DecoderSession(Path(sys.argv[1]), Device("cuda"))
shape = (2, *session.new_state().current[0].shape[1:])
rng, layers = np.random.default_rng(0), range(session.manifest.config.num_layers)
arrays = [[rng.standard_normal(shape, dtype="f4") for _ in layers] for _ in range(2)]
states = [RecurrentState([a.copy() for a in own], np.array([5, 6]), session.device) for own in arrays]
for state in states:
    logits = session.step(np.zeros(2, dtype=int), state)
# Kernels do nothing: a step leaves what is in the buffer that it would write. This is what the next one reads.
for state, own in zip(states, arrays):
    for buffer, array in zip(state.current, own):
        buffer.write(array)
read = lambda state: [buffer.read() for buffer in state.spare]
for state in states:
    logits = session.step(np.zeros(2, dtype=int), state)
intact = [all((a == b).all() for a, b in zip(read(state), own)) for state, own in zip(states, arrays)]
steps = [session.step(np.zeros(2, dtype=int), state).shape for state in states for _ in range(3)]
gc.collect()
print(json.dumps([intact, [s.position.tolist() for s in states], session.eager_reason, len(steps)]))
"""


@needs_fake_gpu
@pytest.mark.parametrize(("setting", "code"), [("CAPTURE", 900), ("CAPTURE", 901), ("INSTANTIATE", 2)])
def test_a_capture_that_fails_falls_back_to_kernel_by_kernel_with_the_states_as_they_were(
    setting: str, code: int, folder: Path
) -> None:
    gpu = FakeGpu(environment={f"FAKE_CUDA_{setting}": str(code)})
    result = gpu.run(FAILURE, folder)
    intact, positions, reason, steps = json.loads(result.stdout)
    assert intact == [True, True]
    assert positions == [[10, 11], [10, 11]]
    assert reason.startswith("a step could not be captured (")
    assert steps == 6
    assert result.stderr.count("no CUDA graphs, steps run kernel by kernel: a step could not be captured") == 1


@needs_fake_gpu
def test_the_session_that_failed_is_gone_before_the_next_one_is_opened(tmp_path: Path) -> None:
    """There is room for the weights once, and not twice."""
    config = paper_config(vocab_size=40_000, hidden_size=512, value_dim=512, ffn_dim=32, num_layers=1, num_heads=2)
    out = export(config, random_source(config, 1), tmp_path / "out", device="cuda")
    weights = graph_bytes(out / STEP_FILE)
    memory = LIBRARY_BYTES + weights * 3 // 2
    result = FakeGpu(memory_bytes=memory, environment={"FAKE_CUDA_CAPTURE": "901"}).run(FAILURE, out)
    assert json.loads(result.stdout)[2].startswith("a step could not be captured (")


@needs_fake_gpu
def test_a_command_says_that_there_are_no_graphs_and_goes_on(folder: Path) -> None:
    gpu = FakeGpu(environment={"FAKE_CUDA_INSTANTIATE": "2"})
    command = ("generate", folder, "-p", "3 4", "-n", "5", "--token-ids", "--device", "cuda")
    result = gpu.run("-m retnet_tools.cli.app", *command)
    assert len(result.stdout.split()) == 5
    assert result.stderr.count("warning: no CUDA graphs, steps run kernel by kernel: a step could not be") == 1
    quiet = gpu.run("-m retnet_tools.cli.app", *command, "--no-cuda-graph")
    assert (len(quiet.stdout.split()), "warning" in quiet.stderr) == (5, False)


MIXED = (
    STEPS
    + """
import gc
from retnet_tools.runtime import generate
found = []
one, eight = session.new_state(), session.new_state(8)
found.append(steps(one, 4)[-1])
found.append(steps(eight, 4)[-1])
session.prefill(np.zeros((8, 5), dtype=int), eight)
session.prefill(np.zeros((3, 7), dtype=int), session.new_state(3))
found.append(steps(one, 2)[-1])
found.append(steps(eight, 2)[-1])
rows = generate(session, [[1, 2]] * 8, max_tokens=9).rows
print(json.dumps([found, [len(row.tokens) for row in rows]]))
"""
)


@needs_fake_gpu
def test_graphs_of_several_batch_sizes_are_kept_apart(tmp_path: Path) -> None:
    config = ABLATIONS["projection_bias"]
    out = export(config, random_source(config, 1), tmp_path / "out", device="cuda")
    found, lengths = FakeGpu().evaluate(MIXED, out)
    # Each size is captured in both directions, and a prompt in between captures nothing.
    assert [captures for captures, _ in found] == [2, 4, 4, 4]
    assert [replays for _, replays in found] == [3, 6, 8, 10]
    assert lengths == [9] * 8
