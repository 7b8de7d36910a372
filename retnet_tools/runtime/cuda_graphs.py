"""Steps as CUDA graphs: captured once for each pair of state buffers, replayed with one launch from then on.

A step reads one set of buffers and writes the other, and the next one goes back: two graphs, which ONNX Runtime tells
apart by `gpu_graph_id`. Tokens, positions and logits have buffers of their own in each.

To capture a graph, ONNX Runtime runs it three times within one call (twice to settle its memory, once to replay).
With two sets of buffers that changes nothing: each run reads the same states. In place it would be three steps, so
states are never written where they are read here.

A captured graph may stay until its session ends, in CUDA's memory too. So buffers outlive their state: a state moves
into a free pair of its batch size before it is first used, and gives it back when it goes. One free pair is kept, and
only until a state of another batch size is used: then the states that are alive have two sets each, and no one else has
any.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retnet_tools.runtime.buffers import Binding, Buffer
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

EAGER_STEPS = 1
"""Steps of a state that run kernel by kernel first: the last token of a prompt is often the only one."""
FREE_PAIRS = 1
"""Pairs of a batch size that are kept for later states."""

Buffers = list[Buffer]
Bind = Callable[[Mapping[str, Array], Buffers, Buffers, int], Binding]


@dataclass(eq=False)
class _Pair:
    """Two sets of state buffers, the steps from each to the other, and what gives them back when their state goes."""

    sets: tuple[Buffers, Buffers]
    ids: tuple[int, int]
    bindings: dict[int, Binding] = field(default_factory=dict)
    finalizer: Any = None


class StepGraphs:
    """The captured steps of a session.

    Args:
        session: opened with CUDA graphs.
        bind: binds a step to its feeds, the states that it reads, those that it writes, and a graph id.
    """

    def __init__(self, session: onnxruntime.InferenceSession, bind: Bind) -> None:
        self._session, self._bind = session, bind
        self._ids = itertools.count(1)
        self._pairs: weakref.WeakKeyDictionary[RecurrentState, _Pair] = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[RecurrentState, int] = weakref.WeakKeyDictionary()
        self._free: dict[int, list[_Pair]] = {}

    def binding(self, state: RecurrentState, feeds: Mapping[str, Array]) -> Binding | None:
        """The captured step of a state as it stands; None for first steps, which are not worth a capture.

        Moves the state into buffers of this object where it is not in them yet.
        """
        self.settle(state)
        if state not in self._pairs:
            self._steps[state] = self._steps.get(state, 0) + 1
            if self._steps[state] <= EAGER_STEPS:
                return None
            self._adopt(state)
        pair = self._pairs[state]
        front = 0 if state.current is pair.sets[0] else 1
        if front not in pair.bindings:
            past, present = pair.sets[front], pair.sets[1 - front]
            pair.bindings[front] = self._bind(feeds, past, present, pair.ids[front])
        return pair.bindings[front]

    def settle(self, state: RecurrentState) -> None:
        """Move a state into free buffers of its batch size, where there are some; those of other sizes are given back.

        To be called before anything needs the state's spare buffers.
        """
        if state not in self._pairs:
            self.keep_only(state.batch)
            if self._free.get(state.batch):
                self._adopt(state)

    def keep_only(self, batch: int) -> None:
        """Give back the free buffers of other batch sizes, whose memory a new state may need."""
        for other in [size for size in self._free if size != batch]:
            for pair in self._free.pop(other):
                self._release(pair)

    def close(self) -> None:
        """Let go of the session: of every graph, and of every step that a state was bound to.

        States keep the buffers that they are in.
        """
        for state in self._steps:
            state.bindings.clear()
        for pair in self._pairs.values():
            # What refers to it until its state is gone.
            pair.finalizer.detach()
        self._pairs.clear()
        self._free.clear()

    def _adopt(self, state: RecurrentState) -> None:
        free = self._free.setdefault(state.batch, [])
        if free:
            pair = free.pop()
            state.move_into(*pair.sets)
        else:
            # Its own buffers become the pair.
            pair = _Pair((state.current, state.spare), (next(self._ids), next(self._ids)))
        self._pairs[state] = pair
        pair.finalizer = weakref.finalize(state, _give_back, weakref.ref(self), pair, state.batch)
        pair.finalizer.atexit = False

    def _release(self, pair: _Pair) -> None:
        """Drop a pair; its graphs are never replayed again, whether the provider lets them go or not."""
        for number in pair.ids:
            self._session.release_captured_graph(number)


def _give_back(reference: weakref.ref[StepGraphs], pair: _Pair, batch: int) -> None:
    """Take the buffers of a state that is gone, where the steps of its session are still there."""
    if (graphs := reference()) is None:
        return
    free = graphs._free.setdefault(batch, [])
    if len(free) < FREE_PAIRS:
        free.append(pair)
    else:
        graphs._release(pair)
