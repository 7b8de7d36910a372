"""Reads a pickle without running anything that it names: a machine for the opcodes of protocols 0 to 5.

What globals, calls and objects become is told in `stand_ins`. The memo and the stack grow with the file alone, no
operation copies what is there already, and nothing is hashed but names and numbers, so that a small hostile file costs
little time and memory.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from retnet_tools.errors import InputError
from retnet_tools.formats.content import short_name
from retnet_tools.formats.stand_ins import Global, Shell, UnsafeGlobalError, call, is_tensor, look_up, new_object

INT32, UINT8, UINT16, UINT32, UINT64 = map(struct.Struct, ("<i", "<B", "<H", "<I", "<Q"))
FLOAT64 = struct.Struct(">d")
MAX_LINE = 1 << 20
MAX_INTEGER_BYTES = 1 << 10
MAX_MEMO_INDEX = 1 << 28
MAX_OPERATIONS = 1 << 21
SIMPLE_KEYS = (str, int, float, bool, bytes, type(None), Shell, Global)


def unpickle(file: IO[bytes], path: Path, find_storage: Callable[[Any], Any] | None = None) -> Any:
    """The tree that a pickle describes, of plain values and stand-ins; the file is left just after it.

    Args:
        file: at the first byte of the pickle.
        path: for messages.
        find_storage: what a persistent id stands for; None refuses them.

    Raises:
        InputError: a global that could only be meant to run, or a corrupt pickle.
    """
    machine = _Machine(file, find_storage)
    collects = gc.isenabled()
    gc.disable()  # nothing is let go while the tree grows: looking for garbage would take a third of the time
    try:
        return machine.run()
    except UnsafeGlobalError as error:
        found = f"refused pickle global {str(error)[:80]!r} in {short_name(path)}"
        action = "load it where you trust it and save model.state_dict()"
        raise InputError(found, "tensors and plain data only", action) from error
    except InputError:
        raise
    except Exception as error:  # a corrupt pickle can raise anything
        raise corrupt(path, f"{type(error).__name__}: {str(error)[:80]}") from error
    finally:
        if collects:
            gc.enable()


def corrupt(path: Path, why: str) -> InputError:
    """The error for a file that torch.save did not write so."""
    found = f"{short_name(path)} ({path.stat().st_size} bytes) is truncated, corrupt or no torch file ({why})"
    return InputError(found, "a file of torch.save", "fetch it again")


class _Machine:
    def __init__(self, file: IO[bytes], find_storage: Callable[[Any], Any] | None) -> None:
        self.read, self._readline, self._find_storage = file.read, file.readline, find_storage
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}
        start = file.tell()
        self._left = file.seek(0, 2) - start
        file.seek(start)

    def run(self) -> Any:
        read, operations = self.read, OPERATIONS
        for _ in range(MAX_OPERATIONS):
            opcode = read(1)
            if opcode == b".":
                return self.stack.pop()
            if not opcode:
                raise EOFError("it ends before its last operation")
            operations[opcode](self)
        raise ValueError(f"more than {MAX_OPERATIONS} operations")

    def take(self, count: int) -> bytes:
        data = self.read(count) if 0 <= count <= self._left else b""
        if len(data) != count:
            raise EOFError("data past its end")
        return data

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.read(layout.size))[0]

    def line(self) -> bytes:
        text = self._readline(MAX_LINE)
        if text[-1:] != b"\n":
            raise EOFError("a line past its end")
        return text[:-1]

    def name(self) -> str:
        return self.line().decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def put(self, index: int) -> None:
        if not 0 <= index <= MAX_MEMO_INDEX:
            raise ValueError(f"memo index {index}")
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without a name")
        if (module, name) not in self._globals:
            self._globals[module, name] = look_up(module, name)
        return self._globals[module, name]

    def persistent(self) -> None:
        if self._find_storage is None:
            raise ValueError("a storage where there is none")
        self.stack[-1] = self._find_storage(self.stack[-1])

    def make(self, how: Callable[[Any, Any], Any]) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = how(self.stack[-1], arguments)

    def new_with_names(self) -> None:
        self.stack.pop()
        self.make(new_object)

    def object(self) -> None:
        kind, *arguments = self.pop_mark()
        self.push(new_object(kind, tuple(arguments)))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Shell):
            target.build(state)
        # A dict has no attributes here (torch's `_metadata`), and a tensor's say nothing about its values.
        elif not isinstance(target, dict) and not is_tensor(target):
            raise ValueError(f"a state for {type(target).__name__}")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Shell):
            target = target.elements
        if not isinstance(target, list):
            raise ValueError(f"items for {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Shell):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"entries for {type(target).__name__}")
        count, more = len(target), _pairs(items)
        target.update(more)
        if len(target) < count + len(more):
            raise ValueError("a name twice")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn, as a dict; nested tuples take exponential time to hash: each is a key of its own."""
    names = [name if isinstance(name, SIMPLE_KEYS) else Shell("key") for name in items[::2]]
    made = dict(zip(names, items[1::2], strict=True))
    if len(made) < len(names):
        raise ValueError("a name twice")
    return made


