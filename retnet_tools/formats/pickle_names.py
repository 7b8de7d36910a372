"""Names that pickles of checkpoints hold, and those that none may."""

from __future__ import annotations

from collections.abc import Mapping

# Nothing of these belongs in a checkpoint, whatever it is used for.
UNSAFE_MODULES = frozenset(
    (
        *("os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "pty", "ctypes", "socket", "shutil", "code"),
        *(
            "codeop",
            "marshal",
            "pickle",
            "_pickle",
            "webbrowser",
            "timeit",
            "pdb",
            "bdb",
            "profile",
            "cProfile",
            "trace",
        ),
        *("multiprocessing", "threading", "_thread", "asyncio", "signal", "http", "urllib", "ftplib", "smtplib", "gc"),
        *(
            "telnetlib",
            "pip",
            "setuptools",
            "ensurepip",
            "venv",
            "site",
            "inspect",
            "linecache",
            "platform",
            "tempfile",
        ),
    )
)
PLAIN_BUILTINS = frozenset(
    (
        *("object", "type", "bool", "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "dict"),
        *("set", "frozenset", "slice", "range", "NotImplemented", "Ellipsis", "enumerate", "zip", "reversed", "iter"),
    )
)
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "_io": "io"}
# Protocol 2 calls these by their names in Python 2.
OLD_NAMES = {"builtins.xrange": "range", "builtins.unicode": "str", "builtins.long": "int", "itertools.izip": "zip"}
# Functions and classes whose results are read over: name what a real file calls.
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
OPAQUE: Mapping[str, tuple[str, ...]] = {
    "builtins": (
        *("complex", "slice", "range", "iter", "enumerate", "zip", "reversed", "bytearray"),
        *("bool", "int", "float", "str", "bytes"),
    ),
    "collections": ("deque", "ChainMap"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "zoneinfo": ("ZoneInfo._unpickle",),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace", "MappingProxyType"),
    "functools": ("partial",),
    "itertools": ("count", "chain", "cycle", "repeat", "islice"),
    "re": ("_compile",),
    "logging": ("getLogger",),
    "random": ("Random",),
    "_random": ("Random",),
    "array": ("array", "_array_reconstructor"),
    "io": ("BytesIO", "StringIO"),
    "ipaddress": ("IPv4Address", "IPv6Address"),
    "numpy": ("ndarray",),
    "numpy.ma.core": ("_mareconstruct",),
    "numpy.random.bit_generator": ("__pyx_unpickle_SeedSequence", "__pyx_unpickle_SeedlessSequence"),
    "numpy.random.mtrand": ("RandomState", "__randomstate_ctor"),
    "numpy.random._pickle": ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"),
    "torch": ("device", "Generator"),
    "torch._C": ("Generator",),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),
    "torch.amp.grad_scaler": ("OptState", "_refresh_per_optimizer_state"),
    "torch.cuda.amp.grad_scaler": ("OptState", "_refresh_per_optimizer_state"),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed.device_mesh": ("DeviceMesh",),
    "torch.distributed.fsdp.api": ("ShardingStrategy", "StateDictType"),
}
