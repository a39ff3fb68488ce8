# SPDX-License-Identifier: MIT
"""Commands and examples that have no test of their own run, or say what is wrong."""

from pathlib import Path

import pytest

from fla import cli
from fla.data.tokens import load_tokenizer
from fla.studies import load
from fla.studies.run import config_of
from scripts import floor

STUDIES = sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml"))


def test_warm_up_runs_a_step_of_each_length(capsys):
    sizes = ["--hidden_size", "32", "--head_dim", "16", "--lengths", "1", "20"]
    assert cli.main(["warm-up", "gated_deltanet", *sizes, "--dtypes", "float32"]) == 0
    said = capsys.readouterr().out
    assert "float32, 1 tokens" in said and "float32, 20 tokens" in said
    assert cli.main(["warm-up", "gated_deltnet", *sizes]) == 2
    assert "did you mean 'gated_deltanet'" in capsys.readouterr().err


def test_the_readme_names_the_oldest_versions_that_make_floor_tests(tmp_path, monkeypatch):
    oldest = dict(r.split("==", 1) for r in floor.floors((), ()))
    words = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    torch, transformers = oldest["torch"], oldest["transformers"]
    assert f"It needs torch {torch} and transformers {transformers} or newer" in words
    monkeypatch.setattr(floor, "PYPROJECT", tmp_path / "pyproject.toml")
    text = "[project]\ndependencies = ['torch']\n[project.optional-dependencies]\ntest = []\n"
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match="'torch' has no bound"):
        floor.floors(())


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_example_studies_describe_models_that_exist(path):
    study, tokenizer = load(path), load_tokenizer("byte")
    for cell in study.cells:
        assert config_of(cell, tokenizer).num_hidden_layers == cell.layers
