# SPDX-License-Identifier: MIT
"""What is particular to one page of the wider family: further forms, gates, published names."""

import pytest
import torch
import torch.nn.functional as F

from fla.ops import (
    abc,
    based,
    comba,
    deltaformer,
    gdn2,
    generalized_delta_rule,
    gsa,
    hgrn,
    kda,
    mamba,
    mamba2,
    mesa_net,
    precond_gated_delta_rule,
    precond_kda,
    rebased,
    retention,
    rwkv4,
    rwkv6,
    rwkv7,
    ttt,
)
from fla.ops import log_linear_attn as log_linear
from fla.ops.registry import OPS
from tests.helpers import assert_same, gradients
from tests.ops import properties as P

BY_TITLE = {op.title: op for op in OPS}


def make(title, T=70, **sizes):
    return P.leaves(BY_TITLE[title].inputs(2, T, 2, P.K, P.V, dtype=torch.float64, **sizes))


def head_first(x):
    return {n: t.transpose(1, 2) for n, t in x.items()}


def test_retention_as_one_matrix():
    x = make("Retention")
    want, _ = retention.chunk_retention(**x)
    assert_same(retention.naive_retention(**head_first(x)).transpose(1, 2), want, "o")
    o, A = retention.parallel_retention(**x, output_attentions=True)
    assert_same(o, want, "parallel")
    assert_same(torch.einsum("bhij,bjhv->bihv", A, x["v"]), want, "attention")


def test_hgrn_chunk_by_chunk():
    x = make("HGRN")
    want, S = hgrn.chunk_hgrn(**x, output_final_state=True)
    o, state = hgrn.naive_chunk_hgrn(**x, output_final_state=True, chunk_size=32)
    assert_same(o, want, "o")
    assert_same(state, S, "state")


@pytest.mark.parametrize("rank", ["DPLR", "IPLR"])
def test_head_first_low_rank_names(rank):
    x = make(f"Generalised delta rule ({rank})")
    want = BY_TITLE[f"Generalised delta rule ({rank})"].call(
        BY_TITLE[f"Generalised delta rule ({rank})"].chunk, x
    )
    x = head_first(x)
    x["alpha"], x["beta"] = x.pop("a"), x.pop("b")
    for form in ("recurrence", "chunkwise"):
        o, S = getattr(generalized_delta_rule, f"{rank.lower()}_{form}")(**x)
        assert_same(o.transpose(1, 2), want[0], form)
        assert_same(S, want[1], form)


@pytest.mark.parametrize(
    "page", [kda.naive_chunk_kda, gdn2.naive_chunk_gdn2, comba.naive_chunk_comba]
)
def test_naive_chunk_forms(page):
    title = {"kda": "Kimi delta attention", "gdn2": "Gated DeltaNet 2", "comba": "Comba"}
    op = BY_TITLE[title[page.__name__.rpartition("_")[2]]]
    x = make(op.title)
    got = list(page(**x, chunk_size=32, output_final_state=True))
    P.results(got, op.call(op.chunk, x), page.__name__)


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_kda_gates_in_kernel_equal_gates_outside(form):
    x, function = make("Kimi delta attention"), getattr(kda, f"{form}_kda")
    A_log, dt_bias = torch.randn(2).double(), torch.randn(2 * P.K).double()
    switches = dict(use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias)
    beta = dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    o, _ = function(**x, **switches, **beta)
    raw = x["g"] + dt_bias.view(2, P.K)
    g = -A_log.exp()[:, None] * F.softplus(raw)
    want, _ = function(**{**x, "g": g, "beta": 2 * x["beta"].sigmoid()})
    assert_same(o, want, "softplus gate")
    assert_same(kda.naive_kda_gate(x["g"], A_log, dt_bias), g, "gate")
    o, _ = function(**x, **switches, lower_bound=-5.0)
    g = -5 * (A_log.exp()[:, None] * raw).sigmoid()
    assert_same(o, function(**{**x, "g": g})[0], "bounded gate")
    assert_same(kda.naive_kda_lowerbound_gate(x["g"], A_log, dt_bias), g, "gate")


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (dict(use_gate_in_kernel=True), "needs A_log"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), r"A_log has shape \[3\]; 2 values"),
        (dict(use_gate_in_kernel=True, safe_gate=True, A_log=torch.zeros(2)), "lower_bound"),
        (dict(use_gate_in_kernel=True, lower_bound=1.0), "a log decay below 0"),
        (dict(allow_neg_eigval=True), "doubles the in-kernel sigmoid"),
        (dict(use_graph=True), "use_graph is not supported"),
        (dict(cp_context=object()), "cp_context is a object no such context"),
    ],
)
def test_kda_switches_that_contradict_or_cannot_be_honoured(switches, message):
    with pytest.raises(ValueError, match=message):
        kda.chunk_kda(**make("Kimi delta attention", 5), **switches)


