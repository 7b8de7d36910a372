"""Hostile files of torch.save: zips, the older format, and the pickles in them. Pickles that name what can run are in
`test_pickles`."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.hostile.changes import HUGE, LONG, edited, in_place_of, replaced
from tests.hostile.judge import Case
from tests.hostile.material import rezipped, torch_bytes, torch_tree

FILE = "model.pt"
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def zip_cases() -> Iterator[Case]:
    def case(name: str, change: Callable[[bytes], bytes], says: str = FILE) -> Case:
        return Case("zip", name, edited(FILE, change), says)

    def zipped(name: str, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> Case:
        return case(name, lambda data: rezipped(data, change, method))

    def entry(entries: dict[str, bytes], name: str) -> str:
        return next(key for key in entries if key.endswith(name))

    places: dict[str, Callable[[bytes], int]] = {
        "at 0": lambda data: 0,
        "inside a signature": lambda data: 3,
        "inside the first header": lambda data: 20,
        "inside the pickle": lambda data: 200,
        "after the pickle": lambda data: data.index(_LOCAL, 4),
        "inside the tensors": lambda data: len(data) // 2,
        "before the directory": lambda data: data.index(_CENTRAL),
        "inside the directory": lambda data: data.index(_CENTRAL) + 60,
        "before the end record": lambda data: data.rindex(_END),
        "inside the end record": lambda data: data.rindex(_END) + 10,
        "before the last byte": lambda data: len(data) - 1,
    }
    for name, place in places.items():
        yield case(f"cut {name}", lambda data, place=place: data[: place(data)])

    def patched(signature: bytes, offset: int, value: bytes, *, last: bool = True) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            data = rezipped(data, void)  # without the records of zip64
            at = (data.rindex if last else data.index)(signature) + offset
            return data[:at] + value + data[at + len(value) :]

        return change

    for name, change in {
        "a directory of 4 GB": patched(_END, 12, b"\xf0" * 4),
        "a directory at 4 GB": patched(_END, 16, b"\xf0" * 4),
        "no entries, it says, and no directory": patched(_END, 8, bytes(12)),
        "the last entry at 4 GB": patched(_CENTRAL, 42, b"\xf0\xff\xff\xff"),
        "the last entry over the first": patched(_CENTRAL, 42, bytes(4)),
        "the last entry of 4 GB": patched(_CENTRAL, 20, b"\xf0\xff\xff\xff" * 2),
        "an encrypted entry": patched(_CENTRAL, 8, b"\x01\x08", last=False),
        "a long local name": patched(_LOCAL, 26, b"\xff\xff", last=False),
        "no local header": patched(_LOCAL, 0, b"PK\x09\x09", last=False),
        "an unknown compression": patched(_CENTRAL, 10, b"\x63\x00", last=False),
    }.items():
        yield case(name, change)

    def deflated(name: str, content: bytes) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            buffer = io.BytesIO(data)
            with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"archive/{name}", content)
            return buffer.getvalue()

        return change

    def without(name: str) -> Callable[[dict[str, bytes]], None]:
        return lambda entries: void(entries.pop(entry(entries, name)))

    yield zipped("everything deflated", void, zipfile.ZIP_DEFLATED)
    yield zipped("everything in bzip2", void, zipfile.ZIP_BZIP2)
    bomb = deflated("data.pkl", bytes(64 << 20))
    yield case("a pickle of 64 MB of zeros, deflated", lambda data: bomb(rezipped(data, without("data.pkl"))))
    yield case("a second pickle", deflated("data.pkl", b"N."))
    yield case("a storage twice", deflated("data/0", bytes(224)))
    yield zipped("two folders", lambda entries: entries.update({"other/data.pkl": b"N."}))
    yield zipped("a folder in a folder", lambda e: rename(e, "a/b/"))
    yield zipped("no pickle", without("data.pkl"))
    yield zipped("no storage", without("data/3"))
    yield zipped("a short storage", lambda e: e.update({entry(e, "data/0"): bytes(220)}))
    yield zipped("a long storage", lambda e: e.update({entry(e, "data/0"): bytes(228)}))
    yield zipped("big-endian", lambda e: e.update({entry(e, "byteorder"): b"big"}))
    yield zipped("a byte order of a megabyte", lambda e: e.update({entry(e, "byteorder"): b"x" * (1 << 20)}))
    yield zipped("TorchScript", lambda e: e.update({entry(e, "data.pkl").replace("data", "constants"): b"N."}))
    yield zipped("a hundred thousand entries", lambda e: e.update({f"archive/x/{i:060}": b"" for i in range(100_000)}))
    yield from in_place_of("zip", FILE)
    for name, pickled in PICKLES.items():
        change = edited(FILE, lambda data, p=pickled: rezipped(data, lambda e: e.update({entry(e, "data.pkl"): p})))
        # A tensor that is no weight is refused by the layout, which it does not fit.
        yield Case("zip", f"the pickle {name}", change, "" if name == "of integers" else FILE)


def rename(entries: dict[str, bytes], root: str) -> None:
    found = {root + name.partition("/")[2]: content for name, content in entries.items()}
    entries.clear()
    entries.update(found)


def void(_: object) -> None:
    """For what changes nothing else."""


def integer(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(numel: int = 56, kind: bytes = b"FloatStorage", key: bytes = b"0") -> bytes:
    key = b"X" + struct.pack("<I", len(key)) + key
    return b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + key + b"X\x03\x00\x00\x00cpu" + integer(numel) + b"t"


def state_dict(value: bytes, name: bytes = b"embed_tokens.weight") -> bytes:
    """A pickle of a dict with one entry."""
    return b"\x80\x02}X" + struct.pack("<I", len(name)) + name + value + b"s."


def view(*parts: bytes, of: bytes | None = None) -> bytes:
    """A pickle of a tensor: offset, shape and strides, of a storage."""
    base = (storage() if of is None else of) + b"Q"
    return state_dict(b"ctorch._utils\n_rebuild_tensor_v2\n(" + base + b"".join(parts) + b"\x89}tR")


_TEXT = b"X\x01\x00\x00\x00a"
PICKLES: dict[str, bytes] = {
    "empty": b"",
    "of None": b"\x80\x02N.",
    "of a number": b"\x80\x02K\x01.",
    "of a list": b"\x80\x02].",
    "of an empty dict": b"\x80\x02}.",
    "without an end": b"\x80\x02}",
    "that only stops": b".",
    "of an unknown operation": b"\x80\x02\xff.",
    "of a protocol to come": b"\x80",
    "of endless lists": b"]" * (5 << 20),
    "of endless dicts": b"}" * (5 << 20),
    "of endless marks": b"(" * (5 << 20),
    "of an endless memo": b"N" + b"\x94" * (5 << 20),
    "of endless objects": b"ca\nB\nq\x00)q\x01" + b"h\x00h\x01\x81" * (2 << 20),
    "of lists in lists": b"\x80\x02" + b"(" * 500_000 + b"l" * 500_000 + b".",
    "of a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffa",
    "of a text of 2^63": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
    "of bytes of 2^64": b"\x80\x04\x8e" + b"\xff" * 8,
    "of a frame of 2^64, cut": b"\x80\x04\x95" + b"\xff" * 8 + b"\x8e",
    "of a negative integer's size": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "of an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "of 5000 digits": b"L" + LONG.encode() + b"L\n.",
    "of a line of 2 MB": b"V" + b"a" * (2 << 20) + b"\n.",
    "of a huge memo index": b"Nr\xff\xff\xff\xff.",
    "of a memo index of 20 digits": b"Np99999999999999999999\n.",
    "of a memo never made": b"h\x77.",
    "of a float that is none": b"Fabc\n.",
    "of invalid UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "of a persistent id that is none": b"\x80\x02NQ.",
    "of a persistent text": b"P1\n.",
    "of an extension": b"\x82\x01.",
    "of a key that takes 2^200 steps": b"}" + b")q\x01" + b"0h\x01h\x01\x86q\x01" * 200 + b"Ns.",
    "of a name twice": b"\x80\x02}(" + _TEXT + b"K\x01" + _TEXT + b"K\x02u.",
    "of a name again": b"\x80\x02}" + _TEXT + b"K\x01s" + _TEXT + b"K\x02s.",
    "of a negative offset": view(integer(-1), numbers(7, 8), numbers(8, 1)),
    "of an offset of 2^62": view(integer(HUGE), numbers(7, 8), numbers(8, 1)),
    "of an offset past its storage": view(integer(1), numbers(7, 8), numbers(8, 1)),
    "of a negative size": view(integer(0), numbers(-7, 8), numbers(8, 1)),
    "of a size of 2^62": view(integer(0), numbers(HUGE, 8), numbers(8, 1)),
    "of sizes whose product is 2^64": view(integer(0), numbers(1 << 32, 1 << 32), numbers(1, 1)),
    "of an expanded tensor of a gigabyte": view(integer(0), numbers(1 << 28), numbers(0)),
    "of a negative stride": view(integer(0), numbers(7, 8), numbers(-8, 1)),
    "of a stride of 2^62": view(integer(0), numbers(7, 8), numbers(HUGE, 1)),
    "of strides past its storage": view(integer(0), numbers(7, 8), numbers(16, 1)),
    "of too few strides": view(integer(0), numbers(7, 8), numbers(8)),
    "of 65 dimensions": view(integer(0), numbers(*[1] * 65), numbers(*[1] * 65)),
    "of a size that is true": view(integer(0), b"(\x88K\x08t", numbers(8, 1)),
    "of a size that is a float": view(integer(0), b"(G@\x1c\x00\x00\x00\x00\x00\x00K\x08t", numbers(8, 1)),
    "of a size that is a list": view(integer(0), b"]", numbers(8, 1)),
    "of a storage of 2^62": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(HUGE)),
    "of a storage of 2^100": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(1 << 100)),
    "of a negative storage": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(-56)),
    "of a storage of another type": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(56, b"DoubleStorage")),
    "of an unknown storage": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(56, b"NoStorage")),
    "of a storage '../0'": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(56, key=b"../0")),
    "of a storage without a key": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(56, key=b"")),
    "of integers": view(integer(0), numbers(7, 8), numbers(8, 1), of=storage(56, b"IntStorage")),
    "of complex numbers": view(integer(0), numbers(7, 4), numbers(4, 1), of=storage(28, b"ComplexFloatStorage")),
    "of a quantized tensor": state_dict(b"ctorch._utils\n_rebuild_qtensor\n)R"),
    "of a tensor of nothing": state_dict(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "of a tensor of a number": state_dict(b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01\x89}tR"),
    "of torch.load": state_dict(b"ctorch.storage\n_load_from_bytes\n(C\x01xtR"),
    "of a call of a number": state_dict(b"K\x01)R"),
    "of a state for a number": state_dict(b"K\x01}b"),
    "of entries of a number": b"\x80\x02K\x01K\x01K\x01s.",
}


def legacy_cases() -> Iterator[Case]:
    def case(name: str, change: Callable[[bytes], bytes]) -> Case:
        return Case("legacy", name, edited(FILE, change), FILE)

    def starts(data: bytes) -> list[int]:
        """Where each pickle begins, and the storages."""
        import pickle

        class Reader(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return None

            def find_class(self, module: str, name: str) -> Any:
                return dict if name == "OrderedDict" else lambda *_: None

        file, found = io.BytesIO(data), [0]
        for _ in range(5):
            Reader(file).load()
            found.append(file.tell())
        return found

    def big_endian(data: bytes) -> bytes:
        at = data.index(b"\x88", data.index(b"little_endian"))
        return data[:at] + b"\x89" + data[at + 1 :]

    names = ("the magic", "the protocol", "the system", "the tree", "the keys", "the storages")
    for number, name in enumerate(names):
        yield case(f"cut before {name}", lambda data, n=number: data[: starts(data)[n]])
        yield case(f"cut inside {name}", lambda data, n=number: data[: starts(data)[n] + 5])
    yield case("cut before the last byte", lambda data: data[:-1])
    yield case("more after the storages", lambda data: data + b"\0")
    yield case("another magic", lambda data: data.replace(data[4:8], bytes(4), 1))
    yield case("another protocol", lambda data: data[: starts(data)[1]] + b"\x80\x02K\x07." + data[starts(data)[2] :])
    yield case("big-endian", big_endian)
    yield case("no system", lambda data: data[: starts(data)[2]] + b"\x80\x02N." + data[starts(data)[3] :])

    def keys(pickled: bytes) -> Callable[[bytes], bytes]:
        return lambda data: data[: starts(data)[4]] + pickled + data[starts(data)[5] :]

    yield case("no keys", keys(b"\x80\x02]."))
    yield case("keys that are no list", keys(b"\x80\x02N."))
    yield case("keys of numbers", keys(b"\x80\x02]K\x01a."))
    yield case("other keys", keys(b"\x80\x02]" + _TEXT + b"a."))

    def counted(count: int) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            at = starts(data)[5]
            # Which storage comes first is up to addresses: that of a scalar has one element.
            wrong = count + (struct.unpack_from("<Q", data, at) == (count,))
            return data[:at] + struct.pack("<Q", wrong) + data[at + 8 :]

        return change

    for count in (0, 1, HUGE, (1 << 64) - 1):
        yield case(f"a storage of {count} elements", counted(count))
    big = struct.Struct(">Q")
    yield case(
        "a big-endian count",
        lambda data: data[: starts(data)[5]] + big.pack(56) + data[starts(data)[5] + 8 :],
    )


def lightning_cases() -> Iterator[Case]:
    whole = "ckpt_000_epoch=0_val_loss=6.24.ckpt"
    yield Case("lightning", "cut in the middle", edited(whole, lambda data: data[: len(data) // 2]), whole)
    trees: dict[str, Any] = {
        "no weights": {"epoch": 1},
        "weights of numbers": {"state_dict": {"a": 1, "b": 2}},
        "weights twice": {"state_dict": torch_tree(), "other": {n: t + 1 for n, t in torch_tree().items()}},
        "endless modules": {"state_dict": {"x" * 300: torch.ones(2, 2)}},
        "a sparse tensor": {"state_dict": torch_tree() | {"layers.0.ffn.fc1.weight": torch.eye(10, 8).to_sparse()}},
        "a tensor of NaN in its place": {"state_dict": torch_tree() | {"embed_tokens.weight": torch.ones(2, 2)}},
        "hyperparameters of 2^62": {"state_dict": torch_tree(), "hyper_parameters": {"decoder_layers": HUGE}},
    }
    for name, tree in trees.items():
        yield Case("lightning", name, replaced(whole, torch_bytes(tree)), "")
