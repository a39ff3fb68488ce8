# SPDX-License-Identifier: MIT
"""The names of `dilated_attention_pytorch` do what they say: against the definitions in fp64."""

import copy
import importlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F

import dilated_attention_pytorch as d
from dilated_attention_pytorch import core
from fla.ops.block_sparse_attention import naive_block_sparse_attention
from fla.ops.dilated_attention import naive_dilated_attention
from tests.helpers import assert_same, error

BRANCHES = ([8, 20], [1, 3])
PLAIN = {
    "DilatedAttention": d.DilatedAttention,
    "ImprovedDilatedAttention": d.ImprovedDilatedAttention,
    "DistributedImprovedDilatedAttention": d.DistributedImprovedDilatedAttention,
    "RingDilatedAttention": d.RingDilatedAttention,
    "RingDilatedAttentionV2": d.RingDilatedAttentionV2,
    "RingDilatedAttentionV2Collective": d.RingDilatedAttentionV2Collective,
    "RingDilatedAttentionV2Flash": d.RingDilatedAttentionV2Flash,
    "production": d.create_production_ring_attention,
}
either = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])


def rows(T=30, H=4, D=6, B=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, B, T, H, D, generator=generator, dtype=torch.float64)
    return [y.clone().requires_grad_() for y in x]


def naive(q, k, v, causal, **options):
    lengths, rates = BRANCHES
    return naive_dilated_attention(
        q, k, v, segment_lengths=lengths, dilation_rates=rates, causal=causal, **options
    )


def test_all_documented_names_are_there():
    assert len(d.__all__) == 43  # the package's 42, and LongNetLM
    for package, names in ((d, d.__all__), (core, core.__all__)):
        for name in names:
            assert getattr(package, name).__doc__
    for module in ("dilated_attention", "transformer", "long_net", "core", "utils"):
        importlib.import_module(f"dilated_attention_pytorch.{module}")


@either
@pytest.mark.parametrize("name", PLAIN)
def test_each_is_the_definition(name, causal):
    q, k, v = rows()
    o = PLAIN[name](*BRANCHES)(q, k, v, is_causal=causal)
    assert_same(o, naive(q, k, v, causal), "o")
    found = torch.autograd.grad(o.sin().sum(), [q, k, v])
    exact = torch.autograd.grad(naive(q, k, v, causal).sin().sum(), [q, k, v])
    for x, y in zip(found, exact, strict=True):
        assert_same(x, y, "gradient")


def test_scale_mask_and_dropout_count():
    q, k, v = rows()
    scaled = d.DilatedAttention(*BRANCHES, softmax_scale=0.1)(q, k, v)
    assert_same(scaled, naive(q, k, v, False, scale=0.1), "scaled")
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :7] = mask[1, 20:] = False
    o = d.DilatedAttention(*BRANCHES)(q, k, v, is_causal=True, attention_mask=mask)
    for b in range(2):
        own = [x[b : b + 1, mask[b]] for x in (q, k, v)]
        assert_same(o[b : b + 1, mask[b]], naive(*own, True), "real tokens")
        assert not o[b, ~mask[b]].any()
    dropping = d.DilatedAttention(*BRANCHES, attention_dropout=0.5)
    kept = dropping(q, k, v) != 0
    assert 0.4 < kept.double().mean() < 0.6
    assert_same(dropping.eval()(q, k, v), naive(q, k, v, False), "evaluation")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: d.DilatedAttention([8], [1, 2]), "1 segment_lengths"),
        (lambda q: d.DilatedAttention([8], [1], op="cutlass"), "op='cutlass' cannot be honoured"),
        (lambda q: d.DilatedAttention([8], [1], attention_dropout=1.5), "dropout is 1.5"),
        (
            lambda q: d.DilatedAttention([8], [1])(q, q, q, attention_mask=torch.ones(30, 30).bool()),
            r"the mask is torch.bool \[30, 30\]; expected bool \[2, 30\]",
        ),
        (lambda q: d.DilatedAttention([8], [1])(q, q[:, :9], q[:, :9]), "query has 30 tokens"),
        (lambda q: d.DilatedAttention([8], [1])(q[0], q, q), "expected .batch, tokens, heads"),
        (lambda q: d.RingDilatedAttention([8], [1], ring_size=4)(q, q, q), "launch as many with"),
        (lambda q: d.RingDilatedAttention([8], [1], dtype=torch.bfloat16)(q, q, q), "convert it"),
        (lambda q: d.RingAttentionConfig(mixed_precision=True), "use torch.autocast"),
        (lambda q: d.DistributedImprovedDilatedAttention([8], [1], model_parallel=True), "FSDP2"),
        (lambda q: d.MultiheadDilatedAttention(30, 4, [1], [8]), "not a multiple of num_heads=4"),
        (
            lambda q: d.MultiheadDilatedAttention(24, 4, [1], [8])(q.flatten(2), attn_mask=q),
            "the pattern is the mask",
        ),
        (lambda q: d.SparsePatternConfig("local_windw"), "did you mean 'local_window'"),
        (lambda q: d.SparsePatternConfig(sparsity_ratio=3.0), r"share kept in \(0, 1\]"),
        (
            lambda q: d.SparsePatternConfig("local_window", 0.1, local_window_size=64),
            "pass one of them",
        ),
        (lambda q: d.AdaptiveConfig(hard_sparsity=False), "given by base_sparsity"),
        (lambda q: d.DistributedSparseConfig("bandwidth_aware"), "expected one of"),
        (lambda q: d.create_dilated_attention("rng"), "did you mean 'ring'"),
        (lambda q: d.create_block_sparse_attention(1.0), "share left out"),
        (lambda q: d.AdaptiveSparsityTrainer(torch.nn.Linear(1, 1)), "holds no BlockSparse"),
        (
            lambda q: d.DilatedTransformerDecoderLayer(24, 4, [8], [1], cross_attention="sparse"),
            "cross_attention is 'sparse'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows()[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: d.DilatedAttention([8], [1], enable_memory_pool=True),
        lambda: d.RingDilatedAttention([8], [1], use_pattern_cache=False),
        lambda: d.RingDilatedAttentionV2Flash([8], [1], flash_chunk_size=64),
        lambda: d.ImprovedDilatedAttention([8], [1], use_tf32=False),
        lambda: d.RingAttentionConfig(use_memory_pool=True),
        lambda: d.BlockSparseOptimized([8], [1], cache_size=3),
    ],
)
def test_what_changes_nothing_is_said(make):
    with pytest.warns(UserWarning, match="changes nothing"):
        make()


