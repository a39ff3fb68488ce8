# SPDX-License-Identifier: MIT
"""What a report measures: branches switched off, divergence from a teacher, cost of a cache."""

import pytest
import torch

from fla.layers.linearized import LinearizedAttention
from fla.linearize.config import Report
from fla.linearize.measure import ablate, decode_cost, divergence, measure, without
from fla.linearize.surgery import assemble
from tests.linearize.common import make_all


def make_student(folder, linear):
    teacher, text, _, bank = make_all(folder, linear=linear)
    student = assemble(teacher, {i: bank[i] for i in (0, 2)}, linear).eval()
    return teacher, text, student


@torch.no_grad()
def test_branches(tmp_path):
    """With one branch left the layer gives that branch's result, and afterwards both again."""
    _, text, student = make_student(tmp_path, dict(window=4))
    layer = next(m for m in student.modules() if isinstance(m, LinearizedAttention))
    x, whole = torch.randn(1, 12, 16), {}
    whole["both"] = layer(x)[0]
    for branch in ("linear alone", "window alone", "nothing"):
        with without(student, branch):
            whole[branch] = layer(x)[0]
    assert torch.equal(layer(x)[0], whole["both"]) and not whole["nothing"].any()
    both = (whole["linear alone"] + whole["window alone"]) / 2  # the gate starts at one half
    assert torch.allclose(both, whole["both"], atol=1e-5)
    assert not torch.allclose(whole["linear alone"], whole["window alone"], atol=1e-3)
    found = ablate(student, text, Report(eval_bytes=800))
    assert list(found) == ["whole", "linear alone", "window alone", "nothing"]
    assert len(set(found.values())) == 4


def test_without_a_window_there_is_nothing_beside(tmp_path):
    _, text, student = make_student(tmp_path, {})
    assert list(ablate(student, text, Report(eval_bytes=800))) == ["whole", "nothing"]


def test_divergence_and_cache(tmp_path):
    teacher, text, student = make_student(tmp_path, {})
    assert divergence(teacher, teacher, text) == pytest.approx((0.0, 1.0), abs=1e-6)
    kl, agreement = divergence(student, teacher, text)
    assert kl > 1e-4 and 0 < agreement < 1
    sizes = [[decode_cost(m, n)[1] for n in (16, 32, 48)] for m in (teacher, student)]
    grown = [(b - a, c - b) for a, b, c in sizes]
    assert grown[0] == tuple(3 * x for x in grown[1])  # one softmax layer of three is left
    found = measure(student, teacher, text, Report(eval_bytes=400, probes=2, lengths=[16]))
    assert found.kl == pytest.approx(kl) and set(found.cache) == {16}
