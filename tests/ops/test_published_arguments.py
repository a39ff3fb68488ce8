# SPDX-License-Identifier: MIT
"""Arguments that callers of the published operators pass: what each of them does."""

import importlib.util
import warnings
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from fla import use_backend
from fla.ops import (
    comba,
    gsa,
    kda,
    log_linear_attn,
    precond_gated_delta_rule,
    precond_kda,
    rwkv7,
    titans,
)
from fla.ops import gated_delta_product as products
from fla.ops.engine.native import library
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_gdn_gate
from fla.ops.gdn2 import chunk_gdn2
from fla.ops.registry import OPS
from tests.helpers import assert_same, matrix

FORMER = ("gla", "simple_gla", "retention", "gated_delta_rule", "kda", "gdn2")
BACKENDS = ["torch", *([] if library.MISSING else ["native"])]
TRITON = ["triton"] if importlib.util.find_spec("triton") else []  # on a CPU its interpreter


def case(name):
    return next(op for op in OPS if op.name == name)


def inputs(name, B=1, T=150, K=6, V=8, dtype=torch.float32, **sizes):
    return case(name).inputs(B, T, 2, K, V, dtype=dtype, **sizes)


@pytest.mark.parametrize(
    ("name", "form"),  # the published chunk form of retention has no such switch
    sorted(set(product(FORMER, ("chunk", "token"))) - {("retention", "chunk")}),
)
def test_the_former_name_of_state_v_first(name, form):
    op, x = case(name), inputs(name, T=9)
    function = getattr(op, form)
    want = function(**x, state_v_first=True, output_final_state=True)[1]
    with pytest.warns(FutureWarning, match="former name of state_v_first; pass state_v_first=True"):
        got = function(**x, transpose_state_layout=True, output_final_state=True)[1]
    assert got.shape[-2:] == (8, 6) and torch.equal(got, want)
    with pytest.raises(ValueError, match="contradict each other"):
        function(**x, state_v_first=True, transpose_state_layout=False)


def states_of_a_loop(name, x, bounds, chunk):
    """The state before every chunk, by the page's literal loop on the tokens before it."""
    states = []
    for begin, end in pairwise(bounds):
        for at in range(begin, end, chunk):
            row = {n: y[:, begin:at].double() for n, y in x.items()}
            S = case(name).naive(**row, output_final_state=True)[1] if at > begin else None
            states.append(x["v"].new_zeros(1, 2, 6, 8).double() if S is None else S)
    return torch.stack(states, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["kda", "gdn2", "precond_kda"])
def test_intermediate_states(name, backend):
    x, op = inputs(name), case(name)
    function = op.chunk
    options = dict(return_intermediate_states=True, output_final_state=True) | op.chunk_fixed
    with use_backend(backend):
        for bounds in ([0, 150], [0, 70, 70, 134, 150]):
            packed = {} if len(bounds) == 2 else dict(cu_seqlens=torch.tensor(bounds))
            o, S, *_, h = function(**x, **packed, **options)
            want = function(**x, **packed, **op.chunk_fixed, output_final_state=True)
            assert_same(o, want[0], "o")
            assert_same(S, want[1], "final state")
            exact = states_of_a_loop(name, x, bounds, 64)
            assert h.shape == exact.shape and h.dtype == torch.float32
            torch.testing.assert_close(h.double(), exact, rtol=1e-4, atol=1e-5)
        two = function(**inputs(name, B=2, T=70), **options)
        assert two[-1].shape == (2, 2, 2, 6, 8) and two[0].shape[:2] == (2, 70)
        assert function(**inputs(name, T=0), **options)[-1].shape == (1, 0, 2, 6, 8)


def test_intermediate_states_go_on_from_a_state_in_its_layout():
    x = inputs("kda", T=70)
    S = torch.randn(1, 2, 8, 6)
    _, _, h = kda.chunk_kda(
        **x, initial_state=S, state_v_first=True, return_intermediate_states=True
    )
    assert torch.equal(h[:, 0], S)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        kda.chunk_kda(**x, chunk_size=0, return_intermediate_states=True)
    x["v"].requires_grad_()
    with pytest.raises(ValueError, match="return_intermediate_states while a gradient is recorded"):
        kda.chunk_kda(**x, return_intermediate_states=True)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_intermediate_states_of_no_chunk_size(size):
    with pytest.raises(
        (ValueError, TypeError), match=f"chunk_size is {size}; expected a whole number"
    ):
        kda.chunk_kda(**inputs("kda", T=9), chunk_size=size, return_intermediate_states=True)


