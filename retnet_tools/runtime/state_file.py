"""Sequences as files: a prompt read once is kept in a file whose size does not depend on its length.

A state file is safetensors. Tensors, for B rows of a model of L layers:

    layers.{i}.recurrent_state  [B, H, K, V]  S after the last token (Eq. 6), in the states' type
    position                    [B]           int64, tokens so far
    logits                      [B, vocab]    float32, after the last token (hidden states [B, D] of a stack)
    seen                        [B, vocab]    bool, tokens of the row, for the repetition penalty ([B, 0] of a stack)

Its metadata holds `format`, `schema_version`, the `fingerprint` of the model (`Manifest.fingerprint`), `token_hashes`
(`retnet_tools.runtime.sequences.Sequences`), `sampling` (without steps of one's own) and
`streams` (the state of each row's random numbers).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.errors import InputError, RetNetToolsError, UsageError
from retnet_tools.formats.safetensors_files import open_safetensors, write_safetensors
from retnet_tools.formats.storage import StoredTensors, planned
from retnet_tools.graph.contract import MAX_POSITION, state_shape
from retnet_tools.inputs import parse_json
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.sampling import Sampler, Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.staging import staged_file
from retnet_tools.weights import Array, TensorInfo, is_floating

FORMAT = "retnet-tools state"
SCHEMA_VERSION = "1"
MAX_SETTING = 1 << 64


@dataclass(frozen=True)
class StateFile:
    """What a state file holds: the names and shapes above, with one of `states` for each layer."""

    states: tuple[Array, ...]
    position: Array
    logits: Array
    seen: Array
    fingerprint: dict[str, str]
    token_hashes: tuple[str, ...]
    sampling: Sampling
    streams: tuple[dict[str, Any], ...]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    def sequences(self, session: DecoderSession, changes: Mapping[str, Any] | None = None) -> Sequences:
        """The sequences, in a session of the model that made them.

        Args:
            changes: fields of the sampling to set; a new seed starts new streams, else the file's streams go on.

        Raises:
            InputError: another model, dtype, state dtype or quantization, by name.
            UsageError: a value out of range.
        """
        self.check(session)
        sampling = dataclasses.replace(self.sampling, **(changes or {}))
        sampler = Sampler.for_rows(sampling, range(self.batch), self.seen.shape[1])
        # Sequences write into their states and into what they have seen; the file's stay as they are.
        sampler.seen = self.seen.copy()
        if "seed" not in (changes or {}):
            sampler.streams = [np.random.Generator(_stream(state)) for state in self.streams]
        state = RecurrentState([layer.copy() for layer in self.states], self.position, session.device)
        return Sequences(session, state, self.logits, [bytes.fromhex(text) for text in self.token_hashes], sampler)

    def check(self, session: DecoderSession) -> None:
        """Check that a session runs the model that made the state, in the same types; says by name what differs."""
        for name, expected in session.manifest.fingerprint().items():
            if self.fingerprint.get(name) != expected:
                words = name.replace("_", " ")
                raise InputError(
                    f"a state of {words} {self.fingerprint.get(name)}",
                    f"{words} {expected}, as {session.folder} has",
                    "use the export that made the state, or make the state again",
                )
        config = session.manifest.config
        shapes, dtypes = {state.shape for state in self.states}, {state.dtype for state in self.states}
        if len(self.states) != config.num_layers or shapes != {(self.batch, *state_shape(config))}:
            raise InputError(
                f"{len(self.states)} states of {sorted(shapes)}",
                f"{config.num_layers} of {(self.batch, *state_shape(config))}, as {session.folder} has",
                "make the state again",
            )
        width = config.vocab_size or config.hidden_size
        if dtypes != {np.dtype(session.manifest.state_dtype)} or self.logits.shape[1] != width:
            raise InputError(
                f"states of {sorted(map(str, dtypes))} and logits {list(self.logits.shape)}",
                f"{session.manifest.state_dtype} and {[self.batch, width]}, as {session.folder} has",
                "make the state again",
            )

    def select(self, rows: list[int]) -> StateFile:
        """These rows, in this order; a row that comes several times is forked, as `Sampler.select` does.

        Raises:
            UsageError: a row that is not there, or none at all.
        """
        if not rows or not all(0 <= row < self.batch for row in rows):
            raise UsageError(f"rows {rows}", f"some of 0 to {self.batch - 1}, the rows of the state")
        index = np.array(rows)
        generators = [np.random.Generator(_stream(state)) for state in self.streams]
        sampler = Sampler(self.sampling, generators, self.seen).select(rows)
        return dataclasses.replace(
            self,
            states=tuple(state[index] for state in self.states),
            position=self.position[index],
            logits=self.logits[index],
            seen=sampler.seen,
            token_hashes=tuple(self.token_hashes[row] for row in rows),
            streams=tuple(_stream_state(stream) for stream in sampler.streams),
        )


def capture(sequences: Sequences) -> StateFile:
    """What a state file of these sequences holds, which must have tokens."""
    if sequences.logits is None:
        raise UsageError("a state without tokens", "at least one token in each row")
    return StateFile(
        states=tuple(sequences.state.numpy()),
        position=sequences.state.position.copy(),
        logits=sequences.logits,
        seen=sequences.sampler.seen.copy(),
        fingerprint=sequences.session.manifest.fingerprint(),
        token_hashes=tuple(digest.hex() for digest in sequences.token_hashes),
        sampling=sequences.sampler.sampling,
        streams=tuple(_stream_state(stream) for stream in sequences.sampler.streams),
    )


def write_state(path: Path, state: StateFile, *, force: bool = False) -> None:
    """Write a state file; it appears whole or not at all, and takes another one's place with `force` only.

    Raises:
        InputError: a state with NaN or infinities, by layer and head.
        UsageError, OutputError: as `retnet_tools.staging.staged_file`.
    """
    if (found := _not_finite(state)) is not None:
        raise InputError(found, "a state of finite numbers", "inspect the weights of the model that made it")
    tensors = {f"layers.{i}.recurrent_state": array for i, array in enumerate(state.states)}
    tensors |= {"position": state.position, "logits": state.logits, "seen": state.seen}
    metadata = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": json.dumps(state.fingerprint),
        "token_hashes": json.dumps(state.token_hashes),
        "sampling": json.dumps(state.sampling.settings()),
        "streams": json.dumps(state.streams),
    }
    with staged_file(path, force=force) as partial:
        write_safetensors(partial, [planned(name, array) for name, array in tensors.items()], metadata=metadata)


def read_state(path: Path) -> StateFile:
    """Read a state file.

    Raises:
        InputError: a file that is missing, corrupt, of another kind or version, or that contradicts itself.
    """
    if not path.is_file():
        raise InputError(f"no file {path}", "a state that `state save` or `generate --state-out` wrote")
    stored = open_safetensors(path)
    meta, layers = stored.metadata, sum(name.startswith("layers.") for name in stored.names())
    if meta.get("format") != FORMAT:
        raise InputError(f"{path} is no state (format {meta.get('format')!r})", "what `state save` wrote")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {meta.get('schema_version')}", SCHEMA_VERSION, "make the state again"
        )
    try:
        _check_shapes(stored, layers)
        state = StateFile(
            states=tuple(stored.read(f"layers.{i}.recurrent_state") for i in range(layers)),
            position=stored.read("position"),
            logits=stored.read("logits"),
            seen=stored.read("seen"),
            fingerprint=parse_json(meta["fingerprint"]),
            token_hashes=tuple(parse_json(meta["token_hashes"])),
            sampling=Sampling(**parse_json(meta["sampling"])),
            streams=tuple(parse_json(meta["streams"])),
        )
        _check(state)
    except InputError:
        raise
    except (RetNetToolsError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} is broken ({error})", "a whole state file", "make the state again") from error
    return state


def _check_shapes(stored: StoredTensors, layers: int) -> None:
    """Check the tensors against one another, before one is read: a ValueError says what does not fit."""
    states = [stored.info(f"layers.{i}.recurrent_state") for i in range(layers)]
    (batch,), (_, vocab), (_, seen) = (stored.info(name).shape for name in ("position", "logits", "seen"))
    expected = {
        "position": (np.int64, (batch,)),
        "logits": (np.float32, (batch, vocab)),
        # A stack without a vocabulary has hidden states for logits, and no tokens to see.
        "seen": (bool, (batch, vocab if seen else 0)),
    }
    for name, (dtype, shape) in expected.items():
        if (found := stored.info(name)) != TensorInfo(shape, np.dtype(dtype)):
            raise ValueError(f"{name} is {found.dtype} of {found.shape}")
    if others := sorted(set(stored.names()) - expected.keys() - {f"layers.{i}.recurrent_state" for i in range(layers)}):
        raise ValueError(f"the unknown tensor {others[0]!r}")
    if not batch or not states or any(len(s.shape) != 4 or s.shape[0] != batch for s in states):
        raise ValueError(f"states that do not have {batch} rows")
    if wrong := [state.dtype for state in states if not is_floating(state.dtype)]:
        raise ValueError(f"states of {wrong[0]}")


def _check(state: StateFile) -> None:
    """Check what a file says against itself: a ValueError says what does not fit."""
    batch = state.batch
    if not all(isinstance(value, str) for value in state.fingerprint.values()):
        raise ValueError("a fingerprint that is not text")
    if type(state.sampling.top_k) is not int or type(state.sampling.seed) is not int:
        raise ValueError("top_k or seed that is no whole number")
    for name, value in state.sampling.settings().items():
        if isinstance(value, bool) or state.sampling.steps or abs(value) > MAX_SETTING:
            raise ValueError(f"sampling.{name} {str(value)[:40]}")
    if state.position.min() < 1 or state.position.max() > MAX_POSITION + 1:
        raise ValueError(f"positions {state.position.tolist()}")
    if (found := _not_finite(state)) is not None:
        raise ValueError(found)
    if not len(state.token_hashes) == len(state.streams) == batch:
        raise ValueError(f"not {batch} token hashes and streams")
    for digest, stream in zip(state.token_hashes, state.streams, strict=True):
        if len(bytes.fromhex(digest)) != 32:
            raise ValueError("a token hash that is no sha256")
        _stream(stream)


def _not_finite(state: StateFile) -> str | None:
    """The first place of a state that holds NaN or infinities, in words."""
    for layer, array in enumerate(state.states):
        wrong = ~np.isfinite(array.astype(np.float32))
        if wrong.any():
            heads = np.flatnonzero(wrong.any(axis=(0, 2, 3)))
            named = f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
            return f"{np.count_nonzero(wrong)} NaN or infinite values in the state of layer {layer}, {named}"
    wrong = ~np.isfinite(state.logits)
    return f"{np.count_nonzero(wrong)} NaN or infinite logits" if wrong.any() else None


def _stream_state(stream: np.random.Generator) -> dict[str, Any]:
    return dict(stream.bit_generator.state)


def _stream(state: Any) -> np.random.PCG64:
    bits = np.random.PCG64(0)
    bits.state = state
    if bits.state != state:
        raise ValueError("a stream of random numbers that numpy does not make")
    return bits
