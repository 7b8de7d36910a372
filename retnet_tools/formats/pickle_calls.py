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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from retnet_tools.formats.pickle_names import OLD_MODULES, OLD_NAMES, OPAQUE, PLAIN_BUILTINS, UNSAFE_MODULES
from retnet_tools.formats.stand_ins import (
    Encoded,
    Global,
    Shell,
    Storage,
    StrangeTensor,
    TensorView,
    UnsafeGlobalError,
    is_tensor,
)

TENSOR_CLASSES = frozenset(
    {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
)
MAX_DIMENSIONS = 64
NUMBER_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def look_up(module: str, name: str) -> Global:
    """The stand-in of a global.

    Raises:
        UnsafeGlobalError: nothing that a checkpoint may even mention.
    """
    found = Global(OLD_MODULES.get(module, module), name)
    if found.qualified in OLD_NAMES:
        found = Global("builtins", OLD_NAMES[found.qualified])
    unsafe = found.module.split(".")[0] in UNSAFE_MODULES
    if unsafe or (found.module == "builtins" and found.name not in PLAIN_BUILTINS and found.qualified not in CALLS):
        raise UnsafeGlobalError(found.qualified)
    return found


def call(function: Any, arguments: Any) -> Any:
    """What a REDUCE gives.

    Raises:
        UnsafeGlobalError: a call that is in no table.
        ValueError: arguments that no real file has.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is no global")
    if (known := CALLS.get(function.qualified)) is not None:
        return known(*arguments)
    foreign = function.module.split(".")[0] not in sys.stdlib_module_names | {"torch", "numpy"}
    if foreign and function.name.split(".")[-1].lstrip("_")[:1].isupper():
        return Shell(function.qualified, arguments)
    raise UnsafeGlobalError(function.qualified)


def new_object(kind: Any, arguments: Any) -> Any:
    """What NEWOBJ gives: an object of a class, its `__init__` never run.

    Raises:
        ValueError: no class.
    """
    if not isinstance(kind, Global) or not isinstance(arguments, tuple):
        raise ValueError("an object of something that is no class")
    if kind.qualified in MAPPINGS:
        return _mapping(*arguments)
    if kind.qualified in TENSOR_CLASSES:
        return _parameter(*arguments)
    return Shell(kind.qualified, arguments)


def _mapping(*arguments: Any) -> Any:
    if arguments and isinstance(arguments[-1], dict):
        return arguments[-1]
    pairs = arguments[-1] if arguments and isinstance(arguments[-1], list) else []
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
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor with a broken description")
    if len(shape) + len(strides) > 2 * MAX_DIMENSIONS or not all(type(n) is int for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with a broken description")
    return TensorView(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Any:
    view = _tensor(storage, offset, shape, strides)
    if not isinstance(view, TensorView) or not isinstance(dtype, Global) or dtype.module != "torch":
        raise ValueError("a tensor without a dtype")
    return view._replace(dtype=dtype.name)


def _strange(kind: str) -> Callable[..., StrangeTensor]:
    return lambda *_: StrangeTensor(kind)


def _parameter(data: Any = None, *_: Any) -> Any:
    return data if is_tensor(data) else Shell("torch.Tensor")


def _subclass(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a subclass, or one that carries attributes."""
    if not isinstance(kind, Global):
        raise ValueError("a tensor without a class")
    wrapped = isinstance(function, Global) and function.name == "_rebuild_wrapper_subclass"
    return StrangeTensor(kind.name) if wrapped else call(function, arguments)


def _wrapper(kind: Any = None, *_: Any) -> StrangeTensor:
    return StrangeTensor(kind.name if isinstance(kind, Global) else "a tensor subclass")


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


def _numpy_dtype(code: Any = None, *_: Any) -> Shell:
    return Shell("numpy.dtype", (code,))


def _numpy_scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number where its type is one of the usual ones and little-endian."""
    code = dtype.arguments[0] if isinstance(dtype, Shell) and dtype.arguments else None
    if isinstance(dtype, Shell) and isinstance(dtype.state, tuple) and ">" in dtype.state[:2]:
        code = None
    raw = data.text.encode("latin1", "replace") if isinstance(data, Encoded) and len(data.text) <= 8 else data
    if code not in NUMBER_CODES or not isinstance(raw, bytes) or len(raw) != int(code[1:]):
        return Shell("numpy.generic")
    return np.frombuffer(raw, np.dtype("<" + code)).item()


def _shell(kind: str) -> Callable[..., Shell]:
    return lambda *arguments: Shell(kind, arguments)


MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
_NUMPY_ROOTS = ("numpy.core", "numpy._core")
CALLS: Mapping[str, Callable[..., Any]] = {
    **{f"{module}.{name}": _shell(f"{module}.{name}") for module, names in OPAQUE.items() for name in names},
    **dict.fromkeys(MAPPINGS, _mapping),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple"), _first),
    "builtins.getattr": _attribute,
    "_codecs.encode": lambda text="", *_: Encoded(text) if isinstance(text, str) else text,
    "copyreg._reconstructor": _reconstructed,
    "copyreg.__newobj__": lambda kind, *arguments: new_object(kind, arguments),
    "copyreg.__newobj_ex__": lambda kind, arguments, _: new_object(kind, arguments),
    "numpy.dtype": _numpy_dtype,
    **{f"{root}.multiarray._reconstruct": _shell("numpy.ndarray") for root in _NUMPY_ROOTS},
    **{f"{root}.numeric._frombuffer": _shell("numpy.ndarray") for root in _NUMPY_ROOTS},
    **{f"{root}.multiarray.scalar": _numpy_scalar for root in _NUMPY_ROOTS},
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.Buffer": _parameter,
    "torch.Tensor": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_qtensor": _strange("quantized"),
    "torch._utils._rebuild_sparse_tensor": _strange("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _strange("sparse"),
    "torch._utils._rebuild_nested_tensor": _strange("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _strange("meta"),
    "torch._utils._rebuild_device_tensor_from_numpy": _strange("a device's own"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._utils._rebuild_xla_tensor": _strange("a device's own"),
    "torch.storage._load_from_bytes": _strange("pickled without torch.save"),
}
