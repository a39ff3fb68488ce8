# SPDX-License-Identifier: MIT
"""What published models compute around their layers, and how their configs read."""

import pytest
import torch
import torch.nn.functional as F

from fla.models import (
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GLAConfig,
    GSAConfig,
    GSAForCausalLM,
    HGRN2Config,
    HGRN2ForCausalLM,
    LightNetConfig,
    LightNetForCausalLM,
    LogLinearMamba2Config,
    LogLinearMamba2ForCausalLM,
    MomConfig,
    RodimusConfig,
    RodimusForCausalLM,
    SambaConfig,
    SambaForCausalLM,
)
from tests.helpers import assert_same
from tests.models.common import TINY, ids, make
from tests.models.published_fields import COMMON, OWN


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_rodimus_blocks_carry_the_mixers_residual(plus, wide):
    """r = h + mixer(norm h); y = r + ska(norm r); r + mlp(norm y)."""
    kind = dict(block_type="rodimus_plus", ska_attn=dict(num_heads=4, window_size=4))
    config = RodimusConfig(**TINY | dict(
        expand_ratio=8, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        block_residual_in_fp32=wide, **(kind if plus else dict(block_type="rodimus"))))  # fmt: skip
    torch.manual_seed(0)
    model = RodimusForCausalLM(config).double().eval()
    h = model.model.embeddings(ids(2, 7))
    for block in model.model.layers:
        h = h + block.mixer(rms(h, block.mixer_norm.weight, 1e-5))[0]
        if plus:
            y = h + block.ska_attn(rms(h, block.ska_attn_norm.weight, 1e-5))[0]
            mlp, y = block.mlp, rms(y, block.mlp_norm.weight, 1e-5)
            h = h + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    want = model.lm_head(rms(h, model.model.norm.weight, 1e-5))
    assert_same(model(ids(2, 7)).logits, want, "logits")


def test_rodimus_plus_needs_heads_and_has_a_window():
    with pytest.raises(ValueError, match="rodimus_plus needs ska_attn"):
        RodimusForCausalLM(RodimusConfig(**TINY))
    config = RodimusConfig(
        **TINY | dict(expand_ratio=8, ska_attn=dict(num_heads=4), eos_token_id=2)
    )
    assert RodimusForCausalLM(config).model.layers[0].ska_attn.window_size == 1024


def test_a_residual_in_fp32_keeps_bf16_sums():
    """Sums of the blocks are not rounded to bf16, and fp64 models stay fp64."""
    config = RodimusConfig(**TINY | dict(expand_ratio=8, block_type="rodimus", eos_token_id=2,
        block_residual_in_fp32=True))  # fmt: skip
    model = RodimusForCausalLM(config).bfloat16().eval()
    states = model(ids(1, 5), output_hidden_states=True).hidden_states
    assert states[1].dtype == torch.float32 and states[-1].dtype == torch.bfloat16


@pytest.mark.parametrize(("config", "model", "options", "published"), [
    (HGRN2Config, HGRN2ForCausalLM, dict(expand_ratio=16), 1e-5),
    (GSAConfig, GSAForCausalLM, dict(num_heads=2, num_slots=8), 1e-5),
    (LightNetConfig, LightNetForCausalLM, dict(expand_ratio=16), 1e-6),
])  # fmt: skip
def test_norm_eps_does_not_reach_the_mixers_norm(config, model, options, published):
    for eps in (1e-6, 0.3):
        built = model(config(**TINY | options, norm_eps=eps))
        assert built.model.layers[0].attn.g_norm.eps == published
        assert built.model.layers[0].attn_norm.eps == eps
    built = model(config(**TINY | options, o_norm_eps=0.3))
    assert built.model.layers[0].attn.g_norm.eps == 0.3


@pytest.mark.parametrize("layers", [1, 2])
def test_hgrn2_with_heads_and_ratio_runs(layers):
    config = HGRN2Config(hidden_size=256, num_heads=4, num_hidden_layers=layers, vocab_size=64)
    model = HGRN2ForCausalLM(config)
    assert model.model.layers[0].attn.num_heads == 2
    assert model(ids(1, 4)).logits.shape == (1, 4, 64)


def attention_layers(config):
    return [
        i for i in range(config.num_hidden_layers) if config.layer_type(i) != "linear_attention"
    ]


