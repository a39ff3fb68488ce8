# SPDX-License-Identifier: MIT
"""The scripts for machines with a GPU, tried on one without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_say_so(tmp_path):
    done = run(sys.executable, "-m", "benchmarks.gpu")
    assert done.returncode == 2 and "no GPU here" in done.stderr
    done = run("bash", "scripts/gpu_check.sh", str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 2 and "torch, Triton and a GPU are needed" in done.stderr


@pytest.mark.full_matrix
def test_every_row_of_the_figures_runs(tmp_path):
    command = (sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(tmp_path))
    done = run(*command, "--peer", str(ROOT), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("gpu-*.md")
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15 and not any("Error" in row for row in rows)
    assert sum("x |" in row for row in rows) == 4  # what the peer ran too


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there():
    environment = dict(TRITON_INTERPRET="0")
    command = (sys.executable, "-m", "scripts.compile_kernels", "--targets", "sm_90")
    done = run(*command, "--members", "none,none", **environment)
    assert done.returncode == 0, done.stderr
    assert "| sm_90 | none, none, 128 | state_kernel |" in done.stdout
