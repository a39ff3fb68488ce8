# SPDX-License-Identifier: MIT
"""The `attn` field of configs: what it is filled with, and what is refused."""

import math

import pytest
import torch

from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GLAConfig, SambaConfig
from fla.models.configuration_utils import (
    AttentionSpec,
    get_attention_spec,
    parse_attention_config,
)
from fla.models.hybrid import get_hybrid_attention_spec, normalize_hybrid_attention_config
from fla.models.modeling_utils import FLAForCausalLM, FLAModel, FLAPreTrainedModel

GIVEN: AttentionSpec = {"layers": [1], "num_heads": 4}
FILLED = {**GIVEN, "num_kv_heads": 4, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
SIZES = dict(hidden_size=32, num_hidden_layers=3, vocab_size=64, num_heads=2)


def test_defaults_are_filled_in_a_copy():
    given = {**GIVEN, "own": 3}
    assert parse_attention_config(given, num_hidden_layers=2) == {**FILLED, "own": 3}
    assert given == {**GIVEN, "own": 3}
    parsed = parse_attention_config([GIVEN, {"layers": (0,), "num_heads": 2}], num_hidden_layers=2)
    assert parsed[0] == FILLED and parsed[1]["layers"] == [0] and parsed[1]["num_kv_heads"] == 2
    assert get_attention_spec(parsed, layer_idx=0) is parsed[1]
    assert get_attention_spec(FILLED, layer_idx=0) is None
    assert parse_attention_config(None, num_hidden_layers=2) is None
    assert get_attention_spec(None, layer_idx=0) is None
    assert normalize_hybrid_attention_config(GIVEN, num_hidden_layers=2) == FILLED
    assert get_hybrid_attention_spec(FILLED, layer_idx=1) is FILLED


WRONG = [
    ({"num_heads": 4}, "names no layers"),
    ({"layers": [1]}, "names no num_heads"),
    ({**GIVEN, "layers": 1}, r"attn\['layers'\] is 1; expected a list"),
    ({**GIVEN, "layers": [1.0]}, "holds 1.0; expected integers"),
    ({**GIVEN, "layers": [True]}, "holds True; expected integers"),
    ({**GIVEN, "layers": [3]}, "holds 3, which is outside 0..2"),
    ({**GIVEN, "layers": [-1]}, "holds -1, which is outside 0..2"),
    ({**GIVEN, "layers": [1, 1]}, "holds 1, which is named twice"),
    ([GIVEN, GIVEN], "holds 1, which is named twice"),
    ({**GIVEN, "num_heads": 0}, r"attn\['num_heads'\] is 0; expected a positive integer"),
    ({**GIVEN, "num_kv_heads": 2.0}, r"attn\['num_kv_heads'\] is 2.0"),
    (
        {**GIVEN, "window_size": 0},
        r"attn\['window_size'\] is 0; expected a positive integer or None",
    ),
    ({**GIVEN, "qkv_bias": 1}, r"attn\['qkv_bias'\] is 1; expected True or False"),
    ({**GIVEN, "rope_theta": math.inf}, r"attn\['rope_theta'\] is inf"),
    ({**GIVEN, "rope_theta": -1.0}, r"attn\['rope_theta'\] is -1.0"),
]


@pytest.mark.parametrize(("attn", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_entries_are_refused(attn, message):
    with pytest.raises(ValueError, match=message):
        parse_attention_config(attn, num_hidden_layers=3)
    if message == "names no num_heads":  # a config has its own, which fills in
        assert GLAConfig(**SIZES, attn=attn).attn["num_heads"] == 2
        return
    with pytest.raises(ValueError, match=message):
        GLAConfig(**SIZES, attn=attn)
    if message == "names no layers":  # the form that goes with `layer_types`, which are there
        return
    config = GLAConfig(**SIZES, attn=GIVEN)
    with pytest.raises(ValueError, match=message):
        config.attn = attn
    assert config.attn == FILLED  # what was there stays


def test_what_is_no_dictionary_is_refused():
    for attn, message in ((3, "attn is 3"), ([3], r"attn\[0\] is 3")):
        with pytest.raises(ValueError, match=message):
            parse_attention_config(attn, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"num_hidden_layers is 2\.5"):
        parse_attention_config(GIVEN, num_hidden_layers=2.5)
    with pytest.raises(ValueError, match="attn holds 3; expected a dictionary"):
        GLAConfig(**SIZES, attn=[3])


def test_a_config_fills_and_follows_its_attn(tmp_path):
    config = GatedDeltaNetConfig(**SIZES, head_dim=8, attn=GIVEN)
    assert config.attn == FILLED and config.attn["num_kv_heads"] == 4
    linear, full = "linear_attention", "full_attention"
    assert config.layer_types == [linear, full, linear]
    config.attn = [{"layers": [0], "num_heads": 2, "window_size": 4}]
    assert config.attn[0]["rope_theta"] == 10000.0 and config.sliding_window == 4
    assert config.layer_types == ["sliding_attention", linear, linear]
    config.save_pretrained(tmp_path)
    again = GatedDeltaNetConfig.from_pretrained(tmp_path)
    assert again.attn == config.attn and again.layer_types == config.layer_types
    config.attn = None
    assert config.layer_types == [linear] * 3 and config.sliding_window is None
    assert GatedDeltaNetConfig.from_pretrained(tmp_path, attn=GIVEN).layer_types[1] == full
    model = GatedDeltaNetForCausalLM(again)
    attention = model.model.layers[0].attn
    assert attention.window_size == 4 and attention.qkv_bias is False
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, 64)


def test_sambas_default_is_filled():
    assert SambaConfig().attn["rope_theta"] == 10000.0 and SambaConfig().attn["qkv_bias"] is False


def test_base_classes_by_their_published_names():
    assert issubclass(GatedDeltaNetForCausalLM, FLAForCausalLM)
    model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SIZES, head_dim=8))
    assert isinstance(model.model, FLAModel) and isinstance(model, FLAPreTrainedModel)
