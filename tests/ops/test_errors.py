# SPDX-License-Identifier: MIT
"""Wrong input raises `ValueError` that names the argument, what came and what was expected."""

import inspect

import pytest
import torch

from fla._explain import explain
from fla.core import stage
from fla.core.checks import checked_inputs
from fla.ops import gated_delta_rule as gdr
from fla.ops import linear_attn
from fla.ops.engine.native import library
from fla.ops.registry import OPS

GDN = next(op for op in OPS if op.name == "gated_delta_rule")
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_form = pytest.mark.parametrize("form", ["chunk", "token"])
CU = torch.tensor


def arguments(op, function, B=1, T=10, **sizes):
    fixed = op.fixed if function is op.naive else op.fixed | op.chunk_fixed
    return {**op.inputs(B, T, 2, 8, 6, **sizes), **fixed}


@every_op
@every_form
def test_wrong_tensors_are_named(op, form):
    function = getattr(op, form)
    good = arguments(op, function)
    first = next(iter(op.tensors))
    for name in op.tensors:
        x, called = good[name], f"({name}|gk)" if op.name == "gla" else name
        for bad, message in [
            (x.unsqueeze(0), f"{called} has shape"),
            (x.long(), f"{called} has dtype torch.int64; a floating-point"),
            (x.to("meta"), f"{called} is on meta" if name != first else "on cpu but .* is on meta"),
            (x.tolist(), f"{called} is a list; expected a torch.Tensor"),
        ]:
            with pytest.raises((ValueError, TypeError), match=message):
                function(**{**good, name: bad})
        for axis in range(x.dim()):
            bad = torch.cat([x, x.narrow(axis, 0, 1)], axis)
            try:
                function(**{**good, name: bad})
            except ValueError as error:
                message = str(error)
                assert any(f": {n} has " in message for n in [*op.tensors, "gk"])
            else:
                lonely = sum(op.axes(name)[axis] in op.axes(n) for n in op.tensors) == 1
                assert lonely, f"{name} {list(bad.shape)} was taken"


@every_op
@every_form
def test_wrong_states_and_boundaries_are_named(op, form):
    function = getattr(op, form)
    good = arguments(op, function)
    for name, spec in op.state.items():
        for bad in ([x[None] for x in op.states(1, 2, 8, 6)], op.states(3, 2, 8, 6)):
            state = op.state_arguments(bad)
            if isinstance(spec, tuple):
                with pytest.raises(ValueError, match="initial_state is a"):
                    function(**good, initial_state=state[name][:-1])
            with pytest.raises(ValueError, match=rf"{name}(\[0\])? h(as shape|olds 3 states)"):
                function(**good, **{name: state[name]})
    if op.state:
        states = op.state_arguments(op.states(1, 2, 8, 6))
        with pytest.raises(ValueError, match=r"bounds 2 sequences|\[2, .* was expected"):
            function(**good, **states, cu_seqlens=CU([0, 4, 10]))
    for bounds, message in [
        ([0, 6, 4, 10], "cu_seqlens decreases from"),
        ([0, 6, 9], "cu_seqlens ends at"),
        ([1, 10], "cu_seqlens starts at"),
        ([10], "1-D tensor"),
        ([0.0, 10.0], "int32 or int64 was expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(**good, cu_seqlens=CU(bounds))
    with pytest.raises(ValueError, match="packed sequences need B=1"):
        function(**arguments(op, function, B=2), cu_seqlens=CU([0, 10]))


@every_op
@every_form
def test_wrong_choices(op, form, no_interpreter):
    function = getattr(op, form)
    good = arguments(op, function)
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of"):
        function(**good, backend="cuda")
    with pytest.raises(ValueError, match=r"'triton' was asked for by the call's backend argument"):
        function(**good, backend="triton")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        function(**good, head_first=True)
    if op.grouped:
        with pytest.raises(ValueError, match=r"HV=3 heads and k has H=2; HV must be a multiple"):
            function(**arguments(op, function, HV=3))


@every_op
@every_form
def test_decays_above_zero(op, form):
    """Refused by range where inputs are checked; by default computed, and finite."""
    function = getattr(op, form)
    decays = [n for n, spec in op.tensors.items() if spec.endswith("decay")]
    for name in decays:
        good = arguments(op, function)
        bad = {**good, name: good[name].abs()}
        called = f"({name}|gk)" if op.name == "gla" else name
        with (
            checked_inputs(),
            pytest.raises(ValueError, match=rf"{called} holds .* in \(-inf, 0\]"),
        ):
            function(**bad)
        with checked_inputs():
            function(**good)
        o = function(**bad)
        assert (o if isinstance(o, torch.Tensor) else o[0]).isfinite().all()


def test_one_dtype_for_queries_keys_and_values():
    x = GDN.inputs(1, 10, 2, 8, 6)
    with pytest.raises(ValueError, match=r"k has dtype torch\.float64 but q has torch\.float32"):
        gdr.chunk_gated_delta_rule(**{**x, "k": x["k"].double()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(use_gate_in_kernel=True), "use_gate_in_kernel needs g .* and A_log"),
        (dict(allow_neg_eigval=True), "allow_neg_eigval doubles the in-kernel sigmoid"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), r"A_log has shape \[3\]"),
    ],
)
@pytest.mark.parametrize(
    "function", [gdr.chunk_gated_delta_rule, gdr.fused_recurrent_gated_delta_rule]
)
def test_contradictory_gate_switches(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**GDN.inputs(1, 10, 2, 8, 6), **arguments)