def test_gdn2_with_one_gate_is_kda():
    x = make("Kimi delta attention")
    beta = x.pop("beta").unsqueeze(-1)
    b, w = beta.expand_as(x["k"]), beta.expand_as(x["v"])
    for normed in (False, True):
        got = gdn2.chunk_gdn2(**x, b=b, w=w, use_qk_l2norm_in_kernel=normed)[0]
        want = kda.chunk_kda(**x, beta=beta[..., 0], use_qk_l2norm_in_kernel=normed)[0]
        assert_same(got, want, f"normed={normed}")


def test_slots_that_average():
    x = make("ABC")
    want, _ = abc.chunk_abc(**x)
    assert_same(abc.naive_cumsum_abc(**x)[0], want, "o")
    assert_same(gsa.chunk_gsa(**x)[0], want, "gsa without g")
    huge = {**x, "s": 300 * x["s"]}
    single = {n: t.float() for n, t in huge.items()}
    assert (abc.chunk_abc(**single)[0] - abc.chunk_abc(**huge)[0]).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"without g \(S, R, z\) was expected"):
        abc.chunk_abc(**x, initial_state=(torch.zeros(1), torch.zeros(1)))


def test_rwkv6_bonus_reaches_the_gradient():
    x = make("RWKV-6", 5)
    o, _ = rwkv6.chunk_rwkv6(**x)
    assert gradients([o], {"u": x["u"]})["u"].abs().min() > 0


def test_rwkv7_elementwise_maps():
    x, delta = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    mixes = torch.randn(5, 1, 1, 8).unbind()
    out = rwkv7.fused_addcmul_rwkv7(x, delta, *mixes)
    assert out[5] is None
    for got, mix in zip(out, mixes, strict=False):
        torch.testing.assert_close(got, x + delta * mix)
    a, ka = torch.rand(2, 3, 8), torch.rand(8)
    torch.testing.assert_close(rwkv7.fused_k_rwkv7(x, a, ka), x * (1 + (a - 1) * ka))
    y, last = rwkv7.channel_mixing_rwkv7(
        x, delta[:, 0], torch.rand(8), torch.randn(8, 16), torch.randn(16, 8)
    )
    assert y.shape == x.shape and torch.equal(last, x[:, -1])
    o, r, k, v = torch.randn(4, 2, 3, 2, 4).unbind()
    g, r_k = torch.randn(2, 3, 8), torch.randn(2, 4)
    want = (o.flatten(2) + ((r * k * r_k).sum(-1, True) * v).flatten(2)) * g
    torch.testing.assert_close(rwkv7.gate_output_correction(o.flatten(2), r, k, r_k, v, g), want)
    kk, rate = F.normalize(k, dim=-1), torch.rand_like(k)
    w = -torch.rand_like(k)
    got, _ = rwkv7.fused_mul_recurrent_rwkv7(r, w, k, v, kk, rate)
    torch.testing.assert_close(got, rwkv7.chunk_rwkv7(r, w, k, v, -kk, kk * rate)[0])


def test_rwkv4_is_transformers():
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    w, u = torch.randn(2, 8).unbind()
    k, v = torch.randn(2, 2, 70, 8).unbind()
    want, state = rwkv_linear_attention_cpu(w, u, k, v, return_state=True)
    o, final = rwkv4.chunk_rwkv4(w, u, k, v)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    num, den, top = state
    average, _, log_b = final[:, :, 0].unbind(1)
    torch.testing.assert_close(average, num / den, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_b, top + den.log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [mamba2.chunk_mamba2, mamba2.fused_recurrent_mamba2])
def test_mamba2_step_sizes_and_skip(function):
    x = make("Mamba-2")
    bias, D = torch.randn(2).double(), torch.randn(2, P.V).double()
    o, _ = function(**x, D=D, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 1.0))
    dt = F.softplus(x["dt"] + bias).clamp(0.1, 1.0)
    want, _ = function(**{**x, "dt": dt})
    assert_same(o, want + D * x["x"], "o")
    assert_same(function(**x, D=D[:, 0])[0], function(**x)[0] + D[:, :1] * x["x"], "D [H]")