def test_construction_is_silent_and_leaves_global_flags():
    flag = torch.backends.cuda.matmul.allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in PLAIN.values():
            make(*BRANCHES)
        d.BlockSparseRingDilatedAttention(*BRANCHES)
        d.LongNetLM(9, 16, 2, 1, 1, 8, *BRANCHES)
    assert torch.backends.cuda.matmul.allow_tf32 == flag


@pytest.mark.parametrize("name", ["multihead", "improved", "ring", "block_sparse", "adaptive"])
def test_projections_around_them(name):
    torch.manual_seed(0)
    made = {
        "multihead": lambda: d.MultiheadDilatedAttention(24, 4, BRANCHES[1], BRANCHES[0]),
        "improved": lambda: d.ImprovedMultiheadDilatedAttention(24, 4, *BRANCHES[::-1]),
        "ring": lambda: d.create_multihead_dilated_attention("ring", 24, 4, *BRANCHES),
        "block_sparse": lambda: d.BlockSparseRingMultiheadDilatedAttention(
            24, 4, *BRANCHES, sparse_config=d.SparsePatternConfig(block_size=4)
        ),
        "adaptive": lambda: d.create_adaptive_sparse_attention(24, 4, 0.5, 8),
    }[name]().double()  # fmt: skip
    x = torch.randn(2, 30, 24, dtype=torch.float64)

    def run(module, x, **options):
        o = module(x, is_causal=True, **options)
        return o[0] if isinstance(o, tuple) else o

    o = run(made, x)
    assert o.shape == x.shape
    later = x.clone()
    later[:, 20:] += 1.0
    assert_same(run(made, later)[:, :20], o[:, :20], "the past")
    o.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    assert_same(run(copy.deepcopy(made), x), o, "a copy, and a second forward")
    stored = io.BytesIO()
    torch.save(made, stored)
    stored.seek(0)
    assert_same(run(torch.load(stored, weights_only=False), x), o, "stored")
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[:, 25:] = True
    if name != "ring":  # several processes drop padding first
        seen = run(made, x, key_padding_mask=padding)
        assert_same(seen[:, :25], run(made, x[:, :25]), "padded")


KINDS = ["local_window", "dilated_sparse", "global_local", "strided", "random", "hierarchical"]


@either
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [None, 0.3])
def test_block_sparse_is_one_softmax_at_most_that_dense(kind, ratio, causal):
    config = d.SparsePatternConfig(kind, ratio, block_size=8)
    attention = d.BlockSparseRingDilatedAttention([40, 100], [1, 3], config)
    q, k, v = rows(100)
    o, weights = attention(q, k, v, is_causal=causal, return_attention_weights=True)
    exact = naive_block_sparse_attention(q, k, v, attention.pattern(100, causal))
    assert_same(o, exact, "o")
    assert_same(torch.einsum("bhts,bshd->bthd", weights, v), exact, "weights")
    assert_same(attention(q, k, torch.ones_like(v), causal), torch.ones_like(v), "rows sum to one")
    if ratio is not None and kind != "global_local":  # whose first row and column are dense
        assert 0.1 < attention.density(1000, causal) <= ratio


