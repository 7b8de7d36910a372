"""Which onnxruntime is installed, and whether several packages lie over one another in the same folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

_MODULE = "onnxruntime/__init__.py"


@dataclass(frozen=True)
class Package:
    """An installed package that unpacks into the folder `onnxruntime`."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def onnxruntime_packages(distributions: Iterable[metadata.Distribution] | None = None) -> tuple[Package, ...]:
    """The packages that brought a folder `onnxruntime`, found by their files, whatever they are called.

    Args:
        distributions: where to look; None looks at all that are installed.
    """
    found = {}
    for distribution in metadata.distributions() if distributions is None else distributions:
        if any(file.as_posix() == _MODULE for file in distribution.files or ()):
            package = Package(distribution.metadata["Name"], distribution.version)
            found[package.name] = package
    return tuple(found[name] for name in sorted(found))


def package_clash(packages: tuple[Package, ...]) -> str | None:
    """What is wrong where several packages wrote the same files; None where one did."""
    if len(packages) < 2:
        return None
    names = " and ".join(map(str, packages))
    return f"{names} are both installed and lie over each other; what was installed last is in use, in part"


def repair(packages: tuple[Package, ...]) -> str:
    """The commands that leave one whole onnxruntime with CUDA."""
    others = " ".join(package.name for package in packages) or "onnxruntime"
    return f"pip uninstall -y {others}, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