def test_mamba_step_sizes_and_skip():
    x = make("Mamba")
    bias, D = torch.randn(2, 16).double().unbind()
    for function in (mamba.chunk_mamba, mamba.fused_recurrent_mamba):
        o, _ = function(**x, D=D, dt_bias=bias, dt_softplus=True)
        want, _ = function(**{**x, "dt": F.softplus(x["dt"] + bias)})
        assert_same(o, want + D * x["x"], "o")


@pytest.mark.parametrize("K", [3, 12])
@pytest.mark.parametrize("normed", [False, True])
def test_polynomial_attention_forms(K, normed):
    op = BY_TITLE["Based"]
    x = P.leaves(op.inputs(2, 70, 2, K, 5, dtype=torch.float64))
    want = based.naive_parallel_based(**x, use_norm=normed)
    for o in (
        based.parallel_based(**x, use_norm=normed),
        based.fused_chunk_based(**x, use_norm=normed),
    ):
        assert_same(o, want, "based")
    want_grads = gradients([want], x)
    P.grads_equal(gradients([based.parallel_based(**x, use_norm=normed)], x), want_grads, "based")
    want = rebased.naive_parallel_rebased(**x, use_norm=normed)
    assert_same(rebased.parallel_rebased(**x, use_normalize=normed), want, "rebased")
    assert_same(rebased.chunk_rebased(**x, use_normalize=normed)[0], want, "rebased chunk")
    o, z = rebased.parallel_rebased(**x, return_both=True)
    assert_same(o / (z[..., None] + 1e-5), rebased.naive_parallel_rebased(**x), "both")


def test_mesa_net_decodes_by_conjugate_gradients():
    x = make("MesaNet", 9)
    want, A, S = mesa_net.chunk_mesa_net(**x, output_final_state=True)
    states = torch.zeros_like(A), torch.zeros_like(S)
    for t in range(9):
        now = {n: x[n][:, t] for n in ("q", "k", "v", "g", "beta")}
        o, *states = mesa_net.mesa_net_decoding_one_step(
            **now, lamb=x["lamb"], prev_h_kk=states[0], prev_h_kv=states[1]
        )
        assert_same(o, want[:, t], f"token {t}", rtol=1e-9)
    assert_same(states[0], A, "A")
    few, _, _ = mesa_net.chunk_mesa_net(**x, max_CG_iteration=1)
    assert (few - want).abs().max() > 1e-6
    with pytest.raises(ValueError, match="max_CG_iteration is 0"):
        mesa_net.chunk_mesa_net(**x, max_CG_iteration=0)


@pytest.mark.parametrize("cut", [1, 63, 64, 101])
def test_log_linear_attention_is_its_matrix_and_goes_on_anywhere(cut):
    x = make("Log-linear attention", 130)
    whole, state = log_linear.chunk_log_linear_attn(**x, output_final_state=True)
    assert_same(log_linear.naive_log_linear_attn(**x), whole, "matrix")
    op = BY_TITLE["Log-linear attention"]
    first, middle = log_linear.chunk_log_linear_attn(
        **op.tokens(x, 0, cut), output_final_state=True
    )
    second, final = log_linear.fused_recurrent_log_linear_attn(
        **op.tokens(x, cut, 130), initial_state=middle, output_final_state=True
    )
    assert_same(torch.cat([first, second], 1), whole, "split")
    assert_same(final.levels, state.levels, "levels")
    assert final.offsets.tolist() == [130, 130]
    full = (state.levels.abs().amax((0, 1, 3, 4)) > 0).tolist()
    assert full == [bool(130 >> bit & 1) for bit in range(10)]
    with pytest.raises(ValueError, match="level_scales has 3 levels, but position 129 needs 9"):
        log_linear.chunk_log_linear_attn(**{**x, "level_scales": x["level_scales"][..., :3]})


@pytest.mark.parametrize("C", [1, 7, 128])
def test_deltaformer_goes_on_from_its_state(C):
    x = make("DeltaFormer", 40)
    op = BY_TITLE["DeltaFormer"]
    want = deltaformer.naive_deltaformer_attn(**x)[0]
    first, state = deltaformer.deltaformer_attn(**op.tokens(x, 0, 13), C=C, output_final_state=True)
    second = deltaformer.deltaformer_attn(**op.tokens(x, 13, 40), C=C, initial_state=state)
    got = torch.cat([first, second], 1)
    assert_same(got, want, "split")
    P.grads_equal(gradients([got], x), gradients([want], x), "split")


