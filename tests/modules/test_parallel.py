# SPDX-License-Identifier: MIT
"""Styles for `parallelize_module` on two processes: `parallel_worker.py` holds the checks."""

from tests.processes import run_ranks


def test_modules_on_a_mesh_equal_those_of_one_process():
    for said in run_ranks(2, "-m", "tests.modules.parallel_worker"):
        assert "all checks passed" in said


def test_styles_are_importable_where_published_code_has_them():
    from fla.modules import layernorm, mlp, parallel

    assert layernorm.NormParallel is parallel.NormParallel
    assert mlp.SwiGLULinearParallel is parallel.SwiGLULinearParallel
