# SPDX-License-Identifier: MIT
"""What is particular to one page: options, further forms, published names."""

import pytest
import torch
import torch.nn.functional as F

import fla.ops as ops
from fla.ops import delta_rule, gated_delta_rule, linear_attn, simple_gla
from fla.ops.engine.recurrence.terms import L2_EPS
from fla.ops.registry import OPS
from tests.helpers import assert_same, gradients
from tests.ops import properties as P

BY_NAME = {op.name: op for op in OPS}
GDN = BY_NAME["gated_delta_rule"]


def make(op, T=70, **kwargs):
    return P.leaves(op.inputs(2, T, 2, P.K, P.V, dtype=torch.float64, **kwargs))


def test_every_published_name_resolves():
    for names in ops.NAMES.values():
        for name in names:
            assert callable(getattr(ops, name))


@pytest.mark.parametrize("form", ["chunk", "token"])
@pytest.mark.parametrize("HV", [2, 4])
def test_l2norm_inside_equals_outside(form, HV):
    x = make(GDN, HV=HV)
    function = getattr(GDN, form)
    inside = GDN.call(function, x, use_qk_l2norm_in_kernel=True)
    norm = {
        n: t * (t.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() if n in "qk" else t
        for n, t in x.items()
    }
    outside = GDN.call(function, norm)
    want = gradients(outside, x)
    for got, expected, what in zip(inside, outside, ("o", "state"), strict=True):
        assert_same(got, expected, what)
    for name, grad in gradients(inside, x).items():
        assert_same(grad, want[name], f"d{name}")


def test_l2norm_is_finite_at_zero_vectors():
    x = {n: t.detach().zero_().requires_grad_() if n in "qk" else t for n, t in make(GDN).items()}
    out = GDN.call(GDN.chunk, x, use_qk_l2norm_in_kernel=True)
    assert all(g.isfinite().all() for g in gradients(out, x).values())


@pytest.mark.parametrize("form", ["chunk", "token"])
def test_gates_in_kernel_equal_gates_outside(form):
    x, function = make(GDN), getattr(GDN, form)
    A_log, dt_bias = torch.randn(2, 2, dtype=torch.float32).unbind()
    o, _ = function(
        **x,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )
    g = -A_log.exp() * F.softplus(x["g"].float() + dt_bias)
    want, _ = function(**{**x, "g": g, "beta": 2 * x["beta"].float().sigmoid()})
    assert_same(o, want, "o", rtol=1e-6)


@pytest.mark.parametrize("form", ["chunk", "token"])
def test_state_v_first_is_the_transpose(form):
    x, state = make(GDN), P.random_state(2, 2)
    function = getattr(GDN, form)
    o, final = function(**x, initial_state=state, output_final_state=True)
    o_t, final_t = function(
        **x, initial_state=state.mT, output_final_state=True, state_v_first=True
    )
    assert_same(o_t, o, "o")
    assert_same(final_t, final.mT, "state")


def test_absent_gates_are_neutral():
    x = make(GDN)
    neutral = {**x, "g": torch.zeros_like(x["g"]), "beta": torch.ones_like(x["beta"])}
    bare = {n: x[n] for n in "qkv"}
    for function in (GDN.chunk, GDN.token):
        assert_same(function(**bare)[0], function(**neutral)[0], function.__name__)
    assert_same(
        delta_rule.fused_recurrent_delta_rule(**bare)[0], GDN.chunk(**bare)[0], "delta rule"
    )


def test_channel_gates_of_the_recurrent_form():
    """gk and gv act on the rows and columns of the state, beta may differ by value channel."""
    x = make(GDN, T=6)
    gk, gv = (
        -torch.rand(2, 6, 2, P.K, dtype=torch.float64),
        -torch.rand(2, 6, 2, P.V, dtype=torch.float64),
    )
    beta = torch.rand(2, 6, 2, P.V, dtype=torch.float64)
    o, final = GDN.token(x["q"], x["k"], x["v"], x["g"], gk, gv, beta, output_final_state=True)
    S, outs = torch.zeros(2, 2, P.K, P.V, dtype=torch.float64), []
    for t in range(6):
        S = (
            S
            * x["g"][:, t, :, None, None].exp()
            * gk[:, t, :, :, None].exp()
            * gv[:, t, :, None, :].exp()
        )
        u = beta[:, t] * (x["v"][:, t] - torch.einsum("bhkv,bhk->bhv", S, x["k"][:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", x["k"][:, t], u)
        outs.append(torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]) * P.K**-0.5)
    assert_same(o, torch.stack(outs, 1), "o")
    assert_same(final, S, "state")


def test_long_token_form_recomputes_the_same_gradients():
    x = make(GDN, T=200)
    want = gradients(GDN.call(GDN.chunk, x), x)
    for name, grad in gradients(GDN.call(GDN.token, x), x).items():
        assert_same(grad, want[name], f"d{name}", rtol=1e-10)


def test_naive_gated_delta_rule_forms():
    x = make(GDN)
    o, S = gated_delta_rule.naive_chunk_gated_delta_rule(
        **x, chunk_size=32, output_final_state=True
    )
    want_o, want_S = GDN.chunk(**x, output_final_state=True)
    assert_same(o, want_o, "o")
    assert_same(S, want_S, "state")


def test_head_first_delta_rule_names():
    x = make(BY_NAME["delta_rule"])
    want, S = delta_rule.chunk_delta_rule(**x, output_final_state=True)
    head_first = {n: t.transpose(1, 2) for n, t in x.items()}
    for o in (
        delta_rule.delta_rule_recurrence(**head_first)[0],
        delta_rule.delta_rule_chunkwise(**head_first)[0],
        delta_rule.delta_rule_parallel(**head_first)[0],
    ):
        assert_same(o.transpose(1, 2), want, "o")
    assert_same(delta_rule.delta_rule_chunkwise(**head_first)[1], S, "state")


def test_simple_gla_forms():
    x = make(BY_NAME["simple_gla"])
    want, S = simple_gla.chunk_simple_gla(**x, output_final_state=True)
    o, A = simple_gla.parallel_simple_gla(**x, output_attentions=True)
    assert_same(o, want, "parallel")
    assert_same(torch.einsum("bhij,bjhv->bihv", A, x["v"]), want, "attention")
    assert simple_gla.parallel_simple_gla(**x)[1] is None
    assert_same(simple_gla.naive_parallel_simple_gla(**x)[0], want, "naive parallel")
    assert_same(simple_gla.naive_chunk_simple_gla(**x, chunk_size=30)[0], want, "naive chunk")
    assert_same(
        simple_gla.fused_chunk_simple_gla(**x, output_final_state=True)[1], S, "fused chunk"
    )


def test_constant_decay_is_a_decay_with_a_gradient():
    x = make(BY_NAME["simple_gla"])
    gamma = torch.tensor([-0.1, -0.5], dtype=torch.float64, requires_grad=True)
    want, _ = simple_gla.chunk_simple_gla(x["q"], x["k"], x["v"], gamma.expand(2, 70, 2))
    want_grad = gradients([want], {"gamma": gamma})["gamma"]
    for function in (simple_gla.chunk_simple_gla, simple_gla.fused_recurrent_simple_gla):
        o, _ = function(x["q"], x["k"], x["v"], g_gamma=gamma)
        assert_same(o, want, "o")
        assert_same(
            gradients([o], {"gamma": gamma})["gamma"],
            want_grad,
            "dgamma",
        )
    both, _ = simple_gla.chunk_simple_gla(**x, g_gamma=gamma)
    assert_same(both, simple_gla.chunk_simple_gla(**{**x, "g": x["g"] + gamma})[0], "g and gamma")


def test_parallel_attention_stays_inside_its_sequence():
    x = {n: t[:1] for n, t in make(BY_NAME["simple_gla"]).items()}
    o, A = simple_gla.parallel_simple_gla(
        **x, output_attentions=True, cu_seqlens=torch.tensor([0, 30, 70])
    )
    assert A[..., 30:, :30].abs().max() == 0
    assert_same(torch.einsum("bhij,bjhv->bihv", A, x["v"]), o, "o")


@pytest.mark.parametrize("packed", [False, True])
def test_normalized_linear_attention(packed):
    x = {n: t.detach().abs()[:1].requires_grad_() for n, t in make(BY_NAME["linear_attn"]).items()}
    options = dict(normalize=True, output_final_state=True)
    if packed:
        parts = [
            linear_attn.naive_recurrent_linear_attn(
                **{n: t[:, s] for n, t in x.items()}, normalize=True
            )[0]
            for s in (slice(0, 30), slice(30, 70))
        ]
        want, options["cu_seqlens"] = torch.cat(parts, 1), torch.tensor([0, 30, 70])
    else:
        want, _ = linear_attn.naive_recurrent_linear_attn(**x, normalize=True)
        assert_same(linear_attn.naive_chunk_linear_attn(**x, normalize=True), want, "naive chunk")
    for function in (linear_attn.chunk_linear_attn, linear_attn.fused_recurrent_linear_attn):
        o, (S, z) = function(**x, **options)
        assert_same(o, want, "o")
        assert z.shape == (S.shape[0], 1, 2, P.K)
    if not packed:
        first, state = linear_attn.chunk_linear_attn(
            *(t[:, :20] for t in x.values()), output_final_state=True
        )
        rest, _ = linear_attn.chunk_linear_attn(
            *(t[:, 20:] for t in x.values()), initial_state=state
        )
        assert_same(torch.cat([first, rest], 1), want, "split")


def test_autocast_does_not_reach_the_recurrence():
    x = {n: t.float() for n, t in make(GDN).items()}
    want, _ = GDN.chunk(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (GDN.chunk, GDN.token):
            assert (function(**x)[0] - want).abs().max() < 1e-5
        leaf = {n: t.detach().requires_grad_() for n, t in x.items()}
        grads = gradients([GDN.chunk(**leaf)[0]], leaf)
    exact = gradients([GDN.chunk(**leaf)[0]], leaf)
    for name in grads:
        torch.testing.assert_close(grads[name], exact[name])


def test_equal_keys_do_not_grow_the_solve():
    """Repeated tokens: the inverse of the chunk's system stays small, and so must its rounding
    errors."""
    x = GDN.inputs(1, 256, 1, 32, 32)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["g"], x["beta"] = torch.zeros_like(x["g"]), torch.ones_like(x["beta"])
    exact, _ = GDN.chunk(**{n: t.double() for n, t in x.items()})
    assert (GDN.chunk(**x)[0] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_host_boundaries_are_used_and_checked():
    x = {n: t[:1] for n, t in make(GDN).items()}
    cu = torch.tensor([0, 30, 70])
    assert torch.equal(
        GDN.chunk(**x, cu_seqlens=cu)[0],
        GDN.chunk(**x, cu_seqlens=cu, cu_seqlens_cpu=cu.clone())[0],
    )
    with pytest.raises(ValueError, match="cu_seqlens_cpu differs"):
        GDN.chunk(**x, cu_seqlens=cu, cu_seqlens_cpu=torch.tensor([0, 31, 70]))
    with pytest.raises(ValueError, match="host copy"):
        GDN.chunk(**x, cu_seqlens_cpu=cu)
