"""Which onnxruntime is installed, told from the files of packages."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from retnet_tools.runtime.installation import Package, onnxruntime_packages, package_clash, repair


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
