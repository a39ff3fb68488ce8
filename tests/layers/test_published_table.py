# SPDX-License-Identifier: MIT
"""Constructors and configs are the published ones, and docs/published-layers.md says so."""

import re
from pathlib import Path

import pytest

from tests.layers import published_table
from tests.layers.published_layers import CONFIGS, DEFAULTS, LAYERS, NOTES


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_are_the_published_ones(name):
    assert not published_table.layer_differences(name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_defaults_are_the_published_ones(kind):
    explained = {name for model, name in DEFAULTS if model == kind}
    assert published_table.config_differences(kind).keys() == explained


@pytest.mark.parametrize("name", published_table.TABLES)
def test_the_page_holds_the_tables(name):
    table = published_table.TABLES[name]()
    held = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
    assert held in published_table.PAGE.read_text(), "run python -m tests.layers.published_table"


def test_the_page_names_tests_that_exist():
    assert NOTES.keys() == LAYERS.keys()
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    missing = [test for *_, test in NOTES.values() if test and f"def {test}(" not in tests]
    assert not missing
    models = (Path(__file__).parents[1] / "models").glob("test_*.py")
    tests += "".join(p.read_text() for p in models)
    page = re.findall(r"`(test_\w+)`", published_table.PAGE.read_text())
    assert not [name for name in page if f"def {name}(" not in tests]


def test_a_drift_would_be_noticed(monkeypatch):
    monkeypatch.setitem(LAYERS, "Mamba", "hidden_size=64, new=None, conv_kernel=4, state_size=16")
    assert published_table.layer_differences("Mamba") == [
        "hidden_size=2048", "no new", "state_size is elsewhere",
    ]  # fmt: skip
    monkeypatch.setitem(CONFIGS, "gla", ("num_heads=3, more=1", "vocab_size"))
    assert set(published_table.config_differences("gla")) == {"num_heads", "more"}
