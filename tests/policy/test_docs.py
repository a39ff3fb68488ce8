# SPDX-License-Identifier: MIT
"""Examples in docstrings, in the README and in the guides run; the README lists every operator."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch
import fla
from fla.ops.registry import OPS

ROOT = Path(__file__).parents[2]
MODULES = [
    m.name
    for package in (fla, dilated_attention_pytorch)
    for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    result = doctest.testmod(
        module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_public_operators_have_an_example_or_name_one():
    for op in OPS:
        assert ">>>" in op.chunk.__doc__, op.title


GUIDES = [p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", "".join([README, *GUIDES]), re.DOTALL)
)
def test_examples_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "a guide", "exec"), {"__name__": "__main__"})


def test_readme_lists_every_operator_and_names_files_that_exist():
    for op in OPS:
        assert f"(fla/ops/{op.name}.py)" in README
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_is_short_and_starts_with_installing_and_an_example():
    assert len(README.splitlines()) <= 150
    parts = [
        "pip install",
        "```python",
        "## How fast",
        "## With transformers",
        "## Operators",
        "## The demo",
    ]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
