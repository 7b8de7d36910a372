"""What a pickle's globals, objects and calls become: stand-ins that do nothing.

Every function and class that a pickle names is a `Global`, a name. Three things can happen to one, and none of them
imports, looks up or calls what it names:

1. It is only mentioned (a dtype, the class of an optimizer): it stays a name.
2. An object of it is made by NEWOBJ, NEWOBJ_EX, INST, OBJ or through `copyreg`, as dataclasses, Namespaces and
   most classes are: the object is a `Shell`, which gathers attributes and items.
3. It is called (REDUCE). `CALLS` says what the calls of trainers' files become: a tensor a `TensorView`, a container a
   plain one, an array or a date a `Shell`. Of a package other than the standard library, torch and numpy, a name that
   is spelled like a class gives a `Shell` too (enum members are pickled so).

All else is refused by name: a call that is in no table could only be meant to run, and of `UNSAFE_MODULES` and the
functions of `builtins` not even a mention is read. Stand-ins copy nothing, so that a small file cannot fill memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retnet_tools.formats.settings import words

# Nothing of these belongs in a checkpoint, whatever it is used for.
UNSAFE_MODULES = words(
    """
    os posix nt subprocess sys importlib runpy pty ctypes socket shutil code codeop marshal pickle _pickle webbrowser
    timeit pdb bdb profile cProfile trace multiprocessing threading _thread asyncio signal http urllib ftplib smtplib gc
    telnetlib pip setuptools ensurepip venv site inspect linecache platform tempfile
    """
)
PLAIN_BUILTINS = words(
    """
    object type bool int float complex str bytes bytearray list tuple dict set frozenset slice range NotImplemented
    Ellipsis enumerate zip reversed iter
    """
)
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "_io": "io"}
# Protocol 2 calls these by their names in Python 2.
OLD_NAMES = {"builtins.xrange": "range", "builtins.unicode": "str", "builtins.long": "int", "itertools.izip": "zip"}
# Functions and classes whose results are read over.
OPAQUE = words(
    """
    _codecs.encode builtins.complex builtins.slice builtins.range builtins.iter builtins.enumerate builtins.zip
    builtins.reversed builtins.bytearray builtins.bool builtins.int builtins.float builtins.str builtins.bytes
    collections.deque collections.ChainMap datetime.datetime datetime.date datetime.time datetime.timedelta
    datetime.timezone zoneinfo.ZoneInfo._unpickle decimal.Decimal fractions.Fraction uuid.UUID pathlib.Path
    pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
    pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath pathlib._local.PurePath
    pathlib._local.PurePosixPath pathlib._local.PureWindowsPath argparse.Namespace types.SimpleNamespace
    types.MappingProxyType functools.partial itertools.count itertools.chain itertools.cycle itertools.repeat
    itertools.islice re._compile logging.getLogger random.Random _random.Random array.array array._array_reconstructor
    io.BytesIO io.StringIO ipaddress.IPv4Address ipaddress.IPv6Address numpy.ndarray numpy.ma.core._mareconstruct
    numpy.random.bit_generator.__pyx_unpickle_SeedSequence numpy.random.bit_generator.__pyx_unpickle_SeedlessSequence
    numpy.random.mtrand.RandomState numpy.random.mtrand.__randomstate_ctor numpy.random._pickle.__randomstate_ctor
    numpy.random._pickle.__generator_ctor numpy.random._pickle.__bit_generator_ctor torch.device torch.Generator
    torch._C.Generator torch.serialization._get_layout torch.torch_version.TorchVersion torch.amp.grad_scaler.OptState
    torch.amp.grad_scaler._refresh_per_optimizer_state torch.cuda.amp.grad_scaler.OptState
    torch.cuda.amp.grad_scaler._refresh_per_optimizer_state torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    torch.distributed.device_mesh.DeviceMesh torch.distributed.fsdp.api.ShardingStrategy
    torch.distributed.fsdp.api.StateDictType
    """
)
TENSOR_CLASSES = words("torch.Tensor torch._tensor.Tensor torch.nn.parameter.Parameter torch.nn.parameter.Buffer")
QUANTIZERS = words("torchao hqq bitsandbytes optimum quanto compressed_tensors")
MAX_DIMENSIONS = 64
NUMBER_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class Global:
    """The name of a function or class: its module, its name in it, and both with a dot between."""

    __slots__ = ("module", "name", "qualified")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name, self.qualified = module, name, f"{module}.{name}"


class Shell:
    """An object whose class is only a name: what it was made with, its attributes, its items."""

    __slots__ = ("arguments", "elements", "items", "kind", "parts", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.parts: list[dict[Any, Any]] = []
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Take a state as an object without `__setstate__` would; one of another form is kept as it is."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            self.parts += [part for part in parts if part is not None]
        else:
            self.state = state

    def entries(self) -> dict[Any, Any]:
        """Attributes and items together."""
        if len(self.parts) == 1 and not self.items:
            return self.parts[0]
        return {name: value for part in (*self.parts, self.items) for name, value in part.items()}


class Storage(NamedTuple):
    """A flat run of `numel` elements under a key of the file; `start` elements lie before it where it is a view."""

    dtype: str
    key: str
    numel: int
    start: int


class TensorView(NamedTuple):
    """A tensor as the pickle describes it, not checked against its storage yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StrangeTensor(NamedTuple):
    """A tensor whose values do not lie in one storage as numbers: `kind` says why."""

    kind: str