def test_arguments_that_cannot_be_honoured():
    x = GDN.inputs(1, 10, 2, 8, 6)
    with pytest.raises(ValueError, match="chunk_indices is given without cu_seqlens"):
        gdr.chunk_gated_delta_rule(**x, chunk_indices=CU([[0, 0]]))
    for op in OPS:
        if "cp_context" in inspect.signature(op.chunk).parameters:
            with pytest.raises(
                ValueError, match=r"cp_context .* fla\.distributed\.sequence_parallel"
            ):
                op.chunk(**arguments(op, op.chunk), cp_context=object())
    with pytest.raises(ValueError, match="chunk_size is 0"):
        gdr.chunk_gated_delta_rule(**x, chunk_size=0)
    q, k, v = (x[n] for n in "qkv")
    with pytest.raises(ValueError, match="must be the pair"):
        linear_attn.chunk_linear_attn(q, k, v, initial_state=torch.zeros(1, 2, 8, 6))
    with pytest.raises(ValueError, match="belongs to normalize=True"):
        linear_attn.chunk_linear_attn(q, k, v, initial_state=(q, k), normalize=False)


def test_explicit_choices_are_kept_or_raise(monkeypatch, no_interpreter):
    x = GDN.inputs(1, 10, 2, 8, 6)
    with (
        stage.use_backend("triton"),
        pytest.raises(ValueError, match=r"asked for by use_backend\(\)"),
    ):
        gdr.chunk_gated_delta_rule(**x)
    monkeypatch.setenv("FLA_BACKEND", "triton")
    with pytest.raises(ValueError, match="asked for by the environment variable FLA_BACKEND"):
        gdr.chunk_gated_delta_rule(**x)
    with stage.use_backend("torch"):
        gdr.chunk_gated_delta_rule(**x)
    with pytest.raises(ValueError, match="expected one of"), stage.use_backend("cpu"):
        pass


def test_explain_tells_what_runs_and_why():
    x = GDN.inputs(1, 10, 2, 8, 6, dtype=torch.bfloat16)
    text = str(explain(gdr.chunk_gated_delta_rule, **x))
    for part in ("chunk_gated_delta_rule on cpu", "bfloat16 in, computed in float32", "not triton"):  # fmt: skip
        assert part in text
    form = {"native": "chunks of 16 tokens in C++", "torch": "chunk form"}
    best = "torch" if library.MISSING else "native"
    assert f"runs: {best}, {form[best]}" in text
    wide = explain(gdr.chunk_gated_delta_rule, *(y.double() for y in x.values()))
    assert wide.backend == "torch" and wide.rejected["native"] == "fp64 is computed by torch"
    asked = explain(gdr.fused_recurrent_gated_delta_rule, **x, backend="torch")
    assert "asked for by the call" in asked.why and asked.form.startswith("token form")
    with pytest.raises(ValueError, match="ran no stage of fla"):
        explain(torch.add, x["q"], x["q"])
    with pytest.raises(TypeError, match="missing 3 required positional arguments"):
        explain(gdr.chunk_gated_delta_rule)
