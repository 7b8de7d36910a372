"""Which onnxruntime is installed, told from the files of packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest

from retnet_tools.runtime.installation import (
    Package,
    onnxruntime_in_use,
    onnxruntime_packages,
    package_clash,
    packages_in_use,
    repair,
    stray_folder,
)
from tests.fake_gpu import ROOT


def install(site: Path, name: str, version: str, *files: str) -> None:
    """The metadata of a package that unpacked these files."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def packages(site: Path) -> tuple[Package, ...]:
    return onnxruntime_packages(metadata.distributions(path=[str(site)]))


def test_a_package_is_known_by_its_files_and_not_by_its_name(tmp_path: Path) -> None:
    install(tmp_path, "ort-nightly-gpu", "1.32.0", "onnxruntime/__init__.py", "onnxruntime/capi/x.so")
    install(tmp_path, "onnxruntime-genai", "0.18.0", "onnxruntime_genai/__init__.py")
    install(tmp_path, "onnxruntime-tools", "1.0", "onnxruntime_tools/__init__.py", "onnxruntime_tools/onnxruntime.py")
    assert packages(tmp_path) == (Package("ort-nightly-gpu", "1.32.0"),)
    assert package_clash(packages(tmp_path)) is None


def test_two_packages_in_one_folder_are_a_clash(tmp_path: Path) -> None:
    for name in ("onnxruntime-gpu", "onnxruntime"):
        install(tmp_path, name, "1.31.1", "onnxruntime/__init__.py")
    found = packages(tmp_path)
    assert [package.name for package in found] == ["onnxruntime", "onnxruntime-gpu"]
    assert str(package_clash(found)).startswith("onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed")
    assert repair(found).startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then ")


def test_a_package_without_a_record_is_no_onnxruntime(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.31.1")
    (tmp_path / "onnxruntime-1.31.1.dist-info" / "RECORD").unlink()
    assert packages(tmp_path) == ()
    assert repair(()).startswith("pip uninstall -y onnxruntime, then ")


def test_this_environment_has_one(recwarn: pytest.WarningsRecorder) -> None:
    assert len(onnxruntime_packages()) == 1


def test_the_one_in_use_says_its_own_name_and_version() -> None:
    (name,) = onnxruntime_in_use()
    assert onnxruntime_in_use() == {onnxruntime.package_name: onnxruntime.__version__}
    assert packages_in_use() == (Package(name, onnxruntime.__version__),)
    assert stray_folder() is None


def test_a_package_elsewhere_is_not_the_one_in_use(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.30.0", "onnxruntime/__init__.py")
    found = metadata.distributions(path=[str(tmp_path)])
    assert onnxruntime_packages(found, tmp_path / "elsewhere" / "onnxruntime") == ()
    found = metadata.distributions(path=[str(tmp_path)])
    assert onnxruntime_packages(found, tmp_path / "onnxruntime") == (Package("onnxruntime", "1.30.0"),)


def test_an_onnxruntime_that_was_only_put_on_the_path_is_said(tmp_path: Path) -> None:
    """As on a GPU host without network: its folder unpacked somewhere, another version installed."""
    folder, used_folder = tmp_path / "onnxruntime", Path(onnxruntime.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(used_folder, folder, copy_function=os.symlink, ignore=ignore)
    # What says where the folder lies is a file of its own.
    (folder / "__init__.py").unlink()
    shutil.copy(used_folder / "__init__.py", folder)
    code = "from retnet_tools.runtime.diagnosis import diagnose; d = diagnose(); print(d.stray); print(d.onnxruntime)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = f"{onnxruntime.package_name} {onnxruntime.__version__}"
    stray = f"{used} in {folder} belongs to no installed package; {used}, which is installed, is not in use"
    assert done.stdout.splitlines() == [stray, used]