class UnsafeGlobalError(Exception):
    """A global that is refused."""


def is_tensor(value: Any) -> bool:
    """Whether a value stands for a tensor."""
    return isinstance(value, TensorView | StrangeTensor)


def look_up(module: str, name: str) -> Global:
    """The stand-in of a global; one that a checkpoint may not even mention is an `UnsafeGlobalError`."""
    found = Global(OLD_MODULES.get(module, module), name)
    if found.qualified in OLD_NAMES:
        found = Global("builtins", OLD_NAMES[found.qualified])
    unsafe = found.module.split(".")[0] in UNSAFE_MODULES
    if unsafe or (found.module == "builtins" and found.name not in PLAIN_BUILTINS and found.qualified not in CALLS):
        raise UnsafeGlobalError(found.qualified)
    return found


def call(function: Any, arguments: Any) -> Any:
    """What a REDUCE gives; a call that is in no table is an `UnsafeGlobalError`."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is no global")
    if (known := CALLS.get(function.qualified)) is not None:
        return known(*arguments)
    foreign = function.module.split(".")[0] not in sys.stdlib_module_names | {"torch", "numpy"}
    if foreign and function.name.split(".")[-1].lstrip("_")[:1].isupper():
        return Shell(function.qualified, arguments)
    raise UnsafeGlobalError(function.qualified)


def new_object(kind: Any, arguments: Any) -> Any:
    """What NEWOBJ gives: an object of a class, its `__init__` never run."""
    if not isinstance(kind, Global) or not isinstance(arguments, tuple):
        raise ValueError("an object of something that is no class")
    if kind.qualified in MAPPINGS:
        return _mapping(*arguments)
    if kind.qualified in TENSOR_CLASSES:
        return _parameter(*arguments)
    return Shell(kind.qualified, arguments)


def _mapping(*arguments: Any) -> Any:
    pairs = arguments[-1] if arguments else None
    if isinstance(pairs, dict):
        return pairs
    if not isinstance(pairs, list):
        return {}
    made = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and isinstance(pair[0], str)}
    pairs.clear()  # moved, so that no pickle can have it copied again and again
    return made


def _first(*arguments: Any) -> Any:
    return arguments[0] if arguments else []


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple):
        raise ValueError("a size that is no tuple")
    return sizes


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView | StrangeTensor:
    if isinstance(storage, StrangeTensor):
        return storage
    if isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple):
        few = len(shape) + len(strides) <= 2 * MAX_DIMENSIONS
        if few and all(type(n) is int for n in (offset, *shape, *strides)):
            return TensorView(storage, storage.dtype, offset, shape, strides)
    raise ValueError("a tensor with a broken description")


def _typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Any:
    view = _tensor(storage, offset, shape, strides)
    if not isinstance(view, TensorView) or not isinstance(dtype, Global) or dtype.module != "torch":
        raise ValueError("a tensor without a dtype")
    return view._replace(dtype=dtype.name)


def _parameter(data: Any = None, *_: Any) -> Any:
    return data if is_tensor(data) else Shell("torch.Tensor")


def _subclass(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a subclass, or one that carries attributes."""
    wrapped = _wrapper(kind)
    is_wrapper = isinstance(function, Global) and function.name == "_rebuild_wrapper_subclass"
    return wrapped if is_wrapper else call(function, arguments)


