# SPDX-License-Identifier: MIT
"""The cache under single layers, and under layers written for the published protocol."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fla.layers import Attention, GatedDeltaNet
from fla.layers.utils import get_layer_cache, require_cache_layer_idx, update_layer_cache
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.models.utils import (
    Cache,
    FLACache,
    FLAGenerationMixin,
    FLALayer,
    FLAUnsupportedCacheGenerationMixin,
    LegacyFLACache,
)


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "attention":
        return Attention(64, 4, layer_idx=0).double()
    if kind == "window":
        return Attention(64, 4, window_size=3, layer_idx=0).double()
    return GatedDeltaNet(64, head_dim=16, num_heads=2, expand_v=1, layer_idx=0).double()


@pytest.mark.parametrize("kind", ["attention", "window", "recurrent"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_alone_advances_its_cache(kind, masked):
    layer, x, cache = layer_of(kind), torch.randn(1, 6, 64).double(), Cache()
    want = layer(x)[0]
    first = layer(x[:, :4], past_key_values=cache, use_cache=True)[0]
    mask = torch.ones(1, 6) if masked else None
    second = layer(x[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    assert (torch.cat([first, second], 1) - want).abs().max() < 1e-12
    assert cache.get_seq_length(0) == 6 and cache.get_seq_length(1) == 0


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_left_padding_with_a_layer_alone(kind):
    layer, x, cache = layer_of(kind), torch.randn(2, 6, 64).double(), Cache()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    layer(x[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)
    o = layer(x[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    assert (o[0] - layer(x[:1, 2:])[0][0, 2:]).abs().max() < 1e-12
    assert (o[1] - layer(x[1:])[0][0, 4:]).abs().max() < 1e-12


def test_two_layers_of_a_stack_of_ones_own_count_apart():
    layers = [layer_of("attention"), layer_of("recurrent")]
    layers[1].layer_idx = 1
    x, cache = torch.randn(1, 6, 64).double(), Cache()

    def run(x, cache=None):
        for layer in layers:
            x = x + layer(x, past_key_values=cache, use_cache=cache is not None)[0]
        return x

    parts = [run(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 6))]
    assert (torch.cat(parts, 1) - run(x)).abs().max() < 1e-12
    assert [cache.get_seq_length(i) for i in (0, 1)] == [6, 6]


def test_a_decoder_counts_once():
    config = GatedDeltaNetConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8,
        attn={"layers": [1], "num_heads": 2},
    )  # fmt: skip
    model = GatedDeltaNetForCausalLM(config).eval()
    cache = Cache(config=config)
    ids = torch.arange(5)[None]
    model(ids, past_key_values=cache, use_cache=True)
    assert [cache.get_seq_length(i) for i in range(2)] == [5, 5]
    states = cache.to_legacy_cache()
    assert states[0]["recurrent_state"].shape[0] == 1 and len(states[0]["conv_state"]) == 3
    assert states[1]["attn_state"][0].shape == (1, 5, 32) and states[1]["recurrent_state"] is None


class Published(nn.Module):
    """A layer as users write them: a running sum, a last token, and all tokens seen."""

    def __init__(self, layer_idx: int | None = 0):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x, past_key_values=None):
        last = get_layer_cache(self, past_key_values)
        state, conv = x.new_zeros(x.shape[0], x.shape[2]), torch.zeros_like(x[:, 0])
        if last is not None:
            state, conv = last["recurrent_state"], last["conv_state"][0]
        o = state[:, None] + x.cumsum(1) + torch.cat([conv[:, None], x[:, :-1]], 1)
        update_layer_cache(
            self, past_key_values, recurrent_state=state + x.sum(1), conv_state=(x[:, -1],),
            offset=x.shape[1],
        )  # fmt: skip
        return o


def test_a_layer_of_the_published_protocol_writes_and_reads():
    layer, x, cache = Published(), torch.randn(2, 6, 8).double(), Cache()
    parts = [layer(x[:, a:b], cache) for a, b in ((0, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-12)
    assert (
        cache.get_seq_length(0) == 6 and len(cache) == 1 and isinstance(cache.layers[0], FLALayer)
    )
    with pytest.raises(ValueError, match="layer_idx"):
        Published(None)(x, Cache())
    with pytest.raises(KeyError, match="layer 1 of 1"):
        cache[1]


def test_the_published_protocol_and_ours_see_the_same_state():
    layer, x, cache = layer_of("recurrent"), torch.randn(1, 6, 64).double(), Cache()
    want = layer(x)[0]
    layer(x[:, :4], past_key_values=cache, use_cache=True)
    states = dict(cache[0])
    cache.update(**states, layer_idx=0, offset=0)  # now kept by name
    o = layer(x[:, 4:], past_key_values=cache, use_cache=True)[0]
    assert (o - want[:, 4:]).abs().max() < 1e-12 and cache.get_seq_length(0) == 6
    again = Cache.from_legacy_cache([states], seen_tokens=4)
    o = layer(x[:, 4:], past_key_values=again, use_cache=True)[0]
    assert (o - want[:, 4:]).abs().max() < 1e-12 and again.get_seq_length(0) == 6
    assert Cache.from_legacy_cache(again) is again and again.get_max_length() is None


def test_attention_states_are_appended_and_windowed():
    cache, k = Cache(), torch.arange(10.0).view(1, 5, 2)
    cache.update(attn_state=(k, -k), layer_idx=1)
    state = cache.update(attn_state=(k, -k), layer_idx=1, cache_kwargs={"window_size": 7})
    assert torch.equal(state["attn_state"][0], torch.cat([k, k], 1)[:, -7:])
    assert cache.get_seq_length(1) == 10 and cache.get_seq_length(0) == 0
    assert cache.size_in_bytes() == 2 * 14 * 4
    with pytest.raises(ValueError, match="the window has dropped tokens"):
        cache.crop(-2)
    cache.update(attn_state=(k, -k), layer_idx=0)
    with pytest.raises(ValueError, match="the window has dropped tokens"):
        cache.crop(-2)
    assert cache[0]["attn_state"][0].shape[1] == 5  # nothing is cut where a layer refuses


def test_a_window_that_dropped_tokens_is_not_cropped():
    cache, k = Cache(), torch.arange(10.0).view(1, 5, 2)
    cache.update(attn_state=(k, k), layer_idx=0, cache_kwargs={"window_size": 5})
    cache.crop(-1)
    assert torch.equal(cache[0]["attn_state"][0], k[:, :4])
    cache.update(attn_state=(k, k), layer_idx=0, cache_kwargs={"window_size": 5})
    with pytest.raises(ValueError, match="the window has dropped tokens"):
        cache.crop(-1)
    cache.reset()
    cache.update(attn_state=(k, k), layer_idx=0, cache_kwargs={"window_size": 5})
    cache.crop(-2)
    assert cache.get_seq_length(0) == 3


def test_mask_sizes_count_what_a_layer_has_seen():
    cache = Cache()
    for i, kind in enumerate(("attention", "recurrent")):
        layer = layer_of(kind)
        layer.layer_idx = i
        layer(torch.randn(1, 4, 64).double(), past_key_values=cache, use_cache=True)
    cache.update(recurrent_state=torch.zeros(1, 2), layer_idx=2, offset=7)
    assert [cache.get_mask_sizes(2, i) for i in range(3)] == [(6, 0), (6, 0), (2, 0)]
    assert cache.get_mask_sizes(2, 3) == (2, 0)  # not there yet


def test_offloading_keeps_the_states():
    layer, x = layer_of("recurrent"), torch.randn(1, 6, 64).double()
    cache, want = Cache(), layer(x)[0]
    layer(x[:, :4], past_key_values=cache, use_cache=True)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    o = layer(x[:, 4:], past_key_values=cache, use_cache=True)[0]
    assert (o - want[:, 4:]).abs().max() < 1e-12
    with pytest.raises(TypeError, match="offloading"):
        Cache(offloading=True)


def test_caches_are_made_of_what_was_saved():
    x = torch.randn(2, 3, 4)
    cache = Cache.from_legacy_cache(({"attn_state": (x, x)}, {"recurrent_state": x}), seen_tokens=2)
    assert [cache.get_seq_length(i) for i in (0, 1)] == [3, 2]  # what is held counts at least
    assert torch.equal(cache.to_legacy_cache()[0]["attn_state"][1], x)
    assert len(Cache.from_legacy_cache(None)) == 0
    for wrong in (5, x.sum().item()):
        with pytest.raises(TypeError, match="expected a Cache or a sequence of dictionaries"):
            Cache.from_legacy_cache(wrong)
    for wrong in ("ab", {"recurrent_state": x}, [{"keys": x}]):
        with pytest.raises(TypeError, match=r"layer 0 is .* expected a dictionary of"):
            Cache.from_legacy_cache(wrong)


class OwnConfig(PretrainedConfig):
    model_type = "own"
    vocab_size: int = 16
    num_hidden_layers: int = 2


class OwnModel(PreTrainedModel, FLAGenerationMixin):
    """A model as users write them, of layers for the published cache."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, 8)
        self.layers = nn.ModuleList(Published(i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(8, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = nn.functional.normalize(layer(x, past_key_values), dim=-1)
        return CausalLMOutputWithPast(logits=8 * self.head(x), past_key_values=past_key_values)


@pytest.mark.parametrize("mode", [dict(), dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)], ids=str)  # fmt: skip
def test_generate_of_a_model_for_the_published_cache(mode):
    torch.manual_seed(0)
    model, x = OwnModel(OwnConfig()).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for p in model.parameters():
        p.data.normal_()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        out = model.generate(
            x, max_new_tokens=6, pad_token_id=0, use_cache=use_cache,
            return_dict_in_generate=True, **mode,
        )  # fmt: skip
        results.append(out.sequences)
        assert isinstance(out.past_key_values, Cache) is use_cache
    assert torch.equal(*results)


def test_beams_move_every_state_of_a_row():
    cache = Cache()
    x = torch.arange(3.0)[:, None]
    cache.update(recurrent_state=(x, {"deep": [x]}), conv_state=x, ffn_state=x, layer_idx=0)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    want = torch.tensor([[2.0], [0.0]])
    state = cache[0]
    found = [state["recurrent_state"][0], state["recurrent_state"][1]["deep"][0]]
    for got in (*found, state["conv_state"], state["ffn_state"]):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    cache.reset()
    assert cache[0]["recurrent_state"] is None and cache.get_seq_length(0) == 0


def test_what_is_wrong_is_refused():
    cache, keys = Cache(), torch.zeros(1, 2, 3, 4)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="already holds keys and values"):
        cache.update(recurrent_state=keys, layer_idx=0)
    with pytest.raises(ValueError, match="not both"):
        cache.update(keys, keys, 0, recurrent_state=keys)
    with pytest.raises(ValueError, match="both key_states and value_states"):
        cache.update(keys)
    with pytest.raises(TypeError, match="expected a dictionary"):
        Cache.from_legacy_cache([(keys, keys)])
    cache.update(recurrent_state=keys, layer_idx=1)
    with pytest.raises(ValueError, match="states of the published protocol"):
        cache.update(keys, keys, 1)


def test_published_names():
    assert FLACache is LegacyFLACache is Cache
    assert FLAGenerationMixin is FLAUnsupportedCacheGenerationMixin
    assert require_cache_layer_idx(Published(3), Cache()) == 3
