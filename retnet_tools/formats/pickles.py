"""Reads a pickle without running anything that it names: a machine for the opcodes of protocols 0 to 5.

What globals, calls and objects become is told in `stand_ins`. The memo and the stack grow with the file alone, no
operation copies what is there already, and nothing is hashed but names and numbers, so that a small hostile file costs
little time and memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from retnet_tools.errors import InputError
from retnet_tools.formats.stand_ins import Global, Shell, UnsafeGlobalError, call, is_tensor, look_up, new_object

MAX_LINE = 1 << 20
MAX_MEMO_INDEX = 1 << 28
MAX_INTEGER_BYTES = 1 << 10
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
    try:
        return machine.run()
    except UnsafeGlobalError as error:
        raise InputError(
            f"refused pickle global {str(error)[:80]!r} in {path.name}",
            "tensors and plain data only",
            "load it where you trust it and save model.state_dict()",
        ) from error
    except InputError:
        raise
    except Exception as error:  # a corrupt pickle can raise anything
        raise corrupt(path, f"{type(error).__name__}: {str(error)[:80]}") from error


def corrupt(path: Path, why: str) -> InputError:
    """The error for a file that torch.save did not write so."""
    size = path.stat().st_size
    return InputError(
        f"{path} ({size} bytes) is truncated, corrupt or no torch file ({why})",
        "a file of torch.save",
        "fetch it again",
    )


def attributes(value: Any) -> dict[str, Any] | None:
    """The entries of a mapping; None for anything else."""
    return dict(value) if isinstance(value, Mapping) else None


class _Machine:
    def __init__(self, file: IO[bytes], find_storage: Callable[[Any], Any] | None) -> None:
        self._file, self._find_storage = file, find_storage
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}
        start = file.tell()
        self._left = file.seek(0, 2) - start
        file.seek(start)

    def run(self) -> Any:
        read, handlers = self._file.read, OPERATIONS
        while (opcode := read(1)) != b".":
            if not opcode:
                raise EOFError("it ends before its last operation")
            handlers[opcode](self)
        return self._stack.pop()

    # Arguments in the file.

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise EOFError("data past its end")
        data = self._file.read(count)
        if len(data) != count:
            raise EOFError("data past its end")
        return data

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        text = self._file.readline(MAX_LINE)
        if text[-1:] != b"\n":
            raise EOFError("a line past its end")
        return text[:-1]

    def name(self) -> str:
        return self.line().decode("utf-8")

    # The stack.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def pop_or_mark(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark()

    def top(self) -> Any:
        return self._stack[-1]

    def put(self, index: int) -> None:
        if not 0 <= index <= MAX_MEMO_INDEX:
            raise ValueError(f"memo index {index}")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    # Objects.

    def find(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without a name")
        key = (module, name)
        if key not in self._globals:
            self._globals[key] = look_up(module, name)
        return self._globals[key]

    def persistent(self) -> None:
        if self._find_storage is None:
            raise ValueError("a storage where there is none")
        self.push(self._find_storage(self.pop()))

    def reduce(self) -> None:
        arguments = self.pop()
        self._stack[-1] = call(self._stack[-1], arguments)

    def new(self, named: bool) -> None:
        if named:
            self.pop()
        arguments = self.pop()
        self._stack[-1] = new_object(self._stack[-1], arguments)

    def instance(self) -> None:
        kind = self.find(self.name(), self.name())
        self.push(new_object(kind, tuple(self.pop_mark())))

    def object(self) -> None:
        kind, *arguments = self.pop_mark()
        self.push(new_object(kind, tuple(arguments)))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Shell):
            target.build(state)
        # A dict has no attributes here (torch's `_metadata`), and a tensor's say nothing about its values.
        elif not isinstance(target, dict) and not is_tensor(target):
            raise ValueError(f"a state for {type(target).__name__}")

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Shell):
            target = target.elements
        if not isinstance(target, list):
            raise ValueError(f"items for {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Shell):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"entries for {type(target).__name__}")
        target.update(_pairs(items))

    def last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("an empty stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(items[i]): items[i + 1] for i in range(0, len(items) - 1, 2)}


def _key(value: Any) -> Any:
    """A key that is cheap to hash: nested tuples take exponential time, so that they become keys of their own."""
    if isinstance(value, tuple) and not isinstance(value, Global):
        flat = all(isinstance(part, str | int | float | bool | None) for part in value)
        return value if flat else Shell("key")
    return value if isinstance(value, SIMPLE_KEYS) else Shell("key")


def _integer(text: str) -> Any:
    if text in ("00", "01"):
        return text == "01"
    if len(text) > MAX_INTEGER_BYTES:
        raise ValueError("an integer of many digits")
    return int(text.rstrip("L") or "0")


def _long(machine: _Machine, count: int) -> Any:
    data = machine.take(count) if count >= 0 else b""
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
    return data.decode("utf-8", "surrogatepass")


def _stack_global(machine: _Machine) -> None:
    module, name = machine.last(2)
    machine.push(machine.find(module, name))


def _refuse(machine: _Machine) -> None:
    raise ValueError("an operation that torch.save does not write")


_Operation = Callable[[_Machine], Any]
OPERATIONS: dict[bytes, _Operation] = {
    b"\x80": lambda m: m.take(1),  # protocol
    b"\x95": lambda m: m.take(8),  # frame
    b"(": _Machine.mark,
    b"0": _Machine.pop_or_mark,
    b"1": _Machine.pop_mark,
    b"2": lambda m: m.push(m.top()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.name())),
    b"L": lambda m: m.push(_integer(m.name())),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(_long(m, m.number("<B"))),
    b"\x8b": lambda m: m.push(_long(m, m.number("<i"))),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(m.number(">d")),
    b"S": lambda m: m.push(_quoted(m.line())),
    b"T": lambda m: m.push(_text(m.take(m.number("<I")))),
    b"U": lambda m: m.push(_text(m.take(m.number("<B")))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.take(m.number("<Q"))),
    b"V": lambda m: m.push(m.line().decode("raw_unicode_escape")),
    b"X": lambda m: m.push(_unicode(m.take(m.number("<I")))),
    b"\x8c": lambda m: m.push(_unicode(m.take(m.number("<B")))),
    b"\x8d": lambda m: m.push(_unicode(m.take(m.number("<Q")))),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": lambda m: m.push(tuple(m.last(2))),
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"a": lambda m: m.append(m.last(1)),
    b"e": lambda m: m.append(m.pop_mark()),
    b"}": lambda m: m.push({}),
    b"d": lambda m: m.push(_pairs(m.pop_mark())),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.pop_mark()),
    # A set is a list here: nothing in it is hashed.
    b"\x8f": lambda m: m.push([]),
    b"\x90": lambda m: m.append(m.pop_mark()),
    b"\x91": lambda m: m.push(m.pop_mark()),
    b"p": lambda m: m.put(int(m.line()[:20])),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"g": lambda m: m.get(int(m.line()[:20])),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"c": lambda m: m.push(m.find(m.name(), m.name())),
    b"\x93": _stack_global,
    b"i": _Machine.instance,
    b"o": _Machine.object,
    b"R": _Machine.reduce,
    b"\x81": lambda m: m.new(named=False),
    b"\x92": lambda m: m.new(named=True),
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    **dict.fromkeys((b"P", b"\x82", b"\x83", b"\x84", b"\x97", b"\x98"), _refuse),
}
