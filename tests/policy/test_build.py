# SPDX-License-Identifier: MIT
"""The package as it is installed: with the native library where there is a compiler, without where there is none."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {f"fla/ops/engine/native/src/{p.name}" for p in ROOT.glob("fla/ops/engine/native/src/*")}
LIBRARY = "fla/ops/engine/native/libfla_engine.so.0"


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("*.so.0", "__pycache__")
    shutil.copytree(ROOT / "fla", tmp_path / "fla", ignore=ignore)
    return tmp_path


def build(tree, *command, **environment):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_wheel_and_source_distribution(tree):
    build(tree, "bdist_wheel")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert {LIBRARY, *SOURCES} <= set(zipfile.ZipFile(wheel).namelist())
    build(tree, "sdist")
    (source,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", *SOURCES} <= names and LIBRARY not in names


def test_without_a_compiler_the_installation_succeeds_and_says_so(tree):
    said = build(tree, "build_ext", "--inplace", CXX="/nowhere/c++", CC="/nowhere/cc")
    assert "libfla_engine" in said and "failed" in said
    assert not (tree / LIBRARY).exists()
