# SPDX-License-Identifier: MIT
"""The package as it is installed: with the native library where there is a compiler, without where there is none."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fla

ROOT = Path(__file__).parents[2]
SOURCES = {f"fla/ops/engine/native/src/{p.name}" for p in ROOT.glob("fla/ops/engine/native/src/*")}
LIBRARY = "fla/ops/engine/native/libfla_engine.so.0"
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def copy(target, *ignored):
    """A copy of what a build reads, times of change included: setup.py takes a library that is
    newer than its sources as it is.
    """
    target.mkdir(exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
                 "CHANGELOG.md", "constraints.txt"):  # fmt: skip
        shutil.copy2(ROOT / name, target)
    ignore = shutil.ignore_patterns("__pycache__", *ignored)
    for name in ("fla", "dilated_attention_pytorch", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def run(*command, cwd, **environment):
    """Outputs of a command in a clean environment: no folder of ours on Python's path."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """Wheel and source distribution of this tree. Nothing is downloaded: the build uses the
    setuptools that is installed here, and a native library that stands in the tree, if it is up to
    date.
    """
    tree = copy(tmp_path_factory.mktemp("tree"))
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="session")
def installed(dist, tmp_path_factory):
    """The `bin` folder of an environment that holds the wheel and nothing else. A .pth file lets it
    import the packages of the environment the tests run in (torch, transformers), behind its own:
    they are large, and a test downloads nothing. `fla` itself can only come from the wheel: Python
    does not follow the .pth files, as of an editable installation, of folders that a .pth file
    names.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=dist)
    python, (wheel,) = folder / "bin" / "python", dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install")
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=dist)
    (own,) = folder.glob("lib/python*/site-packages")
    outside = [path for path in sys.path if path.endswith("-packages")]
    (own / "outside.pth").write_text("\n".join(outside) + "\n")
    return folder / "bin"


@needs_compiler
def test_the_wheel_has_the_library_and_no_tests(dist):
    (wheel,) = dist.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {LIBRARY, *SOURCES, "fla/cli/__main__.py"} <= names
    folders = {
        "fla",
        "dilated_attention_pytorch",
        f"flash_linear_attention-{fla.__version__}.dist-info",
    }
    assert {name.split("/")[0] for name in names} == folders


@needs_compiler
def test_the_source_distribution_has_what_a_build_needs(dist, tmp_path):
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path, filter="data")
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "fla").rglob("*.py")}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", *SOURCES, *python} <= names
    assert LIBRARY not in names and not any(name.startswith("tests") for name in names)
    (tree,) = tmp_path.iterdir()
    check = ("c++", "-std=c++17", "-fsyntax-only", "-DFLA_ISA=baseline")
    run(*check, *(name for name in sorted(SOURCES) if name.endswith(".cpp")), cwd=tree)


@needs_compiler
def test_an_installed_wheel_does_what_the_readme_says(installed, tmp_path):
    """From an empty folder."""
    where = run(installed / "python", "-c", "import fla; print(fla.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed.parent))
    command = installed / "fla"
    assert run(command, "--version", cwd=tmp_path).stdout == f"fla {fla.__version__}\n"
    for name in ("convert", "preprocess", "download", "warm-up"):
        assert run(command, name, "--help", cwd=tmp_path).stdout.startswith(f"usage: fla {name} ")
    said = run(command, "doctor", cwd=tmp_path).stdout
    assert re.search(r"native kernels +(baseline|avx2|avx512)\n", said), said
    assert len(EXAMPLE.splitlines()) < 20 and "GatedDeltaNetForCausalLM" in EXAMPLE
    seeded = f"import torch\ntorch.manual_seed(0)\n{EXAMPLE}"  # a sample may end early
    shape = run(installed / "python", "-c", seeded, cwd=tmp_path).stdout
    assert shape.endswith("torch.Size([1, 30])\n")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_installation_succeeds_and_says_so(tmp_path):
    tree = copy(tmp_path / "tree", "*.so.0")
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    said = run(*build, cwd=tree, CXX="/nowhere/c++", CC="/nowhere/cc").stderr
    assert "libfla_engine" in said and "failed" in said
    assert not (tree / LIBRARY).exists()


def test_a_library_is_compiled_again_only_where_a_source_has_changed(tmp_path):
    """Without a compiler, so compiling is failing."""
    tree = copy(tmp_path / "tree", "*.so.0")
    (tree / LIBRARY).write_bytes(b"built before")
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    nowhere = dict(CXX="/nowhere/c++", CC="/nowhere/cc")
    assert "failed" not in run(*build, cwd=tree, **nowhere).stderr
    assert "failed" in run(*build, "--force", cwd=tree, **nowhere).stderr
    os.utime(tree / "fla/ops/engine/native/src/simd.h", times=(2**33, 2**33))
    assert "failed" in run(*build, cwd=tree, **nowhere).stderr


def test_uv_takes_the_versions_of_the_constraints():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    held = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert held["constraint-dependencies"] == listed
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+; \w+ [>=]= \"[\w.]+\"", line) for line in listed)
