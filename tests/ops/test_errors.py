# SPDX-License-Identifier: MIT
"""Wrong input raises `ValueError` that names the argument, what came and what was expected."""

import pytest
import torch

from fla.ops import gated_delta_rule as gdr
from fla.ops import linear_attn
from fla.ops.engine import dispatch
from fla.ops.registry import OPS

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_form = pytest.mark.parametrize("form", ["chunk", "token"])
CU = torch.tensor


@every_op
@every_form
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(1, 9, 2, 8)), r"k has shape \[1, 9, 2, 8\].*T is 10 in q"),
        (dict(v=torch.zeros(10, 2, 6)), r"v has shape \[10, 2, 6\], but 4 axes \[B=1 T=10 HV V\]"),
        (dict(k=torch.zeros(1, 10, 2, 8, dtype=torch.float64)), "k has dtype torch.float64 but q has torch.float32"),
        (dict(k=torch.zeros(1, 10, 2, 8, dtype=torch.int64)), "k has dtype torch.int64; a floating-point"),
        (dict(v=torch.zeros(1, 10, 2, 6, device="meta")), "v is on meta but q is on cpu"),
        (dict(initial_state=torch.zeros(1, 2, 6, 8)), r"initial_state has shape \[1, 2, 6, 8\].*K=8 V=6"),
        (dict(initial_state=torch.zeros(3, 2, 8, 6)), "initial_state holds 3 states but 1 were expected from the batch"),
        (dict(cu_seqlens=CU([0, 6, 4, 10])), "cu_seqlens decreases from 6 to 4 at position 2"),
        (dict(cu_seqlens=CU([0, 6, 9])), "cu_seqlens ends at 9 but there are T=10 tokens"),
        (dict(cu_seqlens=CU([1, 10])), "cu_seqlens starts at 1"),
        (dict(cu_seqlens=CU([10])), "1-D tensor"),
        (dict(cu_seqlens=CU([0.0, 10.0])), "int32 or int64 was expected"),
        (dict(cu_seqlens=CU([0, 4, 10]), initial_state=torch.zeros(1, 2, 8, 6)), "bounds 2 sequences"),
        (dict(backend="cuda"), "backend is 'cuda'; expected one of triton, native, torch"),
        (dict(backend="triton"), "'triton' was asked for by the call's backend argument but cannot run on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments(op, form, change, message):
    arguments = {**op.inputs(1, 10, 2, 8, 6), **op.fixed, **change}
    with pytest.raises(ValueError, match=message):
        getattr(op, form)(**arguments)


@every_op
@every_form
def test_wrong_gates_and_batches(op, form):
    function = getattr(op, form)
    for gate in op.gates:
        with pytest.raises(ValueError, match=f"{gate} has shape"):
            function(**{**op.inputs(1, 10, 2, 8, 6), gate: torch.zeros(1, 10, 3)})
    with pytest.raises(ValueError, match="HV=3 heads and k has H=2; HV must be a multiple"):
        function(**op.inputs(1, 10, 2, 8, 6, HV=3), **op.fixed)
    with pytest.raises(ValueError, match="packed sequences need B=1"):
        function(**op.inputs(2, 10, 2, 8, 6), **op.fixed, cu_seqlens=CU([0, 10]))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        function(**op.inputs(1, 10, 2, 8, 6), head_first=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(use_gate_in_kernel=True), "use_gate_in_kernel needs g .* and A_log"),
        (dict(A_log=torch.zeros(2)), "act only with use_gate_in_kernel=True"),
        (dict(allow_neg_eigval=True), "allow_neg_eigval doubles the in-kernel sigmoid"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), r"A_log has shape \[3\]"),
    ],
)
@pytest.mark.parametrize(
    "function", [gdr.chunk_gated_delta_rule, gdr.fused_recurrent_gated_delta_rule]
)
def test_contradictory_gate_switches(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**OPS[-1].inputs(1, 10, 2, 8, 6), **arguments)


def test_arguments_that_cannot_be_honoured():
    x = OPS[-1].inputs(1, 10, 2, 8, 6)
    with pytest.raises(ValueError, match="chunk_indices is not supported"):
        gdr.chunk_gated_delta_rule(**x, chunk_indices=CU([[0, 0]]))
    with pytest.raises(ValueError, match="cp_context is not supported"):
        gdr.chunk_gated_delta_rule(**x, cp_context=object())
    with pytest.raises(ValueError, match="chunk_size is 0"):
        gdr.chunk_gated_delta_rule(**x, chunk_size=0)
    q, k, v = (x[n] for n in "qkv")
    with pytest.raises(ValueError, match="must be the pair"):
        linear_attn.chunk_linear_attn(q, k, v, initial_state=torch.zeros(1, 2, 8, 6))
    with pytest.raises(ValueError, match="belongs to normalize=True"):
        linear_attn.chunk_linear_attn(q, k, v, initial_state=(q, k), normalize=False)


def test_explicit_choices_are_kept_or_raise(monkeypatch):
    x = OPS[-1].inputs(1, 10, 2, 8, 6)
    with (
        dispatch.use_backend("native"),
        pytest.raises(ValueError, match=r"asked for by use_backend\(\)"),
    ):
        gdr.chunk_gated_delta_rule(**x)
    monkeypatch.setenv("FLA_BACKEND", "triton")
    with pytest.raises(ValueError, match="asked for by the environment variable FLA_BACKEND"):
        gdr.chunk_gated_delta_rule(**x)
    with dispatch.use_backend("torch"):
        gdr.chunk_gated_delta_rule(**x)
    with pytest.raises(ValueError, match="expected one of"), dispatch.use_backend("cpu"):
        pass


def test_explain_tells_what_runs_and_why():
    x = OPS[-1].inputs(1, 10, 2, 8, 6, dtype=torch.bfloat16)
    text = str(dispatch.explain(gdr.chunk_gated_delta_rule, **x))
    for part in ("chunk_gated_delta_rule on cpu", "bfloat16 in, computed in float32", "runs: torch, chunk form",
                 "not triton", "not native"):  # fmt: skip
        assert part in text
    asked = dispatch.explain(gdr.fused_recurrent_gated_delta_rule, **x, backend="torch")
    assert "asked for by the call" in asked.why and asked.form.startswith("token form")
    with pytest.raises(ValueError, match="not an operator"):
        dispatch.explain(torch.add, x["q"], x["q"])
    with pytest.raises(ValueError, match="no tensor"):
        dispatch.explain(gdr.chunk_gated_delta_rule)
