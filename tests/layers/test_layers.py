# SPDX-License-Identifier: MIT
"""Every mixer alone: padding, packing, cache, modes, compile, and wrong input."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F

import fla.layers as L
from fla.layers import Attention, DeltaNet, GatedDeltaNet
from fla.models.utils import Cache
from tests.helpers import assert_same, gradients, matrix

LAYERS = {
    "gated_deltanet": lambda **k: GatedDeltaNet(hidden_size=32, head_dim=8, num_heads=2, **k),
    "gated_deltanet-grouped": lambda **k: GatedDeltaNet(
        32, 1, 8, 2, num_v_heads=4, allow_neg_eigval=True, **k
    ),
    "gated_deltanet-bare": lambda **k: GatedDeltaNet(
        32, 2, 8, 2, use_gate=False, use_short_conv=False, **k
    ),
    "delta_net": lambda **k: DeltaNet(hidden_size=32, num_heads=2, **k),
    "delta_net-elu": lambda **k: DeltaNet(
        hidden_size=32,
        num_heads=2,
        expand_k=0.5,
        use_gate=True,
        qk_activation="elu",
        qk_norm="sum",
        **k,
    ),
    "delta_net-bare": lambda **k: DeltaNet(
        d_model=32, num_heads=2, use_beta=False, use_short_conv=False, qk_activation="identity", **k
    ),
    "attention": lambda **k: Attention(32, 4, num_kv_heads=2, qk_norm=True, qkv_bias=True, **k),
    "attention-window": lambda **k: Attention(32, 4, window_size=3, **k),
    "attention-nope": lambda **k: Attention(32, 4, rope_theta=None, **k),
}
HEADS = dict(hidden_size=32, num_heads=2)
GDN = HEADS | dict(head_dim=8)
SSM = dict(hidden_size=32, head_dim=16, state_size=8)
LATENT = dict(hidden_size=32, num_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=12, qk_nope_head_dim=8, qk_head_dim=12)  # fmt: skip
FAMILY = {
    "ABCAttention": [HEADS | dict(num_slots=8), HEADS | dict(use_rope=False, use_input_gate=True,
        use_output_gate=False, use_short_conv=True, num_slots=4)],
    "Comba": [GDN | dict(num_v_heads=4), GDN | dict(use_inner_decay=False,
        use_output_correction=False, use_output_gate=False, use_short_conv=False)],
    "DeltaFormerAttention": [HEADS | dict(num_kv_heads=1, qk_norm=True, qkv_bias=True)],
    "GatedDeltaNet2": [GDN | dict(num_v_heads=4, allow_neg_eigval=True)],
    "GatedDeltaProduct": [GDN | dict(num_v_heads=4), GDN | dict(num_householder=3,
        use_forget_gate=False, use_output_gate=False, use_short_conv=False)],
    "GatedLinearAttention": [HEADS, HEADS | dict(num_kv_heads=1, feature_map="relu", clamp_min=-0.05,
        use_short_conv=True, gate_fn="sigmoid"), HEADS | dict(use_output_gate=False)],
    "GatedSlotAttention": [HEADS | dict(num_slots=8, num_kv_heads=1), HEADS | dict(
        use_norm=False, use_short_conv=True)],
    "HGRNAttention": [dict(hidden_size=32, expand_ratio=2, use_short_conv=True)],
    "HGRN2Attention": [dict(hidden_size=32, expand_ratio=16), dict(hidden_size=32, num_heads=4,
        expand_ratio=None, use_short_conv=True)],
    "KimiDeltaAttention": [GDN | dict(num_v_heads=4), GDN | dict(lower_bound=-5.0, safe_gate=True,
        use_short_conv=False, allow_neg_eigval=True)],
    "LightNetAttention": [dict(hidden_size=32, expand_ratio=16, use_short_conv=True)],
    "LinearAttention": [HEADS | dict(feature_map=name, num_kv_heads=1) for name in (
        "elementwise_product", "hedgehog", "t2r", "dpfp", "elu")] + [HEADS | dict(
        feature_map="elu", norm_q=True, norm_k=True, do_feature_map_norm=True,
        output_norm="identity", tie_feature_map_qk=True)],
    "LogLinearMamba2": [SSM | dict(D_has_hdim=True)],
    "Mamba": [dict(hidden_size=32, intermediate_size=48, state_size=4)],
    "Mamba2": [SSM | dict(n_groups=2), SSM | dict(D_has_hdim=True, rmsnorm=False,
        dt_limit=(0.01, 0.05)), SSM | dict(norm_before_gate=True)],
    "Mamba3": [SSM, SSM | dict(is_mimo=True, mimo_rank=3), SSM | dict(
        is_mimo=True, mimo_rank=2, is_outproj_norm=True, n_groups=2), SSM | dict(rope_fraction=1.0, is_outproj_norm=True, n_groups=2)],
    "MesaNet": [GDN, GDN | dict(use_output_gate=True, use_short_conv=False)],
    "MultiScaleRetention": [HEADS, HEADS | dict(num_kv_heads=1, use_short_conv=True)],
    "PrecondGatedDeltaNet": [GDN | dict(num_v_heads=4)],
    "PrecondKDA": [GDN | dict(num_v_heads=4, lower_bound=-5.0)],
    "BasedLinearAttention": [HEADS | dict(feature_dim=4, num_key_value_heads=1)],
    "BlockSparseAttention": [dict(hidden_size=32, num_heads=4, num_kv_heads=2, block_size=2,
        pattern=name, pattern_options=options) for name, options in dict(
        local_window=dict(window=2), big_bird=dict(global_tokens=1, window=2, count=1),
        topk_content=dict(count=2)).items()],
    "DilatedAttention": [dict(hidden_size=32, num_heads=4, num_kv_heads=2, segment_lengths=[3, 8],
        dilation_rates=[1, 2]), dict(hidden_size=32, num_heads=4, segment_lengths=[2, 5, 16],
        dilation_rates=[1, 3, 4], inner_norm=True, qk_norm=True, rope_theta=None)],
    "BitAttention": [dict(hidden_size=32, num_heads=4, num_kv_heads=2)],
    "MomAttention": [GDN | dict(num_memories=3, topk=2), GDN | dict(num_memories=3, topk=1,
        shared_mem=True, single_kv_proj=True, use_short_conv=False, use_output_gate=False)],
    "ReBasedLinearAttention": [HEADS | dict(feature_dim=4, num_key_value_heads=2)],
    "Raven": [HEADS | dict(num_slots=8, topk=3, num_kv_heads=1, use_rope=True), HEADS | dict(
        decay_type="GLA", router_score="softmax", bias_rmm=True, topk=2, use_output_gate=True)],
    "RodimusAttention": [dict(hidden_size=32, expand_ratio=8), dict(hidden_size=32, expand_ratio=8,
        use_short_conv=False, input_gate_low_rank=4)],
    "SlidingWindowSharedKeyAttention": [dict(hidden_size=32, num_heads=4, window_size=3, qk_norm=True)],
    "RWKV4Attention": [dict(hidden_size=32), dict(hidden_size=32, attention_size=48)],
    "MultiheadLatentAttention": [LATENT, LATENT | dict(q_lora_rank=None, rope_theta=None, window_size=3)],
    "RWKV6Attention": [HEADS | dict(proj_low_rank_dim=4, gate_low_rank_dim=4)],
    "RWKV7Attention": [dict(hidden_size=32, head_dim=16)],
    "SimpleGatedLinearAttention": [HEADS],
}  # fmt: skip
for _name, _variants in FAMILY.items():
    for _i, _arguments in enumerate(_variants):
        LAYERS[f"{_name}-{_i}"] = functools.partial(getattr(L, _name), **_arguments)
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, **kwargs):
    torch.manual_seed(0)
    layer = LAYERS[name](layer_idx=0, **kwargs).double()
    with torch.no_grad():  # parameters that start at zero would hide what they do
        for p in layer.parameters():
            if (p == p.flatten()[0]).all():
                p.add_(0.1 * torch.randn_like(p))
    return layer.eval()


def tokens(*shape):
    return torch.randn(*shape, 32, dtype=torch.float64)


def parameter_grads(layer, outputs):
    return gradients(outputs, dict(layer.named_parameters()))


@every_layer
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padded_is_unpadded(name, side):
    layer, x = make(name), tokens(2, 7)
    at = {"left": [0, 1, 2], "right": [7, 8, 9], "interior": [2, 5, 6]}[side]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, at] = 0
    row = tokens(2, 10)
    row[0, mask[0].bool()] = x[0]
    row[0, at] = torch.nan  # a padded token must not even be looked at
    o = layer(row, attention_mask=mask)[0]
    alone = layer(x[:1])[0]
    assert_same(o[:1, mask[0].bool()], alone, "padded row")
    assert o[0, at].abs().max() == 0
    assert_same(o[1:], layer(row[1:])[0], "full row")
    want = parameter_grads(layer, [alone, layer(row[1:])[0]])
    for key, grad in parameter_grads(layer, [o[:1, mask[0].bool()], o[1:]]).items():
        assert_same(grad, want[key], key, rtol=1e-9)


@every_layer
def test_packed_is_separate(name):
    layer, x = make(name), tokens(1, 12)
    o = layer(x, cu_seqlens=torch.tensor([0, 5, 6, 12]))[0]
    parts = [layer(x[:, a:b])[0] for a, b in ((0, 5), (5, 6), (6, 12))]
    assert_same(o, torch.cat(parts, 1), "o")


@every_layer
@pytest.mark.parametrize("cut", [1, 3, 8])
def test_cached_is_uncached(name, cut):
    layer, x = make(name), tokens(2, 9)
    want = layer(x)[0]
    cache, outs = Cache(), []
    for a, b in [(0, cut), *((t, t + 1) for t in range(cut, 9))]:
        o, _, cache, *_ = layer(x[:, a:b], past_key_values=cache, use_cache=True)
        outs.append(o)
    assert cache.get_seq_length(layer.layer_idx) == 9
    assert_same(torch.cat(outs, 1), want, "o", rtol=1e-6)


@every_layer
def test_modes_agree(name):
    if "mode" not in inspect.signature(type(make(name))).parameters or name.startswith("Mesa"):
        pytest.skip("one mode")
    a, b, x = make(name), make(name, mode="fused_recurrent"), tokens(2, 9)
    assert_same(a(x)[0], b(x)[0], "o", rtol=1e-6)
    with pytest.raises(ValueError, match="mode is 'serial'"):
        make(name, mode="serial")


# `make test` traces one layer of each kind; the operators under the others are traced by tests/ops
TRACED = {"gated_deltanet", "KimiDeltaAttention-0", "RWKV7Attention-0", "Mamba-0", "Mamba2-0", "HGRNAttention-0", "GatedLinearAttention-1", "attention"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    matrix([(n,) for n in LAYERS if not n.startswith("Mom")], lambda name: name in TRACED),
)
def test_compiles_without_a_graph_break(name):
    """Every variant is traced; the first of each layer is taken through its backward too, as slow a step again.
    Not MoM's: which tokens a memory holds depends on their values."""
    torch._dynamo.reset()
    few = dict(max_cg_step_decoding=2) if name.startswith("Mesa") else {}  # the loop is unrolled
    layer, x = make(name, **few).float(), torch.randn(2, 9, 32)
    backend = "aot_eager" if name.endswith("-0") or "-" not in name else "eager"
    compiled = torch.compile(lambda y: layer(y)[0], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x)[0], rtol=1e-4, atol=1e-5)