@pytest.mark.parametrize(
    ("name", "backend"),
    matrix(
        product(
            ["gated_delta_rule", "kda", "gdn2", "precond_kda", "comba", "delta_rule"],
            [*BACKENDS, *TRITON],
        ),
        lambda name, backend: backend != "triton" or name == "kda",
    ),
)
def test_keys_in_fp32_beside_values_in_half(name, backend):
    """What an l2norm outside the operator leaves."""
    op, exact = case(name), inputs(name, T=40, dtype=torch.float64)
    half = {n: y.bfloat16() for n, y in exact.items()}
    mixed = half | {n: half[n].float() for n in "qk"}
    with use_backend(backend):
        for function in (op.chunk, op.token):
            o, final = op.call(function, mixed)[:2]
            want = op.call(function, {n: y.float() for n, y in half.items()})
            assert torch.equal(o, want[0].bfloat16())  # fp32 computes, and o is rounded once
            assert torch.equal(final, want[1])
            with pytest.raises(ValueError, match=r"dtype torch\.(float64|float32|bfloat16)"):
                op.call(function, mixed | {"v": mixed["v"].double()})


def test_gates_by_their_published_names():
    g, A_log, dt_bias = torch.randn(1, 5, 2, 3), torch.randn(2), torch.randn(6)
    plain = -A_log.exp()[:, None] * F.softplus(g + dt_bias.view(2, 3))
    bounded = -5 * (A_log.exp()[:, None] * (g + dt_bias.view(2, 3))).sigmoid()
    assert_same(kda.fused_kda_gate(g, A_log, dt_bias), plain, "gate")
    assert_same(kda.fused_kda_gate(g, A_log, dt_bias, lower_bound=-5.0), bounded, "bounded")
    assert_same(kda.fused_kda_gate(g, None, None, -5.0), -5 * g.sigmoid(), "without A_log")
    assert kda.fused_kda_gate(g, A_log, output_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert kda.naive_kda_lowerbound_gate(g, A_log, None, -5.0, torch.half).dtype == torch.half
    scalar = fused_gdn_gate(g[..., 0], A_log, dt_bias[:2], torch.float16)
    assert_same(scalar, (-A_log.exp() * F.softplus(g[..., 0] + dt_bias[:2])).half(), "gdn")
    flat = kda.fused_kda_gate(g[0], A_log, dt_bias)  # [T, H, K], as kernels for decoding take it
    assert_same(flat, plain[0], "without a batch axis")
    assert_same(fused_gdn_gate(g[0, ..., 0], A_log), -A_log.exp() * F.softplus(g[0, ..., 0]), "T")
    for wrong, message in (
        (lambda: kda.fused_kda_gate(g, None), "the gate needs A_log, .*or a lower_bound"),
        (lambda: kda.fused_kda_gate(g, A_log, None, 1.0), "lower_bound is 1.0; a log decay below"),
        (lambda: kda.naive_kda_gate(g, A_log.repeat(2)), r"A_log has shape \[4\]; 2 values"),
        (lambda: kda.naive_kda_gate(A_log, A_log), r"g has shape \[2\]; \[..., H, K\]"),
        (lambda: fused_gdn_gate(g, A_log), r"g has shape \[1, 5, 2, 3\]; \[..., 2\] was"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("kda", dict(A_log=torch.randn(2), dt_bias=torch.randn(12), lower_bound=-5.0)),
        ("gdn2", dict(A_log=torch.randn(2), dt_bias=torch.randn(12), lower_bound=-5.0)),
        ("precond_kda", dict(A_log=torch.randn(2), lower_bound=-5.0)),
        ("gated_delta_rule", dict(A_log=torch.randn(2), dt_bias=torch.randn(2))),
        ("kda", dict(disable_recompute=True)),
        ("gdn2", dict(disable_recompute=True)),
        ("rwkv7", dict(disable_recompute=True)),
        ("precond_kda", dict(disable_recompute=True, solve_tril_precision="tf32x3")),
    ],
)
def test_what_changes_no_number(name, given):
    op, x = case(name), inputs(name, T=70)
    got = op.chunk(**x, **given, **op.chunk_fixed, **op.fixed)
    assert torch.equal(got[0], op.chunk(**x, **op.chunk_fixed, **op.fixed)[0])


@pytest.mark.parametrize("name", ["gsa", "mesa_net", "ttt", "gated_delta_rule", "precond_kda"])
def test_what_follows_from_the_boundaries_is_checked(name):
    op, x = case(name), inputs(name, T=48)
    bounds = torch.tensor([0, 16, 48])
    want = op.chunk(**x, cu_seqlens=bounds, **op.chunk_fixed)[0]
    got = op.chunk(**x, cu_seqlens=bounds, cu_seqlens_cpu=bounds, **op.chunk_fixed)[0]
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="cu_seqlens_cpu"):
        op.chunk(**x, cu_seqlens=bounds, cu_seqlens_cpu=bounds + 1, **op.chunk_fixed)
    if name in ("gated_delta_rule", "precond_kda"):
        chunks = torch.tensor([[0, 0], [1, 0]])
        op.chunk(**x, cu_seqlens=bounds, chunk_indices=chunks)
        with pytest.raises(ValueError, match=r"chunk_indices has shape \[2\]"):
            op.chunk(**x, cu_seqlens=bounds, chunk_indices=chunks[0])