def test_sambas_default_attention_does_not_follow_the_depth():
    assert attention_layers(SambaConfig()) == list(range(1, 18, 2))
    assert attention_layers(SambaConfig(num_hidden_layers=21)) == list(range(1, 18, 2))
    assert attention_layers(SambaConfig(num_hidden_layers=4)) == [1, 3]
    assert SambaConfig(num_hidden_layers=4).attn["layers"] == [1, 3]
    assert SambaConfig(num_hidden_layers=1).attn is None


def test_samba_without_attention():
    config = SambaConfig(**TINY, attn=None)
    assert attention_layers(config) == []
    again = SambaConfig.from_dict(config.to_dict())
    assert again.attn is None and attention_layers(again) == []
    assert SambaForCausalLM(config)(ids(1, 4)).logits.shape == (1, 4, 64)


@pytest.mark.parametrize("layers", [2, 17, 18, 21])
def test_a_samba_dictionary_is_trimmed(layers):
    config = SambaConfig.from_dict({**SambaConfig().to_dict(), "num_hidden_layers": layers})
    assert attention_layers(config) == [i for i in range(1, 18, 2) if i < layers]
    again = SambaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_sambas_layer_types_win_over_its_default():
    kinds = ["full_attention", "linear_attention", "full_attention"]
    sizes = TINY | dict(hidden_size=36)
    config = SambaConfig(**sizes, layer_types=kinds)
    assert config.layer_types == kinds and config.attn["num_heads"] == 18
    assert SambaConfig.from_dict(config.to_dict()).layer_types == kinds
    config = SambaConfig(**sizes, layer_types=["linear_attention"] * 3)
    assert attention_layers(config) == []


def test_samba_refuses_other_layers_that_are_not_there():
    with pytest.raises(ValueError, match="holds 5, which is outside"):
        SambaConfig(num_hidden_layers=3, attn=dict(layers=[5], num_heads=18, window_size=8))


def test_log_linear_mamba2_models_keep_the_configs_biases():
    config = LogLinearMamba2Config(**TINY, head_dim=16, state_size=8)
    names = set(LogLinearMamba2ForCausalLM(config).state_dict())
    assert "backbone.layers.0.mixer.conv1d.bias" in names
    assert "backbone.layers.0.mixer.in_proj.bias" not in names


def test_the_output_gate_is_a_field():
    options = dict(num_heads=2, head_dim=8)
    torch.manual_seed(0)
    swish = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**TINY, **options)).double()
    config = GatedDeltaNetConfig(**TINY, **options, output_gate_activation="sigmoid")
    sigmoid = GatedDeltaNetForCausalLM(config).double()
    sigmoid.load_state_dict(swish.state_dict())
    assert (swish(ids(1, 5)).logits - sigmoid(ids(1, 5)).logits).abs().max() > 0.01
    config = GatedDeltaNetConfig(**TINY, **options, output_gate_activation="tanh")
    with pytest.raises(ValueError, match="output_gate_activation is 'tanh'"):
        GatedDeltaNetForCausalLM(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(hidden_sizee=3), "no field 'hidden_sizee'; did you mean 'hidden_size'"),
        (dict(attnres_block_size=4), "attention residuals are not implemented"),
        (dict(zzz=1), "no field 'zzz'; the fields are .*hidden_size"),
    ],
)
def test_an_unknown_config_field_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        GLAConfig(**given)


def test_fields_of_transformers_and_of_published_configs_pass(tmp_path):
    config = GLAConfig(
        num_heads=2, attnres_block_size=None, use_gk=True, torch_dtype="float32", temperature=0.5
    )
    assert config.use_gk and config.dtype is torch.float32
    config.quantization_config = {"quant_method": "none"}
    config.save_pretrained(tmp_path)
    assert GLAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("kind", OWN)
def test_a_published_config_passes_with_all_its_fields(kind):
    """A saved config.json holds every field; one that we lack changes nothing in published code."""
    config = type(make(kind).config)
    ours = config().to_dict()
    values = {"attnres_block_size": None, "mom_backend": "gated_deltanet"}
    given = {name: values.get(name, ours.get(name, 1)) for name in [*COMMON, *OWN[kind].split()]}
    for name, value in config(**given).to_dict().items():
        assert value == ours.get(name, given.get(name)) or name in ("expand_k", "expand_v"), name


def test_a_backend_of_mom_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="mom_backend is 'gla'; only 'gated_deltanet'"):
        MomConfig(mom_backend="gla")