def test_window_is_a_band():
    """Blocks of queries see what a full banded mask shows them."""
    layer, x = make("attention-window"), tokens(2, 10)
    q, k, v = (p(x).unflatten(-1, (4, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = layer.rotary(q, k)
    distance = torch.arange(10)[:, None] - torch.arange(10)
    mask = (distance >= 0) & (distance < 3)
    want = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=mask)
    assert_same(layer(x)[0], layer.o_proj(want.transpose(1, 2).flatten(-2)), "o")


@every_layer
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(attention_mask=torch.ones(2, 4)), r"attention_mask has shape \[2, 4\]"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "packed sequences need B=1"),
        (dict(output_attentions=True), "output_attentions is not supported"),
        (dict(use_cache=True), "use_cache needs past_key_values"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name)(tokens(2, 5), **arguments)


def test_wrong_constructors():
    for build, message in [
        (lambda: GatedDeltaNet(32, head_dim=8, num_heads=2, num_v_heads=3), "num_v_heads is 3"),
        (
            lambda: GatedDeltaNet(32, expand_v=0.3, head_dim=8, num_heads=2),
            "must be a whole number",
        ),
        (lambda: DeltaNet(hidden_size=32, num_heads=5), "must be multiples of num_heads=5"),
        (lambda: DeltaNet(qk_norm="l1"), "qk_norm is 'l1'"),
        (lambda: DeltaNet(qk_activation="gelu"), "qk_activation is 'gelu'"),
        (lambda: Attention(32, 5), "must be a multiple of num_heads=5"),
        (lambda: Attention(32, 4, window_size=0), "window_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="a cache needs layer_idx"):
        DeltaNet(hidden_size=32, num_heads=2)(
            tokens(1, 2).float(), past_key_values=Cache(), use_cache=True
        )
    cache = Cache()
    layer = make("attention")
    with pytest.raises(ValueError, match="packed sequences cannot fill a cache"):
        layer(
            tokens(1, 5), past_key_values=cache, use_cache=True, cu_seqlens=torch.tensor([0, 2, 5])
        )


def test_the_convolution_of_mamba2_starts_within_its_range():
    for spread in (1e-3, 1e-5):
        layer = L.Mamba2(hidden_size=32, head_dim=16, state_size=8, conv_init=spread)
        assert 0.5 * spread < layer.conv1d.weight.abs().max() <= spread


def test_memories_that_all_tokens_choose_are_gated_delta_rules():
    """With topk = all of them, memory m is a Gated DeltaNet's operator on the whole sequence."""
    layer = make("MomAttention-0")
    whole = L.MomAttention(
        32, 8, 2, num_memories=3, topk=3, use_output_gate=True, layer_idx=0
    ).double()
    whole.load_state_dict(layer.state_dict())
    x = tokens(2, 9)
    got, _, _, logits = whole(x)
    assert logits.shape == (2, 9, 3)
    p = logits.softmax(-1)
    total = 0
    for m in range(3):
        one = L.GatedDeltaNet(32, 2, 8, 2).double()
        state = {k: v for k, v in whole.state_dict().items() if k in one.state_dict()}
        for letter in "kvba":
            state[f"{letter}_proj.weight"] = whole.state_dict()[f"{letter}_proj.{m}.weight"]
        one.load_state_dict(state)
        seen = []
        one.finish = lambda o, _x, seen=seen: seen.append(o) or o.flatten(-2)[..., :32]
        one(x)
        total = total + p[..., m, None, None] * seen[0]
    want = whole.o_proj(whole.o_norm(total, whole.g_proj(x).view_as(total)).flatten(-2))
    assert_same(got, want, "o", rtol=1e-6)


@pytest.mark.parametrize("kind", [L.HGRNAttention, L.HGRN2Attention])
def test_a_lower_bound_given_to_a_layer_by_itself_counts(kind):
    layer, x, bound = kind(hidden_size=128), torch.randn(1, 5, 128), torch.full((128,), 0.9)
    assert (layer(x, lower_bound=bound)[0] - layer(x)[0]).abs().max() > 1e-3
    layer.layer_idx = 0
    assert torch.equal(layer(x, lower_bound=bound)[0], layer(x)[0])
