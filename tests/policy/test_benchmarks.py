# SPDX-License-Identifier: MIT
"""The benchmarks of whole models run at tiny sizes, and results are compared figure by figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fla
from benchmarks import compare
from benchmarks.common import python
from tests import processes

ROOT = Path(__file__).parents[2]
SMALL = ["--hidden_size", "32", "--head_dim", "16", "--layers", "1", "--repeats", "1"]


@pytest.mark.parametrize(
    ("name", "models", "options", "figure"),
    [
        ("generation", ["gla", "hf:llama"], ["--prompts", "16", "--written", "2"], "cache"),
        # measures memory in a fresh process per model
        ("training_throughput", ["gla"], ["--lengths", "16", "--tokens", "32"], "mfu"),
    ],
)
def test_it_measures_models_side_by_side(name, models, options, figure, tmp_path):
    command = ["-m", f"benchmarks.{name}", *SMALL, *options, "--device", "cpu"]
    processes.run(*command, "--models", *models, "--out", tmp_path, check=True)
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["model"] for row in rows] == models
    assert all(row[figure] > 0 for row in rows)
    assert f"| {models[-1]} |" in file.with_suffix(".md").read_text()


def test_every_benchmark_runs_as_a_file_from_anywhere(tmp_path):
    """One process for all of them, which starts each as `python FILE --help` does."""
    files = [p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in p.read_text()]
    assert {"ops.py", "gpu.py", "peer_transformers.py", "compare.py"} <= {p.name for p in files}
    code = (
        "import runpy, sys\n"
        "path = sys.path[1:]\n"
        "for file in sys.argv[1:]:\n"
        "    sys.path[:] = [file.rpartition('/')[0], *path]\n"
        "    sys.argv[:] = [file, '--help']\n"
        "    for name in [n for n in sys.modules if n.split('.')[0] == 'benchmarks']:\n"
        "        del sys.modules[name]\n"
        "    try:\n"
        "        runpy.run_path(file, run_name='__main__')\n"
        "    except SystemExit as done:\n"
        "        assert done.code == 0, file\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"usage: {p.name}") for p in files] == [1] * len(files)


def test_no_benchmark_hides_an_installed_package():
    """Python puts a file's folder first on its path."""
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n)))"
    names = [p.stem for p in (ROOT / "benchmarks").glob("*.py")]
    run = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code, *names]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == []


def test_a_fresh_process_finds_this_checkout_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert python("-c", "import fla, benchmarks; print(fla.__file__)") == f"{fla.__file__}\n"


def test_figures_of_two_results_meet_by_name():
    before = {"machine": {"cpu": 3}, "rows": [{"model": "a", "length": 8, "seconds": 2.0}], "x": 1}
    after = {"rows": [{"model": "b", "seconds": 1.0}, {"model": "a", "length": 8, "seconds": 3.0}]}
    first, second = compare.figures(before), compare.figures(after)
    assert first == {"rows / a 8 / seconds": 2.0, "x": 1.0}
    console = Console(record=True, width=120)
    compare.show(first, second, ("before", "after"), console)
    text = console.export_text()
    assert "1.50" in text and "not in after: x" in text and "not in before: rows / b" in text


def test_two_revisions_run_in_turn(tmp_path, monkeypatch):
    def git(*command):
        own = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *own, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    for seconds in (2.0, 5.0):
        (tmp_path / "bench.py").write_text(
            "import json, sys\n"
            f"import pathlib; out = pathlib.Path(sys.argv[-1]); out.mkdir()\n"
            f"(out / 'a.json').write_text(json.dumps({{'seconds': {seconds}}}))\n"
        )
        git("add", "-A")
        git("commit", "-qm", "x")
    monkeypatch.chdir(tmp_path)
    found = compare.revisions(["HEAD~1", "HEAD"], ["bench"], rounds=2)
    assert found == [{"seconds": 2.0}, {"seconds": 5.0}]
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_missing_result_is_said():
    command = [sys.executable, "-m", "benchmarks.compare", "none.json", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "none.json is no result file" in done.stderr