def test_deltaformer_padding_is_not_there():
    x = make("DeltaFormer", 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4], mask[1, 5:7] = 0, 0
    o = deltaformer.deltaformer_attn(**x, attention_mask=mask)
    for b in range(2):
        real = mask[b].bool()
        alone = deltaformer.deltaformer_attn(**{n: t[b : b + 1, real] for n, t in x.items()})
        assert_same(o[b : b + 1, real], alone, f"row {b}")
        assert o[b, ~real].abs().max() == 0
    with pytest.raises(ValueError, match="cannot be combined with a state"):
        deltaformer.deltaformer_attn(**x, attention_mask=mask, output_final_state=True)
    with pytest.raises(ValueError, match="states of different lengths"):
        rows = {n: t[:1] for n, t in x.items()}
        deltaformer.deltaformer_attn(
            **rows, cu_seqlens=torch.tensor([0, 5, 12]), output_final_state=True
        )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.title)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_literal_loops_take_half_precision_and_fp32_states(op, dtype):
    x = op.inputs(2, 3, 2, 8, 8, dtype=dtype)
    if op.name in ("deltaformer", "mesa_net"):
        pytest.skip("its loop is no naive_recurrent_*")
    states = op.states(2, 2, 8, 8, dtype=torch.float32)
    got = op.call(op.naive, x, states)
    want = op.call(op.naive, {n: y.float() for n, y in x.items()}, states)
    assert got[0].dtype == dtype and torch.equal(got[0], want[0].to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize("name", ["gated_delta_rule", "kda"])
def test_preconditioned_rules_have_their_published_default(name):
    page = {"kda": precond_kda, "gated_delta_rule": precond_gated_delta_rule}[name]
    one, beta, zero = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    x = dict(q=one, k=one, v=one, g=0 * one if name == "kda" else zero, g_atk=zero)
    for form in ("chunk", "fused_recurrent", "naive_recurrent"):
        o = getattr(page, f"{form}_precond_{name}")(**x, beta_atk=beta, beta=beta)[0]
        assert abs(o.item() - 0.934655) < 2e-6


def test_ttt_reads_with_its_own_rate_and_keeps_the_last():
    q, k, v = torch.randn(3, 1, 2, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    eta = torch.tensor([0.1, 0.2]).double().view(1, 2, 1, 1)
    w, b = torch.ones(1, 2).double(), torch.zeros(1, 2).double()
    for form in (ttt.chunk_ttt_linear, ttt.chunk_ttt_linear_ref):
        S = form(q, k, v, w, b, eta, output_final_state=True)[1]
        assert abs(S.flatten()[0].item() - 54.4487) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rwkv7_maps_round_once(dtype):
    def check(function, *arguments):
        wide = [x.double() for x in arguments]
        got, want = function(*arguments), function(*wide)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for x, y in pairs:
            if x is not None:
                assert (x.double() - y).norm() < torch.finfo(dtype).eps / 2 * y.norm()

    x, delta, k, a = torch.randn(4, 2, 9, 8).to(dtype)
    check(rwkv7.fused_addcmul_rwkv7, x, delta, *torch.randn(6, 1, 1, 8).to(dtype))
    check(rwkv7.fused_k_rwkv7, k, a, torch.rand(8).to(dtype))
    r, k, v = torch.randn(3, 2, 9, 2, 4).to(dtype)
    check(rwkv7.gate_output_correction, x, r, k, torch.randn(2, 4).to(dtype), v, delta)


def test_rwkv7_channel_mixing_takes_both_shapes_of_the_token_before():
    x, before = torch.randn(2, 3, 8), torch.randn(2, 8)
    weights = torch.rand(8), torch.randn(8, 16), torch.randn(16, 8)
    y, last = rwkv7.channel_mixing_rwkv7(x, before, *weights)
    same, column = rwkv7.channel_mixing_rwkv7(x, before[:, None], *weights, inplace=False)
    assert torch.equal(y, same) and torch.equal(column, last[:, None])
    with pytest.raises(ValueError, match=r"x_prev has shape \[8\]"):
        rwkv7.channel_mixing_rwkv7(x, before[0], *weights)
