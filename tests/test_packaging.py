"""What is in the distribution: every package, every data file, and nothing beside `graphopt`."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOOL = PROJECT["tool"]["setuptools"]
FOLDERS = {"graphopt": "graphopt"} | {
    f"graphopt.{name}": name for name in ("lowering", "passes", "runtime")
}


def package_files():
    """Every file under the package folders, with the package it is in."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                inner = path.parent.relative_to(ROOT / folder).parts
                yield ".".join((package, *inner)), path


def test_every_package_is_listed():
    found = {package for package, path in package_files() if path.name == "__init__.py"}
    assert sorted(found) == TOOL["packages"]
    assert TOOL["package-dir"] == FOLDERS
    modules = {package for package, path in package_files() if path.suffix == ".py"}
    assert modules == found  # no folder of modules lacks its __init__.py


def test_every_data_file_is_taken_along():
    patterns = TOOL["package-data"]["*"]
    others = [path for _, path in package_files() if path.suffix != ".py"]
    assert {path.suffix for path in others} >= {".toml"}
    for path in others:
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path


def test_the_version_is_said_once():
    import graphopt

    assert graphopt.__version__ == PROJECT["project"]["version"]
    assert importlib.metadata.version("graphopt") == graphopt.__version__


def test_the_oldest_versions_that_are_tested_are_those_that_are_admitted():
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if line and line[0] != "#")
    for requirement in PROJECT["project"]["dependencies"]:
        name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
        if name != "torch":  # PyPI's CPU build of one version alone is what CI has
            assert f"{pinned[name]}.".startswith(f"{lowest}."), requirement


@pytest.mark.parametrize("folder", ["lowering", "passes", "runtime"])
def test_the_bare_folders_are_no_packages_of_their_own(folder, tmp_path):
    """`import passes` finds nothing, wherever Python is started."""
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"No module named '{folder}'" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_graphopt_alone(tmp_path):
    (needed,) = re.findall(r"setuptools>=(\d+)", PROJECT["build-system"]["requires"][0])
    # Asked for its version only: imported here, it would replace distutils for other tests.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        have = importlib.metadata.version("setuptools")
        if int(have.split(".")[0]) >= int(needed):
            needed = ""
    if needed:
        pytest.skip(f"a wheel is built with setuptools {needed} or newer")
    # A copy, because a build leaves its own folders beside the sources.
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tmp_path / "out").mkdir()
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    version = PROJECT["project"]["version"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "graphopt = graphopt.cli.commands:main" in archive.read(entry).decode()
    assert {name.split("/")[0] for name in names} == {"graphopt", f"graphopt-{version}.dist-info"}
    expected = {f"{package.replace('.', '/')}/{path.name}" for package, path in package_files()}
    assert {name for name in names if name.startswith("graphopt/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
