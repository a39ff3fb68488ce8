# SPDX-License-Identifier: MIT
"""Lazy names: all of them are there, they are what they say, and editors see them."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fla

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT).parts)
    for folder in ("fla", "dilated_attention_pytorch")
    for file in (ROOT / folder).rglob("__init__.py")
    if "lazy_names(" in file.read_text()
)


@pytest.mark.parametrize("name", PACKAGES)
def test_names_are_what_they_say_after_every_submodule_was_imported(name):
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"{name}.{module.name}")
    assert len(package.__all__) == len(set(package.__all__)) and package.__all__
    for public in package.__all__:
        assert public in dir(package)
        assert not isinstance(getattr(package, public), ModuleType), public


@pytest.mark.parametrize(
    "before", ["", "import fla.modules.token_shift", "import fla.modules.mlp, fla.layers.rwkv7"]
)
def test_a_function_is_not_hidden_by_the_file_of_its_name(before):
    code = (
        f"{before}\n"
        "from fla.modules import token_shift\n"
        "import fla.modules.token_shift\n"
        "from fla.modules.token_shift import token_shift as same\n"
        "assert token_shift is same is fla.modules.token_shift and callable(same)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_top_level_has_every_layer_every_model_and_every_package():
    models = {name for name in fla.models.__all__ if name.endswith(("Model", "ForCausalLM"))}
    assert len(models) == 2 * len(fla.models.MODELS)
    assert models | set(fla.layers.__all__) <= set(fla.__all__)
    packages = {module.name for module in pkgutil.iter_modules(fla.__path__) if module.ispkg}
    assert {*packages, "utils", "__version__"} <= set(dir(fla))
    for name in packages:
        assert getattr(fla, name) is importlib.import_module(f"fla.{name}")
    assert fla.Mamba2ForCausalLM is fla.models.Mamba2ForCausalLM and fla.Raven is fla.layers.Raven


def test_a_name_that_is_nearly_right_is_suggested():
    done = subprocess.run(
        [sys.executable, "-c", "import fla\nfla.GatedDeltaNetForCausaLM"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "has no attribute 'GatedDeltaNetForCausaLM'" in done.stderr
    if sys.version_info >= (3, 11):
        assert "Did you mean: 'GatedDeltaNetForCausalLM'?" in done.stderr


@pytest.mark.parametrize("name", ["fla.layers", "fla.models"])
def test_type_checkers_see_every_module_that_has_public_names(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    seen = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    assert seen == sorted({getattr(package, public).__module__ for public in package.__all__})