def test_presets_optimizer_and_pools():
    for config in d.get_hierarchical_presets().values():
        attention = d.BlockSparseHierarchical([2048], [1], config)
        assert attention.density(8192) < 0.5
    q, k, _ = rows(64)
    best = d.PatternOptimizer(d.PatternConfig(sparsity_ratio=0.3, block_size=8)).optimize(q, k)
    found = d.PatternQualityAnalyzer().analyze(best, q, k)
    assert 0.0 < found["least_mass"] <= found["mass"] < 1.0
    pool = core.EnhancedMemoryPool()
    first, second = (pool.get_buffer((4,), torch.float32) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_a_learned_choice_has_a_gradient_and_its_temperature_matters():
    torch.manual_seed(0)
    config = d.AdaptiveConfig(0.6, block_size=8, hidden_dim=16)
    attention = d.BlockSparseAdaptive([64], [1], 4, 6, config).double()
    q, k, v = rows(80)
    o, pattern = attention(q, k, v, is_causal=True, return_pattern=True)
    assert_same(o, naive_block_sparse_attention(q, k, v, pattern), "o")
    o.sin().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())
    d.AdaptiveSparsityTrainer(attention, 0.3)
    assert error(attention(q, k, v, is_causal=True), o) > 1e-4


@pytest.mark.parametrize("cross", ["dilated", "dense"])
def test_a_decoder_block_is_causal_in_its_target_and_sees_its_memory(cross):
    torch.manual_seed(0)
    layer = d.DilatedTransformerDecoderLayer(24, 4, *BRANCHES, 32, 0.0, cross_attention=cross)
    layer = layer.double()
    x, memory = torch.randn(2, 1, 30, 24, dtype=torch.float64)
    o = layer(x, memory, tgt_is_causal=True)
    later = torch.cat([x[:, :20], x[:, 20:] + 1], 1)
    assert_same(layer(later, memory, tgt_is_causal=True)[:, :20], o[:, :20], "the past")
    assert error(layer(x, memory + 1, tgt_is_causal=True), o) > 1e-3
    seen = layer(x, memory.requires_grad_(), tgt_is_causal=True)[:, 25].sum()
    reached = torch.autograd.grad(seen, memory)[0][0].abs().sum(-1) > 0
    assert reached.all() if cross == "dense" else 0 < reached.sum() < 30
    if cross == "dense":
        assert layer(x, memory[:, :7]).shape == x.shape


def test_dense_attention_is_torchs():
    layer = d.DilatedTransformerDecoderLayer(24, 4, *BRANCHES, cross_attention="dense").double()
    q, k, v = rows()
    inner = layer.multihead_attn.attention(q, k, v)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert_same(inner, want.transpose(1, 2), "dense")


def test_long_net_learns_a_text_and_is_causal():
    torch.manual_seed(0)
    model = d.LongNetLM(11, 32, 4, 1, 1, 64, [8, 16], [1, 2])
    text = torch.arange(40).remainder(11)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    with torch.no_grad():
        changed = text.clone()
        changed[:, 30:] = 0
        assert error(model(changed)[:, :30], model(text)[:, :30]) < 1e-4


def test_configs_reach_the_attention():
    make, branches = (
        core.create_multihead_dilated_attention,
        dict(zip(("segment_lengths", "dilation_rates"), BRANCHES, strict=True)),
    )
    config = core.DilatedAttentionConfig(**branches, dropout=0.25, dtype=torch.float64)
    made = make("standard", 24, 4, attention_config=config).attention
    assert (made.dropout, made.dtype, made.segment_lengths) == (0.25, torch.float64, BRANCHES[0])
    config = core.SparseAttentionConfig(**branches, pattern_type="strided", block_size=8)
    made = make("block_sparse", 24, 4, attention_config=config).attention
    assert (made.sparse_config.pattern_type, made.sparse_config.block_size) == ("strided", 8)
    made = make("ring", 24, 4, attention_config=core.RingAttentionConfig(**branches, ring_size=1))
    assert made.attention.ring_size == 1
    with pytest.raises(TypeError, match="attention_scale"):
        make("ring", 24, 4, attention_config=core.RingAttentionConfig(attention_scale=0.1))
    with pytest.raises(ValueError, match="beside multihead_config"):
        make("ring", 24, 4, multihead_config=core.MultiheadConfig(32, 4))