def _integer(text: str) -> Any:
    if text in ("00", "01"):
        return text == "01"
    if len(text) > MAX_INTEGER_BYTES:
        raise ValueError("an integer of many digits")
    return int(text.rstrip("L") or "0")


def _long(data: bytes) -> Any:
    return int.from_bytes(data, "little", signed=True) if len(data) <= MAX_INTEGER_BYTES else Shell("int")


def _text(data: bytes) -> str | bytes:
    """A string of Python 2, which may be bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _quoted(line: bytes) -> str | bytes:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    return _text(line[1:-1].decode("unicode_escape").encode("latin1"))


def _unicode(data: bytes) -> str:
    """Text in UTF-8, halves of pairs allowed, as pickle does."""
    return data.decode("utf-8", "surrogatepass")


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _put_byte(machine: _Machine) -> None:
    machine.memo[machine.read(1)[0]] = machine.stack[-1]


def _pair(machine: _Machine) -> None:
    second = machine.stack.pop()
    machine.stack[-1] = machine.stack[-1], second


def _sized(layout: struct.Struct, made: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """The operation that pushes what data of a size makes, the size before it."""
    return lambda m: m.push(made(m.take(m.number(layout))))


# Those that pickles are made of almost wholly have no call of a method inside: they decide how long reading takes.
OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # protocol
    b"\x95": lambda m: m.take(8),  # frame
    b"(": _Machine.mark,
    b"0": lambda m: m.stack.pop() if m.stack else m.pop_mark(),
    b"1": _Machine.pop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.name())),
    b"L": lambda m: m.push(_integer(m.name())),
    b"J": lambda m: m.push(m.number(INT32)),
    b"K": lambda m: m.stack.append(m.read(1)[0]),
    b"M": lambda m: m.stack.append(m.number(UINT16)),
    b"\x8a": _sized(UINT8, _long),
    b"\x8b": _sized(INT32, _long),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(m.number(FLOAT64)),
    b"S": lambda m: m.push(_quoted(m.line())),
    b"T": _sized(UINT32, _text),
    b"U": _sized(UINT8, _text),
    b"B": _sized(UINT32, bytes),
    b"C": _sized(UINT8, bytes),
    b"\x8e": _sized(UINT64, bytes),
    b"\x96": _sized(UINT64, bytes),
    b"V": lambda m: m.push(m.line().decode("raw_unicode_escape")),
    b"X": _sized(UINT32, _unicode),
    b"\x8c": lambda m: m.stack.append(_unicode(m.take(m.read(1)[0]))),
    b"\x8d": _sized(UINT64, _unicode),
    b")": lambda m: m.stack.append(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": _pair,
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"a": lambda m: m.append(m.last(1)),
    b"e": lambda m: m.append(m.pop_mark()),
    b"}": lambda m: m.stack.append({}),
    b"d": lambda m: m.push(_pairs(m.pop_mark())),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.pop_mark()),
    # A set is a list here: nothing in it is hashed.
    b"\x8f": lambda m: m.push([]),
    b"\x90": lambda m: m.append(m.pop_mark()),
    b"\x91": lambda m: m.push(m.pop_mark()),
    b"p": lambda m: m.put(int(m.line()[:20])),
    b"q": _put_byte,
    b"r": lambda m: m.put(m.number(UINT32)),
    b"\x94": _memoize,
    b"g": lambda m: m.push(m.memo[int(m.line()[:20])]),
    b"h": lambda m: m.stack.append(m.memo[m.read(1)[0]]),
    b"j": lambda m: m.stack.append(m.memo[int.from_bytes(m.read(4), "little")]),
    b"c": lambda m: m.push(m.find(m.name(), m.name())),
    b"\x93": lambda m: m.push(m.find(*m.last(2))),
    b"i": lambda m: m.push(new_object(m.find(m.name(), m.name()), tuple(m.pop_mark()))),
    b"o": _Machine.object,
    b"R": lambda m: m.make(call),
    b"\x81": lambda m: m.make(new_object),
    b"\x92": _Machine.new_with_names,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
