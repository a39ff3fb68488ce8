# SPDX-License-Identifier: MIT
"""Models x what users do: padding, packing, cache, loss, saving, loading, checkpoints of gradients, wrong input."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import fla.models
from fla.core.layout import SequenceLayout
from fla.models import Cache, GatedDeltaNetConfig
from fla.models.decoder import next_tokens
from tests.helpers import assert_within_budget
from tests.models.common import GDN, MODELS, TINY, ids, make

every_model = pytest.mark.parametrize("name", MODELS)
TABLE = json.loads((Path(__file__).parent / "state-dicts.json").read_text())


def close(x, y, what, tolerance=2e-5):
    assert x.shape == y.shape, what
    assert (x - y).abs().max() <= tolerance * max(1, y.abs().max().item()), what


@pytest.mark.parametrize(
    "name", [n for n, row in TABLE.items() if hasattr(fla.models, row["model"])]
)
def test_state_dict_is_the_published_one(name):
    row = TABLE[name]
    config = getattr(fla.models, row["config"])(**row["kwargs"])
    state = getattr(fla.models, row["model"])(config).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == row["state_dict"]


def test_the_table_covers_the_architectures_built():
    built = [n for n, row in TABLE.items() if hasattr(fla.models, row["model"])]
    waiting = "forgetting_transformer moba nsa parallax path_attn wall_transformer yoco"
    assert sorted(set(TABLE) - set(built)) == waiting.split()


@every_model
def test_cached_is_uncached_split_at_every_position(name):
    model, x = make(name), ids(2, 9)
    with torch.no_grad():
        want = model(x, use_cache=False).logits
        for cut in range(1, 9):
            cache = Cache(config=model.config)
            first = model(x[:, :cut], past_key_values=cache, use_cache=True).logits
            rest = model(x[:, cut:], past_key_values=cache, use_cache=True).logits
            close(torch.cat([first, rest], 1), want, f"cut {cut}")
        assert cache.get_seq_length() == 9 and cache.size_in_bytes() > 0


@every_model
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padded_is_unpadded(name, side):
    model, x = make(name), ids(1, 7)
    at = {"left": [0, 1, 2], "right": [7, 8, 9], "interior": [2, 5, 6]}[side]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, at] = 0
    rows = ids(2, 10)
    rows[0, mask[0].bool()] = x[0]
    out = model(rows, attention_mask=mask, labels=rows)
    close(out.logits[:1, mask[0].bool()], model(x).logits, "padded row")
    close(out.logits[1:], model(rows[1:]).logits, "full row")
    alone = 6 * model(x, labels=x).loss + 9 * model(rows[1:], labels=rows[1:]).loss
    close(out.loss, alone / 15, "loss")


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_after_padding(name, side):
    """Prefill a padded batch, then decode: every row continues as if it were alone."""
    model, x = make(name), ids(2, 8)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, : 2 if side == "left" else 6] = 0
    if side == "right":
        mask[0, :4] = 1
    prompt = x[:, :6].clone()
    short = prompt[0, mask[0].bool()]
    cache = Cache(config=model.config)
    with torch.no_grad():
        model(prompt, attention_mask=mask, past_key_values=cache, use_cache=True)
        for t in (6, 7):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = model(
                x[:, t : t + 1], attention_mask=mask, past_key_values=cache, use_cache=True
            ).logits
            alone = model(torch.cat([short, x[0, 6 : t + 1]])[None], use_cache=False).logits
            close(step[:1], alone[:, -1:], f"row 0, token {t}")
            close(
                step[1:], model(x[1:, : t + 1], use_cache=False).logits[:, -1:], f"row 1, token {t}"
            )
        if "transformer" in name:
            with pytest.raises(ValueError, match="the cache holds padding"):
                model(x[:, :1], past_key_values=cache, use_cache=True)


@every_model
@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
def test_packed_is_separate(name, how):
    model, x = make(name), ids(1, 12)
    spans = [(0, 5), (5, 6), (6, 12)]
    if how == "cu_seqlens":
        bounds = {"cu_seqlens": torch.tensor([0, 5, 6, 12])}
    else:
        bounds = {"position_ids": torch.cat([torch.arange(b - a) for a, b in spans])[None]}
    out = model(x, labels=x, **bounds)
    assert out.past_key_values is None
    parts = [model(x[:, a:b]).logits for a, b in spans]
    close(out.logits, torch.cat(parts, 1), "logits")
    total = sum(
        (b - a - 1) * model(x[:, a:b], labels=x[:, a:b]).loss for a, b in spans if b - a > 1
    )
    close(out.loss, total / 9, "loss")


@every_model
def test_loss_forms_agree(name):
    x = ids(2, 9)
    results = []
    for changes in (
        dict(fuse_cross_entropy=False),
        dict(fuse_cross_entropy=True),
        dict(fuse_cross_entropy=False, fuse_linear_cross_entropy=True),
    ):
        model = make(name, **changes).train()
        out = model(x, labels=x)
        out.loss.backward()
        assert (out.logits is None) == bool(changes.get("fuse_linear_cross_entropy"))
        embeddings = model.get_input_embeddings().weight.grad
        results.append((out.loss, model.lm_head.weight.grad, embeddings))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close(a, b, "loss or gradient")
    assert make(name, fuse_linear_cross_entropy=True)(x).logits is not None


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, x = make(name).train(), ids(2, 9)
    again = copy.deepcopy(model)
    # the older name is deprecated in 5.23, the newer one absent before it
    enable = getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)
    enable()
    for m in (model, again):
        torch.manual_seed(0)
        m(x, labels=x).loss.backward()
    assert again.get_decoder().layers[0].gradient_checkpointing
    for (key, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key


@every_model
def test_save_and_load_are_bit_equal(name, tmp_path):
    model, x = make(name), ids(2, 9)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.layer_types == model.config.layer_types
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    for (key, a), (_, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key
    # a matrix product may round otherwise where loaded memory is aligned otherwise
    close(loaded(x).logits, model(x).logits, "logits", 1e-6)
    body = AutoModel.from_pretrained(tmp_path).eval()(x).last_hidden_state
    close(body, model.get_decoder()(x).last_hidden_state, "hidden states", 1e-6)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for n, b in half.named_buffers() if "correction_bias" in n)
    assert (half(x).logits - model(x).logits).abs().max() < 0.2


@every_model
def test_half_precision_is_within_its_budget(name):
    """At most twice the error of the exact model whose every module rounds its output to bf16."""
    if name == "bitnet":
        pytest.skip("it rounds to 8 bits itself: a rounding error may take it to the next step")

    def rounds(_module, _inputs, output):
        parts = output if isinstance(output, tuple) else (output,)
        parts = tuple(
            x.bfloat16().to(x.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in parts
        )
        return parts if isinstance(output, tuple) else parts[0]

    # Raven keeps all its slots: a rounding error may take another one into its choice
    half = make(name, **({"topk": 8} if name == "raven" else {})).to(torch.bfloat16)
    exact = copy.deepcopy(half).double()
    plain = copy.deepcopy(exact)
    for module in plain.modules():
        if not list(module.children()):
            module.register_forward_hook(rounds)
    x = ids(2, 40)
    with torch.no_grad():
        logits = [m(x, use_cache=False).logits for m in (half, plain, exact)]
    assert_within_budget(*logits, name)


@every_model
def test_meta_initialisation_and_fresh_values(name):
    config = make(name).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert all(p.is_meta for p in model.parameters())
    model = AutoModelForCausalLM.from_config(config)
    assert all(p.isfinite().all() for p in model.parameters())


def test_tied_embeddings(tmp_path):
    model = make("gated_deltanet", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(ids(1, 5)).logits, model(ids(1, 5)).logits)


@every_model
def test_outputs(name):
    model, x = make(name), ids(2, 9)
    out = model(x, output_hidden_states=True, logits_to_keep=2)
    assert out.logits.shape == (2, 2, 64) and len(out.hidden_states) == 4
    full = model(x)
    close(out.logits, full.logits[:, -2:], "logits_to_keep")
    close(
        model(x, logits_to_keep=torch.tensor([0, 4])).logits,
        full.logits[:, [0, 4]],
        "positions to keep",
    )
    assert torch.equal(model.lm_head(out.hidden_states[-1]), full.logits)
    assert torch.equal(model(x, return_dict=False)[0], full.logits)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
    assert isinstance(full.past_key_values, Cache)
    assert model.train()(x).past_key_values is None


def test_next_tokens_keep_to_their_sequence():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    layout = SequenceLayout.resolve(2, 3, attention_mask=mask)
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert next_tokens(labels, layout).tolist() == [[-100, 3, -100], [6, -100, -100]]


def test_bit_attention_has_an_eps_of_its_own():
    attn = dict(layers=[0, 1, 2], num_heads=4)
    layer = make("bitnet", attn=attn, norm_eps=1e-3).model.layers[0].attn
    assert layer.q_proj.norm.eps == 1e-6 and layer.num_heads == 4
    layer = make("bitnet", attn=attn | dict(bit_norm_eps=0.3)).model.layers[0].attn
    assert layer.q_proj.norm.eps == 0.3


def test_reset_and_crop():
    model, x = make("transformer"), ids(1, 9)
    cache = Cache(config=model.config)
    with torch.no_grad():
        model(x, past_key_values=cache, use_cache=True)
        cache.crop(-4)
        rest = model(x[:, 5:], past_key_values=cache, use_cache=True).logits
        close(rest, model(x).logits[:, 5:], "after crop")
        linear = make("gated_deltanet")
        state = Cache(config=linear.config)
        want = linear(x, past_key_values=state, use_cache=True).logits
        hybrid = make("delta_net-hybrid")  # attention first: it must not be cut before the refusal
        mixed = Cache(config=hybrid.config)
        hybrid(x, past_key_values=mixed, use_cache=True)
        with pytest.raises(ValueError, match="cannot forget its last tokens"):
            mixed.crop(-1)
        assert mixed.layers[0].keys.shape[2] == mixed.get_seq_length() == 9
        with pytest.raises(ValueError, match="cannot forget its last tokens"):
            state.crop(-1)
        state.reset()
        assert state.get_seq_length() == 0 and state.read_state(0) is None
        assert torch.equal(linear(x, past_key_values=state, use_cache=True).logits, want)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, layer_types=["full_attention"]), "must hold num_hidden_layers=3"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, layer_types=["mamba2"] * 3), "entries with 'mamba2'"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[3], num_heads=4)), "holds 3, which is outside 0..2"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=[dict(layers=[1], num_heads=4)] * 2), "holds 1, which is named twice"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[1], heads=4)), r"unknown fields \['heads'\]"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(num_heads=4)), "names no layers"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[1.0])), r"holds 1\.0; expected integers"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[1], num_heads=2.5)), r"attn\['num_heads'\] is 2\.5"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[1], window_size=0)), r"attn\['window_size'\] is 0"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(layers=[1], rope_theta=-1.0)), r"attn\['rope_theta'\] is -1\.0"),
        (lambda: make("gated_deltanet", attn=dict(layers=[0], num_heads=5)), "num_heads=5, which does not divide"),
        (lambda: make("gated_deltanet", layer_types=["sliding_attention"] * 3), "sliding_attention without a window"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(kind="flash")), "attn\\['kind'\\] is 'flash'"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, attn=dict(kind="mla", qk_norm=True)), r"unknown fields \['qk_norm'\]"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, norm_after=["attention"]), r"norm_after holds \['attention'\]"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, moe=dict(num_experts=4)), r"no \['intermediate_size', 'top_k'\]"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, moe=dict(layers=[3])), r"moe\['layers'\] is \[3\]"),
        (lambda: make("mamba", norm_after=["linear_attention"]), "norm_after is not part of a MixerBlock"),
        (lambda: make("transformer", qk_norm="heads"), "qk_norm is 'heads'"),
        (lambda: make("bitnet", output_gate=True), "output_gate is not part of BitAttention"),
        (lambda: make("bitnet", attn=dict(num_heads=4, qk_norm=True)), r"unknown fields \['qk_norm'\]"),
        (lambda: GatedDeltaNetConfig(**TINY, **GDN, moe=dict(layers=[1])), "no .*'num_experts'"),
        (lambda: make("mamba", moe={}), "Experts: no"),
        (lambda: make("mla", qk_head_dim=16), "qk_head_dim is 16; expected .* = 12"),
        (lambda: make("mla", rope_scaling=dict(factor=2)), "rope_scaling is not supported"),
        (lambda: make("transformer", layer_types=["linear_attention"] * 3), "has no linear attention"),
    ],
)  # fmt: skip
def test_wrong_configs(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@every_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=ids(2, 5), output_attentions=True), "output_attentions is not supported"),
        (dict(input_ids=ids(2, 5), labels=ids(2, 4)), r"labels has shape \[2, 4\]"),
        (
            dict(input_ids=ids(2, 5), attention_mask=torch.ones(2, 6)),
            r"attention_mask has shape \[2, 6\]",
        ),
        (dict(input_ids=ids(2, 5), cu_seqlens=torch.tensor([0, 5])), "packed sequences need B=1"),
        (dict(input_ids=ids(1, 5), cu_seqlens=torch.tensor([0, 3, 2, 5])), "cu_seqlens decreases"),
        (
            dict(input_ids=ids(1, 5), cu_seqlens=torch.tensor([0, 2, 5]), use_cache=True),
            "packed sequences have no cache",
        ),
        (
            dict(input_ids=ids(1, 5), past_key_values=DynamicCache()),
            "past_key_values is a DynamicCache",
        ),
    ],
)
def test_wrong_inputs(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name)(**arguments)


def test_attention_entries_carry_the_published_defaults():
    given = dict(layers=[1], num_heads=4)
    config = GatedDeltaNetConfig(**TINY, **GDN, attn=given)
    filled = dict(num_kv_heads=4, qkv_bias=False, window_size=None, rope_theta=10000.0)
    assert config.attn == given | filled and given == dict(layers=[1], num_heads=4)
    again = GatedDeltaNetConfig.from_dict(config.to_dict())
    assert again.attn == config.attn and again.attention_at(1) == config.attention_at(1)
    two = GatedDeltaNetConfig(**TINY, **GDN, attn=[given, dict(layers=[2], num_kv_heads=1)])
    assert [spec["num_kv_heads"] for spec in two.attn] == [4, 1]
