"""Which onnxruntime is in use, which are installed, and whether several packages lie over one another in one folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_MODULE = "onnxruntime/__init__.py"


@dataclass(frozen=True)
class Package:
    """An onnxruntime as pip names it."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def onnxruntime_in_use() -> dict[str, str]:
    """The onnxruntime that this process imports, as it says itself: its package's name to its version.

    Whether pip knows of it or not.
    """
    import onnxruntime

    return {onnxruntime.package_name or "onnxruntime": onnxruntime.__version__}


def onnxruntime_folder() -> Path:
    """The folder that it is imported from."""
    import onnxruntime

    return Path(onnxruntime.__file__).resolve().parent


def onnxruntime_packages(
    distributions: Iterable[metadata.Distribution] | None = None, folder: Path | None = None
) -> tuple[Package, ...]:
    """The packages that brought a folder `onnxruntime`, found by their files, whatever they are called.

    Args:
        distributions: where to look; None looks at all that are installed.
        folder: only those that brought this one.
    """
    found = {}
    for distribution in metadata.distributions() if distributions is None else distributions:
        if any(file.as_posix() == _MODULE for file in distribution.files or ()):
            brought = Path(str(distribution.locate_file(_MODULE))).resolve().parent
            if folder in (None, brought):
                package = Package(distribution.metadata["Name"], distribution.version)
                found[package.name] = package
    return tuple(found[name] for name in sorted(found))


def packages_in_use() -> tuple[Package, ...]:
    """The packages that brought the folder of the onnxruntime in use: one, several over each other, or none."""
    return onnxruntime_packages(folder=onnxruntime_folder())


def package_clash(packages: tuple[Package, ...]) -> str | None:
    """What is wrong where several packages wrote the same files; None where one did."""
    if len(packages) < 2:
        return None
    names = " and ".join(map(str, packages))
    return f"{names} are both installed and lie over each other; what was installed last is in use, in part"


def stray_folder() -> str | None:
    """What to know where the onnxruntime in use is of no installed package, but was put on the path; else None."""
    if packages_in_use():
        return None
    others = " and ".join(map(str, onnxruntime_packages()))
    beside = f"; {others}, which is installed, is not in use" if others else ""
    used = " ".join(*onnxruntime_in_use().items())
    return f"{used} in {onnxruntime_folder()} belongs to no installed package{beside}"


def repair(packages: tuple[Package, ...]) -> str:
    """The commands that leave one whole onnxruntime with CUDA."""
    others = " ".join(package.name for package in packages) or "onnxruntime"
    return f"pip uninstall -y {others}, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
