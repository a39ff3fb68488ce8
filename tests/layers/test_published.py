# SPDX-License-Identifier: MIT
"""What published layers compute, written out in fp64 token by token, beside ours."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import fla.layers as L
from fla.modules.feature_map import DPFPFeatureMap
from fla.ops.deltaformer import deltaformer_attn, naive_deltaformer_attn
from tests.helpers import assert_same

B, T, D = 2, 7, 32


def layer_and_input(kind, **arguments):
    """A layer in fp64 whose parameters are none of them at a special value, and its input."""
    torch.manual_seed(0)
    layer = kind(hidden_size=D, layer_idx=0, **arguments).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer, torch.randn(B, T, D, dtype=torch.float64)


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(conv, x):
    """`silu` of a causal convolution per channel."""
    weight, bias = conv.weight, getattr(conv, "bias", None)
    width = weight.shape[-1]
    y = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight, bias, groups=x.shape[-1])
    return F.silu(y.mT)


def heads(x, n):
    return x.unflatten(-1, (n, -1))


def deltaformer(q, k, v, beta):
    """u_t = v_t - beta_t sum_{j<t} softmax(q_t.k_j) u_j; o_t = sum_{j<=t} softmax(q_t.k_j) u_j."""
    us, out = [], []
    for t in range(q.shape[1]):
        scores = torch.einsum("bhk,bjhk->bhj", q[:, t], k[:, : t + 1]) * q.shape[-1] ** -0.5
        u = v[:, t]
        if t:
            weights = scores[..., :t].softmax(-1)
            u = u - beta[:, t, :, None] * torch.einsum("bhj,bjhv->bhv", weights, torch.stack(us, 1))
        us.append(u)
        out.append(torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), torch.stack(us, 1)))
    return torch.stack(out, 1)


def test_deltaformer_scores_both_stages_with_q():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, 11, 2, 4, generator=generator, dtype=torch.float64)
    beta = 3 * torch.randn(B, 11, 2, generator=generator, dtype=torch.float64)
    want = deltaformer(q, k, v, beta)
    for C in (1, 4, 128):
        assert_same(deltaformer_attn(q, k, v, beta, C=C), want, f"blocks of {C}")
    assert_same(naive_deltaformer_attn(q, k, v, beta)[0], want, "naive")
    inputs = [x[:1, :5].clone().requires_grad_() for x in (q, k, v, beta)]
    assert torch.autograd.gradcheck(lambda *x: deltaformer_attn(*x, C=2), inputs)


def test_deltaformer_layer_passes_beta_raw():
    layer, x = layer_and_input(L.DeltaFormerAttention, num_heads=2)
    q, k = layer.rotary(heads(layer.q_proj(x), 2), heads(layer.k_proj(x), 2))
    o = deltaformer(q, k, heads(layer.v_proj(x), 2), layer.b_proj(x))
    assert_same(layer(x)[0], layer.o_proj(o.flatten(-2)), "o")


def comba(layer, x, normalize_p):
    """The state is read before its decay; the output gate is a sigmoid."""
    q, k, v = (
        heads(convolved(getattr(layer, f"{n}_conv1d"), getattr(layer, f"{n}_proj")(x)), 2)
        for n in "qkv"
    )
    rate = layer.decay.sigmoid()[:, None]
    q = unit(q - layer.D[:, None] * rate * k)
    p = unit(rate * k) if normalize_p else rate * unit(k)
    k = unit(k)
    decay = (-layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)).exp()
    beta, out = layer.b_proj(x).sigmoid(), []
    S = x.new_zeros(B, 2, k.shape[-1], v.shape[-1])
    for t in range(T):
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, p[:, t]))
        S = decay[:, t, :, None, None] * S + k[:, t, ..., None] * u[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * k.shape[-1] ** -0.5)
    o = rms(torch.stack(out, 1), layer.o_norm.weight, 1e-5)
    return layer.o_proj((o * heads(layer.g_proj(x), 2).sigmoid()).flatten(-2))


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("normalize", [True, False])
def test_comba_normalises_p_and_gates_with_a_sigmoid(mode, normalize):
    arguments = {} if normalize else {"normalize_feedback": False}
    layer, x = layer_and_input(L.Comba, num_heads=2, head_dim=8, mode=mode, **arguments)
    assert_same(layer(x)[0], comba(layer, x, normalize), "o")


def slots(q, k, v, g):
    """o_t = Hv^T softmax(Hk^T q_t) over slots that decay by g and are written by 1 - exp(g)."""
    Hk = q.new_zeros(B, 2, k.shape[-1], g.shape[-1])
    Hv, out = q.new_zeros(B, 2, g.shape[-1], v.shape[-1]), []
    for t in range(T):
        f, s = g[:, t].exp(), 1 - g[:, t].exp()
        Hk = Hk * f[:, :, None] + k[:, t, ..., None] * s[:, :, None]
        Hv = Hv * f[..., None] + s[..., None] * v[:, t, :, None]
        p = torch.einsum("bhkm,bhk->bhm", Hk, q[:, t]).softmax(-1)
        out.append(torch.einsum("bhmv,bhm->bhv", Hv, p))
    return torch.stack(out, 1)


def phi(layer, x):
    """The feature map of q and k: SiLU, or "t2r" with its matrix."""
    learnt = hasattr(layer.feature_map, "layer")
    return F.relu(x @ layer.feature_map.layer.weight.mT) if learnt else F.silu(x)


def raven(layer, x, noise=0.0):
    gate = {"swish": F.silu, "sigmoid": F.sigmoid, "relu": F.relu}[layer.gate_fn]
    q, k = (phi(layer, heads(p(x), 2)) for p in (layer.q_proj, layer.k_proj))
    q, k = rms(q, layer.q_norm.weight, 1e-5), rms(k, layer.k_norm.weight, 1e-5)
    v = heads(gate(layer.v_proj(x)), 2)
    logits = heads(layer.r_proj(x), 2) + noise
    sigmoid = layer.router_score == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    bias = 0 if layer.r_bias is None else layer.r_bias
    kept = torch.zeros_like(scores)
    for i in (scores + bias).topk(layer.topk, -1).indices.unbind(-1):
        kept.scatter_(-1, i[..., None], scores.gather(-1, i[..., None]))
    r = kept / (kept.sum(-1, keepdim=True) + 1e-9) if sigmoid else kept
    step = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
    o = gate(slots(q, k, v, step[..., None] * r))
    if layer.use_output_gate:
        o = rms(o, layer.o_norm.weight, 1e-5) * gate(heads(layer.o_gate_proj(x), 2))
        return layer.o_proj(o.flatten(-2))
    return layer.o_proj(rms(o.flatten(-2), layer.g_norm.weight, 1e-5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bias_rmm=True),
        dict(router_score="softmax"),
        dict(use_output_gate=True),
        dict(use_output_gate=True, gate_fn="sigmoid"),
        dict(use_output_gate=True, gate_fn="relu", fuse_norm=False),
        dict(gate_fn="sigmoid", router_type="mlp", feature_map="t2r"),
    ],
    ids=str,
)
def test_raven_routes_and_gates_as_published(options):
    layer, x = layer_and_input(L.Raven, num_heads=2, num_slots=6, topk=2, **options)
    if layer.r_bias is not None:  # a bias that changes the choice
        layer.r_bias.data.uniform_(-1, 1)
    assert_same(layer(x)[0], raven(layer, x), "o")
    names = {n for n, _ in layer.named_parameters() if "norm" in n}
    o_norm = {"o_norm.weight"} if layer.use_output_gate else {"g_norm.weight"}
    assert names == {"q_norm.weight", "k_norm.weight"} | o_norm


def test_ravens_router_in_two_layers_and_its_slots():
    layer, x = layer_and_input(L.Raven, num_heads=2, num_slots=6, topk=2, router_type="mlp")
    first, last = layer.r_proj[0], layer.r_proj[2]
    want = F.gelu(x @ first.weight.mT + first.bias) @ last.weight.mT
    assert_same(layer.r_proj(x), want, "r")
    assert L.Raven(hidden_size=D, num_heads=4).topk == 8  # as many slots as key channels
    with pytest.raises(ValueError, match="topk is 32; 1 to num_slots=8"):
        L.Raven(hidden_size=D, num_heads=4, num_slots=8)
    layer = L.Raven(hidden_size=D, num_heads=4, num_slots=8, topk=2, bias_rmm=True)
    assert layer.r_bias.shape == (4, 8)
    with pytest.raises(ValueError, match=r"use_short_conv .*it has no convolution"):
        L.Raven(hidden_size=D, use_short_conv=True)


def test_ravens_noise_joins_the_logits():
    layer, x = layer_and_input(L.Raven, num_heads=2, num_slots=6, topk=2, bias_rmm=True)
    torch.manual_seed(1)
    noise = -torch.empty(B, T, 2, 6, dtype=torch.float64).exponential_().log()
    want = raven(layer, x, noise)
    torch.manual_seed(1)
    assert_same(layer.train()(x)[0], want, "o")


def test_rodimus_gates_before_its_norm():
    layer, x = layer_and_input(L.RodimusAttention, expand_ratio=4)
    u = layer.up_proj(x)
    s = convolved(layer.short_conv, u)
    a, tau = F.softplus(layer.g_gate_proj(s)), layer.tau_gate_proj(s).sigmoid()
    k = layer.k_proj(s)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-12).sqrt() * a**tau
    q, v, S, out = layer.q_proj(s), layer.i_gate_proj(u) * u, 0.0, []
    for t in range(T):
        S = (-a * tau).exp()[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None]
        out.append(torch.einsum("bkv,bk->bv", S, q[:, t]) * 4**-0.5)
    o = torch.stack(out, 1) + layer.residual_weight * s
    want = rms(o * F.silu(layer.gate_proj(x)), layer.activation_norm.weight, 1e-5)
    assert_same(layer(x)[0], layer.down_proj(want), "o")


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_the_norm_of_hgrn2_and_gsa_has_its_own_eps(eps):
    """1e-5 unless `o_norm_eps` says otherwise; `norm_eps` changes nothing."""
    own = {} if eps == 1e-5 else {"o_norm_eps": eps}
    layer, x = layer_and_input(L.HGRN2Attention, expand_ratio=16, norm_eps=0.5, **own)
    q, f, v = F.silu(layer.q_proj(x)), layer.f_proj(x).sigmoid(), layer.i_proj(x)
    q, f, v, S, out = heads(q, 2), heads(f, 2), heads(v, 2), 0.0, []
    for t in range(T):
        S = f[:, t, ..., None] * S + (1 - f[:, t])[..., None] * v[:, t, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * 16**-0.5)
    o = rms(torch.stack(out, 1).flatten(-2), layer.g_norm.weight, eps)
    assert_same(layer(x)[0], layer.o_proj(o), "HGRN2")

    layer, x = layer_and_input(L.GatedSlotAttention, num_heads=2, num_slots=4, norm_eps=0.5, **own)
    q, k, v = (heads(F.silu(p(x)), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    g = F.logsigmoid(heads(layer.f_proj(x), 2)) / 8
    o = rms(F.silu(slots(q, k, v, g)).flatten(-2), layer.g_norm.weight, eps)
    assert_same(layer(x)[0], layer.o_proj(o), "GSA")


@pytest.mark.parametrize(
    "options", [{}, dict(feature_map="t2r"), dict(use_output_gate=True)], ids=str
)
def test_gsas_feature_map_and_its_gate_that_is_not(options):
    layer, x = layer_and_input(L.GatedSlotAttention, num_heads=2, num_slots=4, **options)
    q, k = (phi(layer, heads(p(x), 2)) for p in (layer.q_proj, layer.k_proj))
    v, g = heads(F.silu(layer.v_proj(x)), 2), F.logsigmoid(heads(layer.f_proj(x), 2)) / 8
    o = rms(F.silu(slots(q, k, v, g)).flatten(-2), layer.g_norm.weight, 1e-5)
    assert_same(layer(x)[0], layer.o_proj(o), "o")
    with pytest.raises(ValueError, match="feature_map is 'elu'; expected one of t2r"):
        L.GatedSlotAttention(hidden_size=D, feature_map="elu")


def test_abcs_input_gate_is_on_queries_too():
    layer, x = layer_and_input(
        L.ABCAttention, num_heads=2, num_slots=4, use_rope=False, use_input_gate=True
    )
    q, k, v = (heads(F.silu(p(x)), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    s = heads(layer.s_proj(x), 2)
    out = []
    for t in range(T):
        w = s[:, : t + 1].softmax(1)  # over the tokens so far, per slot
        Hk, Hv = (torch.einsum("bthm,bthd->bhmd", w, y[:, : t + 1]) for y in (k, v))
        p = (torch.einsum("bhmd,bhd->bhm", Hk, q[:, t]) * q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("bhm,bhmd->bhd", p, Hv))
    o = rms(torch.stack(out, 1), layer.g_norm.weight, 1e-5) * F.silu(heads(layer.g_proj(x), 2))
    assert_same(layer(x)[0], layer.o_proj(o.flatten(-2)), "o")


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "LogLinearMamba2"])
def test_the_backend_of_a_convolution_changes_no_number(kind):
    sizes = {} if kind == "Mamba" else dict(head_dim=16)
    outputs = []
    for backend in ("cuda", "triton"):
        layer, x = layer_and_input(getattr(L, kind), state_size=8, backend=backend, **sizes)
        outputs.append(layer(x)[0])
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match=f"{kind}: backend is 'tpu'; expected 'cuda' or 'triton'"):
        layer_and_input(getattr(L, kind), backend="tpu", **sizes)


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("kind", ["GatedDeltaNet2", "PrecondKDA", "PrecondGatedDeltaNet"])
def test_value_heads_of_a_group_share_what_key_heads_have(kind, mode):
    """Two key heads for four value heads are four key heads, each twice."""
    options = dict(head_dim=8, expand_v=1, mode=mode, allow_neg_eigval=True)
    shared, x = layer_and_input(getattr(L, kind), num_heads=2, num_v_heads=4, **options)
    full, _ = layer_and_input(getattr(L, kind), num_heads=4, **options)
    state = {}
    for name, want in full.state_dict().items():
        given = shared.state_dict()[name]
        if given.shape != want.shape:
            given = given.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
        state[name] = given
    full.load_state_dict(state)
    assert_same(shared(x)[0], full(x)[0], "o")
    narrow = {
        "GatedDeltaNet2": {"f_proj.1.weight": 16, "b_proj.weight": 16, "A_log": 2, "dt_bias": 16},
        "PrecondKDA": {"f_proj.1.weight": 32, "b_proj.weight": 2, "a_proj.weight": 4},
        "PrecondGatedDeltaNet": {"a_atk_proj.weight": 2, "b_atk_proj.weight": 2, "A_log_atk": 2,
            "dt_bias_atk": 2, "log_atk_scale": 2, "b_proj.weight": 4},
    }[kind]  # fmt: skip
    assert {name: len(shared.get_parameter(name)) for name in narrow} == narrow


def test_norms_of_lightnet_and_bitnet_have_their_own_eps():
    """1e-6 unless another field says otherwise; `norm_eps` changes nothing."""
    layer, x = layer_and_input(L.LightNetAttention, expand_ratio=16, norm_eps=0.5)
    q, k, v = F.silu(layer.q_proj(x)), layer.k_proj(x), heads(layer.v_proj(x), 2)
    out = []
    for t in range(T):  # a softmax over the tokens so far, per key channel
        w = heads(k[:, : t + 1].softmax(1), 2)
        scores = torch.einsum("bjhk,bhk->bhj", w, heads(q, 2)[:, t]) * 16**-0.5
        out.append(torch.einsum("bhj,bjhv->bhv", scores, v[:, : t + 1]))
    o = rms(torch.stack(out, 1).flatten(-2), layer.g_norm.weight, 1e-6)
    assert_same(layer(x)[0], layer.o_proj(o * F.silu(layer.g_proj(x))), "LightNet")
    other = L.LightNetAttention(hidden_size=D, expand_ratio=16, o_norm_eps=0.1)
    assert other.g_norm.eps == 0.1
    assert L.BitAttention(D, 2, norm_eps=0.5).q_proj.norm.eps == 1e-6
    assert L.BitAttention(D, 2, bit_norm_eps=0.5).o_proj.norm.eps == 0.5


def test_names_that_depend_on_the_gate():
    for kind in (L.GatedLinearAttention, L.MultiScaleRetention, L.SimpleGatedLinearAttention):
        names = {g: {n for n, _ in kind(hidden_size=D, num_heads=2, gate_fn=g).named_parameters()}
            for g in ("swish", "silu")}  # fmt: skip
        assert "g_norm_swish_gate.weight" in names["swish"] and "g_norm.weight" in names["silu"]


def test_widths_that_are_derived_or_refused():
    sizes = dict(qk_rope_head_dim=8, qk_nope_head_dim=16, kv_lora_rank=16, v_head_dim=16)
    layer = L.MultiheadLatentAttention(D, 2, None, **sizes, qk_head_dim=None)
    assert layer.q_proj.weight.shape == (48, D) and layer.scale == 24**-0.5
    assert L.HGRNAttention(hidden_size=D, expand_ratio=0.5).i_proj.weight.shape == (16, D)
    with pytest.raises(ValueError, match=r"hidden_size \* expand_ratio is 3.2"):
        L.HGRNAttention(hidden_size=D, expand_ratio=0.1)


def test_mamba3_is_made_where_it_is_told():
    layer = L.Mamba3(hidden_size=D, head_dim=16, state_size=8, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert L.Mamba3(hidden_size=D, head_dim=16, state_size=8).D.dtype == torch.get_default_dtype()


def test_constructor_arguments_can_be_read():
    layer = L.Attention(D, 4, 2, qkv_bias=True, rope_theta=500.0)
    assert layer.hidden_size == D and layer.qkv_bias is True and layer.rope_theta == 500.0
    assert layer.num_kv_heads == 2 and layer.window_size is None
    based = L.BasedLinearAttention(48, 4, 3, 3, "taylor_exp", 1e-12)
    assert based.eps == 1e-12 and based.causal and based.feature_name == "taylor_exp"
    assert L.ReBasedLinearAttention(48, 512, 4, 3, 3).l_max == 512
    assert L.RWKV6FeedForward(D, layer_idx=3).layer_idx == 3
    assert L.RWKV7FeedForward(D, layer_idx=3, num_hidden_layers=6).num_hidden_layers == 6


def test_hgrn2s_expand_ratio_wins_over_its_heads():
    layer = L.HGRN2Attention(hidden_size=256, num_heads=4)
    assert layer.num_heads == 2 and layer.q_proj.weight.shape == (256, 256)
    layer = L.HGRN2Attention(hidden_size=256, num_heads=4, expand_ratio=None)
    assert layer.num_heads == 4 and layer.q_proj.weight.shape == (256, 256)


@pytest.mark.parametrize(("name", "gate"), [("swish", F.silu), ("silu", F.silu), ("sigmoid", F.sigmoid)])  # fmt: skip
def test_gated_deltanets_output_gate(name, gate):
    layer, x = layer_and_input(
        L.GatedDeltaNet, num_heads=2, head_dim=8, output_gate_activation=name
    )
    q, k, v = (
        heads(convolved(getattr(layer, f"{n}_conv1d"), getattr(layer, f"{n}_proj")(x)), 2)
        for n in "qkv"
    )
    q, k, beta = unit(q), unit(k), layer.b_proj(x).sigmoid()
    decay = (-layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)).exp()
    S, out = x.new_zeros(B, 2, 8, 16), []
    for t in range(T):
        S = decay[:, t, :, None, None] * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, ..., None] * u[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * 8**-0.5)
    o = rms(torch.stack(out, 1), layer.o_norm.weight, 1e-5) * gate(heads(layer.g_proj(x), 2))
    assert_same(layer(x)[0], layer.o_proj(o.flatten(-2)), "o")


def test_an_unknown_output_gate_is_refused():
    with pytest.raises(ValueError, match="output_gate_activation is 'tanh'; expected one of swish"):
        L.GatedDeltaNet(32, head_dim=8, num_heads=2, output_gate_activation="tanh")


def test_log_linear_mamba2_has_its_own_defaults():
    defaults = {n: p.default for n, p in inspect.signature(L.LogLinearMamba2).parameters.items()}
    assert not defaults["use_conv_bias"] and defaults["use_bias"] and defaults["chunk_size"] == 64
    names = {n for n, _ in L.LogLinearMamba2(hidden_size=32, head_dim=16).named_parameters()}
    assert "conv1d.bias" not in names and {"in_proj.bias", "out_proj.bias"} <= names


def test_a_width_that_the_heads_do_not_fill():
    """Published code builds such a log-linear Mamba-2; nothing can run through it."""
    layer = L.LogLinearMamba2(num_heads=1, head_dim=64, hidden_size=64)
    with pytest.raises(ValueError, match=r"num_heads is 1; expand .* = 2 was expected"):
        layer(torch.randn(1, 3, 64))
    with pytest.raises(ValueError, match=r"num_heads is 1; expand .* = 2 was expected"):
        L.Mamba2(num_heads=1, head_dim=64, hidden_size=64)


def test_dpfp_rolls_the_rectified_pair():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)  # relu([x, -x]) is 1, 0, 0, 2
    assert DPFPFeatureMap(2, nu=2)(x).tolist() == [2, 0, 0, 0, 0, 0, 0, 0]
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)  # 1, 2, 0, 0; rolled 0, 1, 2, 0
    assert DPFPFeatureMap(2, nu=1)(x).tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize("activation", ["silu", "identity", "elu"])
def test_delta_nets_sum_norm_is_an_l1_norm(activation):
    layer, x = layer_and_input(L.DeltaNet, num_heads=2, qk_norm="sum", qk_activation=activation,
        use_short_conv=False)  # fmt: skip
    act = {"silu": F.silu, "identity": lambda y: y, "elu": lambda y: F.elu(y) + 1}[activation]
    q, k = (act(heads(p(x), 2)) for p in (layer.q_proj, layer.k_proj))
    q, k = (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-6) for y in (q, k))
    v, beta = heads(F.silu(layer.v_proj(x)), 2), layer.b_proj(x).sigmoid()
    S, out = x.new_zeros(B, 2, 16, 16), []
    for t in range(T):
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, ..., None] * u[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * 16**-0.5)
    o = layer.o_proj(rms(torch.stack(out, 1), layer.o_norm.weight, 1e-5).flatten(-2))
    assert_same(layer(x)[0], o, "o")


@pytest.mark.parametrize("kind", ["ABCAttention", "DeltaNet", "GatedLinearAttention",
    "GatedSlotAttention", "LinearAttention", "MultiScaleRetention", "RWKV6Attention", "Raven",
    "SimpleGatedLinearAttention"])  # fmt: skip
def test_key_and_value_widths_are_whole(kind):
    """0.58 * 100 is 57.99999999999999 and means 58; 409.6 means nothing."""
    build = getattr(L, kind)
    options = dict(topk=1) if kind == "Raven" else {}
    assert build(hidden_size=100, expand_k=0.58, num_heads=1, **options).o_proj is not None
    for ratio in ("expand_k", "expand_v"):
        with pytest.raises(ValueError, match=rf"hidden_size \* {ratio} is 409.6"):
            build(hidden_size=1024, num_heads=1, **{ratio: 0.4}, **options)


def test_constructor_arguments_of_published_layers():
    small = dict(hidden_size=32, num_heads=2, num_slots=8, topk=4)
    x = torch.randn(1, 5, 32)
    outputs = []
    for fuse_norm in (True, False):
        torch.manual_seed(0)
        outputs.append(L.Raven(**small, fuse_norm=fuse_norm).eval()(x)[0])
    assert torch.equal(*outputs)
    layer = L.Mamba3(32, 16, head_dim=16, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert L.ReBasedLinearAttention(48, 2048, 4, 3, 3).feature_dim == 4
    L.Mamba(32, 8, intermediate_size=64, backend="triton")
    for wrong, message in (
        (lambda: L.Raven(**small, use_short_conv=True), "Raven: use_short_conv is not supported"),
        (lambda: L.Mamba(32, 8, backend="cpu"), "Mamba: backend is 'cpu'; expected 'cuda' or"),
        (lambda: L.Mamba2(hidden_size=32, head_dim=16, backend=""), "Mamba2: backend is ''"),
        (lambda: L.BasedLinearAttention(48, eps=1e-5), "BasedLinearAttention: eps is 1e-05"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