def _wrapper(kind: Any = None, *_: Any) -> StrangeTensor:
    if not isinstance(kind, Global):
        raise ValueError("a tensor without a class")
    library = kind.module.split(".")[0]
    return StrangeTensor(f"{library}-quantized" if library in QUANTIZERS else kind.name)


def _from_cpu(data: Any, dtype: Any = None, *_: Any) -> Any:
    same = isinstance(data, TensorView) and isinstance(dtype, Global) and dtype.name == data.dtype
    return data if same else StrangeTensor("a device's own")


def _reconstructed(kind: Any, base: Any = None, state: Any = None) -> Any:
    made = new_object(kind, ())
    if isinstance(made, Shell) and isinstance(state, dict):
        made.items = state
    elif isinstance(made, Shell) and isinstance(state, list):
        made.elements = state
    return made


def _attribute(owner: Any, name: Any = None) -> Global:
    """`getattr`, by which pickle names a class that lies inside another."""
    if not isinstance(owner, Global) or not isinstance(name, str):
        raise UnsafeGlobalError("builtins.getattr")
    nested = Global(owner.module, f"{owner.name}.{name}")
    if not name.lstrip("_")[:1].isupper() or owner.module.split(".")[0] in sys.stdlib_module_names:
        raise UnsafeGlobalError(nested.qualified)
    return nested


def _numpy_scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number where its type is one of the usual ones and little-endian."""
    code = dtype.arguments[0] if isinstance(dtype, Shell) and dtype.arguments else None
    if code not in NUMBER_CODES or (isinstance(dtype.state, tuple) and ">" in dtype.state[:2]):
        return Shell("numpy.generic")
    if isinstance(data, Shell) and data.kind == "_codecs.encode":  # protocol 2 spells bytes as text
        text = data.arguments[0]
        data = text.encode("latin1", "replace") if isinstance(text, str) and len(text) <= 8 else None
    whole = isinstance(data, bytes) and len(data) == int(code[1:])
    return np.frombuffer(data, f"<{code}").item() if whole else Shell("numpy.generic")


def _shell(kind: str) -> Callable[..., Shell]:
    return lambda *arguments: Shell(kind, arguments)


def _strange(kind: str) -> Callable[..., StrangeTensor]:
    return lambda *_: StrangeTensor(kind)


MAPPINGS = words("collections.OrderedDict collections.defaultdict collections.Counter builtins.dict")
CALLS: dict[str, Callable[..., Any]] = {
    **{name: _shell(name) for name in OPAQUE},
    **dict.fromkeys(MAPPINGS, _mapping),
    **dict.fromkeys(TENSOR_CLASSES, _parameter),
    **dict.fromkeys(words("builtins.set builtins.frozenset builtins.list builtins.tuple"), _first),
    "builtins.getattr": _attribute,
    "copyreg._reconstructor": _reconstructed,
    "copyreg.__newobj__": lambda kind, *arguments: new_object(kind, arguments),
    "copyreg.__newobj_ex__": lambda kind, arguments, _: new_object(kind, arguments),
    "numpy.dtype": lambda code=None, *_: Shell("numpy.dtype", (code,)),
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch.storage._load_from_bytes": _strange("pickled without torch.save"),
}
for _root in ("numpy.core", "numpy._core"):
    CALLS[f"{_root}.multiarray._reconstruct"] = CALLS[f"{_root}.numeric._frombuffer"] = _shell("numpy.ndarray")
    CALLS[f"{_root}.multiarray.scalar"] = _numpy_scalar
for _name, _kind in (
    *(("qtensor", "torch-quantized"), ("sparse_tensor", "sparse"), ("sparse_csr_tensor", "sparse")),
    *(("nested_tensor", "nested"), ("meta_tensor_no_storage", "meta")),
    *(("device_tensor_from_numpy", "a device's own"), ("xla_tensor", "a device's own")),
):
    CALLS[f"torch._utils._rebuild_{_name}"] = _strange(_kind)