def test_scale_of_log_linear_attention():
    x = inputs("log_linear_attn", T=20)
    for form in (
        log_linear_attn.chunk_log_linear_attn, log_linear_attn.fused_recurrent_log_linear_attn,
        lambda **a: [log_linear_attn.naive_log_linear_attn(**a)],
    ):  # fmt: skip
        one = form(**x)[0]
        torch.testing.assert_close(form(**x, scale=0.25)[0], one / 4)
        torch.testing.assert_close(form(**x, scale=None)[0], one * 6**-0.5)
    grouped = inputs("log_linear_attn", T=20, HV=4)
    expanded = grouped | {n: grouped[n].repeat_interleave(2, 2) for n in "qk"}
    want = log_linear_attn.naive_log_linear_attn(**expanded)
    got = log_linear_attn.chunk_log_linear_attn(**grouped)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_linear_attn.naive_log_linear_attn(**grouped), want)


def test_loops_of_packed_rows():
    bounds = torch.tensor([0, 4, 4, 11])
    x = inputs("gated_delta_product", T=11, dtype=torch.float64)
    naive = products.naive_recurrent_gated_delta_product
    o, S = naive(*x.values(), 0.5, bounds, None, True, 2)
    want, final = products.chunk_gated_delta_product(
        *x.values(), 2, 0.5, None, True, cu_seqlens=bounds
    )
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(S, final)
    normed = {n: F.normalize(y, dim=-1) if n in "qk" else y for n, y in x.items()}
    other = products.chunk_gated_delta_product_ref(
        *x.values(), 2, 0.5, None, True, bounds, use_qk_l2norm_in_kernel=True
    )[0]
    torch.testing.assert_close(other, naive(*normed.values(), 0.5, bounds, None, True, 2)[0],
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    x = inputs("precond_gated_delta_rule", T=11, dtype=torch.float64)
    page = precond_gated_delta_rule
    got = page.naive_recurrent_precond_gated_delta_rule(
        **x, cu_seqlens=bounds, output_final_state=True
    )
    want = page.chunk_precond_gated_delta_rule(
        **x, cu_seqlens=bounds, output_final_state=True, use_qk_l2norm_in_kernel=False
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_defaults_of_the_token_form_of_rwkv7_are_the_published_ones():
    x = inputs("rwkv7", T=9)
    o, S = rwkv7.fused_recurrent_rwkv7(**x)
    want, final = rwkv7.chunk_rwkv7(**x, scale=6**-0.5, output_final_state=True)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(S, final, rtol=1e-4, atol=1e-5)


def test_a_legacy_layout_compiles_and_warns_once_it_is_named():
    x = inputs("kda", T=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunk_gated_delta_rule(**inputs("gated_delta_rule", T=9))
        chunk_gdn2(**inputs("gdn2", T=9))
        precond_kda.chunk_precond_kda(**inputs("precond_kda", T=9), transpose_state_layout=True)
    compiled = torch.compile(kda.chunk_kda, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        S = compiled(**x, transpose_state_layout=True, output_final_state=True)[1]
    assert S.shape == (1, 2, 8, 6)


def test_comba_of_grouped_value_heads_is_its_equation():
    """q, k, p of head h // 2, by a loop in fp64."""
    x = inputs("comba", T=9, HV=4, dtype=torch.float64)
    q, k, v, p, g, beta = (x[n][0] for n in ("q", "k", "v", "p", "g", "beta"))
    want = torch.empty_like(v)
    for h in range(4):
        S = v.new_zeros(6, 8)
        for t in range(9):
            u = beta[t, h] * (v[t, h] - S.T @ p[t, h // 2])
            S = g[t, h].exp() * S + torch.outer(k[t, h // 2], u)
            want[t, h] = 6**-0.5 * S.T @ q[t, h // 2]
    assert_same(comba.chunk_comba(**x)[0][0], want, "chunk")
    assert_same(comba.fused_recurrent_comba(**x)[0][0], want, "token")
    assert_same(comba.naive_recurrent_comba(**x)[0][0], want, "naive")


def test_slot_attention_without_g_normalises_its_slots():
    x = inputs("gsa", T=9, dtype=torch.float64)
    s, _ = x.pop("s"), x.pop("g", None)
    z = s.logcumsumexp(1)
    before = torch.cat([torch.full_like(z[:, :1], -torch.inf), z[:, :-1]], 1)
    want = gsa.naive_recurrent_gsa(**x, s=(s - z).exp(), g=before - z)[0]
    assert_same(gsa.naive_recurrent_gsa(**x, s=s)[0], want, "o")


def test_both_loops_of_titans_are_one():
    x = inputs("titans", T=20, V=6, dtype=torch.float64)
    mini_batches, tokens = (
        titans.chunk_titans_linear_ref(**x, output_final_state=True, use_chunk=use)
        for use in (True, False)
    )
    assert_same(mini_batches[0], tokens[0], "o", rtol=1e-9)
    for a, b in zip(mini_batches[1], tokens[1], strict=True):
        assert_same(a, b, "state", rtol=1e-9)
