# SPDX-License-Identifier: MIT
"""transformers' own checkpoints as ours and back: equal logits, equal weights."""

import copy
import importlib

import pytest
import torch
import transformers

import fla.models
from fla.layers import GatedDeltaNet, KimiDeltaAttention
from fla.models import Cache
from fla.models.convert import (
    convert_config,
    convert_model,
    convert_state_dict,
    linear_attention_of_kimi,
    linear_attention_of_qwen,
    linear_attention_to_kimi,
    linear_attention_to_qwen,
)
from tests.models.common import ids
from tests.processes import run

LLAMA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SSM = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
GDN = dict(
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_num_value_heads=4,
    linear_value_head_dim=16,
    num_hidden_layers=4,
)
EXPERTS = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=24,
)
KIMI = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=20,
    num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4, num_local_experts=8,
    num_experts_per_tok=3, n_shared_experts=2, n_group=4, topk_group=2, kv_lora_rank=12,
    qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, linear_head_dim=8, linear_num_heads=2,
)  # fmt: skip
MODELS = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=4)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=16)),
    "olmo2": ("Olmo2", LLAMA),
    "qwen3_5": ("Qwen3_5", LLAMA | GDN | dict(head_dim=16)),
    "qwen3_5_moe": ("Qwen3_5Moe", LLAMA | GDN | EXPERTS | dict(head_dim=16)),
    "qwen3_next": ("Qwen3Next", LLAMA | GDN | EXPERTS | dict(head_dim=16, mlp_only_layers=[1])),
    "olmo_hybrid": ("OlmoHybrid", LLAMA | GDN | dict(num_attention_heads=4)),
    "olmo_hybrid-rope": ("OlmoHybrid", LLAMA | GDN | dict(rope_parameters=dict(rope_theta=1e4))),
    "kimi_linear": ("KimiLinear", KIMI),
    "kimi_linear-lora": ("KimiLinear", KIMI | dict(q_lora_rank=10, norm_topk_prob=False)),
    "rwkv": ("Rwkv", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    "mamba": ("Mamba", SSM | dict(time_step_rank=3, layer_norm_epsilon=1e-4)),
    "mamba2": ("Mamba2", SSM | dict(num_heads=4, head_dim=16, n_groups=1, time_step_limit=(0.0, 0.05))),
}  # fmt: skip


def build(name):
    prefix, arguments = MODELS[name]
    # `import fla` puts our classes in the Auto mappings; these are transformers' own
    text = "TextConfig" if name.startswith("qwen3_5") else "Config"
    config = getattr(transformers, prefix + text)(**arguments, pad_token_id=0)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    for x in model.state_dict().values():  # what starts at 0 or 1 alike would hide errors
        if x.dim() == 1 or x.shape[:2] == (1, 1):
            x.add_(0.1 * torch.randn_like(x))
        elif x.std() == 0:
            x.add_(0.5 * torch.randn_like(x))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_and_the_way_back_is_exact(name):
    theirs = build(name)
    ours = convert_model(theirs)
    assert type(ours).__module__.startswith("fla.models") and not ours.training
    x = ids(2, 11)
    with torch.no_grad():
        want = theirs(x).logits
        assert (ours(x).logits - want).abs().max() < 2e-5
        cache = Cache(config=ours.config)
        steps = [
            ours(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(11)
        ]
        assert (torch.cat(steps, 1) - want).abs().max() < 2e-5
    back = convert_state_dict(ours.state_dict(), theirs.config, back=True)
    for key, value in theirs.state_dict().items():
        assert (back[key] - value).abs().max() < 1e-6, key  # norms less one lose a rounding
    assert set(back) == set(theirs.state_dict())


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "Olmo2Config", "MambaConfig", "Mamba2Config", "Qwen3NextConfig"]
)
def test_an_activation_that_ours_has_not_is_refused(name):
    config = getattr(transformers, name)(hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        convert_config(config)
    if "Mamba" in name:  # one model type, so it loads as it is
        with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
            getattr(fla.models, name)(hidden_act="gelu")


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_checkpoints_of_the_same_model_type_load_as_they_are(name, tmp_path):
    """`import fla` has put our class behind a model type of transformers."""
    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(ours).__module__ == f"fla.models.{name}"
    assert (ours(ids(2, 9)).logits - theirs(ids(2, 9)).logits).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_linear_attention_of_qwen(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5"}[name]
    config = getattr(transformers, {"qwen3_next": "Qwen3NextConfig", "qwen3_5": "Qwen3_5TextConfig"}[name])(
        **LLAMA, head_dim=8, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_num_value_heads=4, linear_value_head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(module, f"{prefix}GatedDeltaNet")(config, 0).eval()
    ours = GatedDeltaNet(32, 2, 8, 2, num_v_heads=4, norm_eps=config.rms_norm_eps).eval()
    ours.load_state_dict(linear_attention_of_qwen(theirs.state_dict(), config))
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        assert (ours(x)[0] - theirs(x)).abs().max() < 1e-5
    for key, value in linear_attention_to_qwen(ours.state_dict(), config).items():
        assert torch.equal(theirs.state_dict()[key], value), key


def test_linear_attention_of_kimi():
    module = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    config = transformers.KimiLinearConfig(
        **LLAMA, linear_num_heads=2, linear_head_dim=8, layer_types=["linear_attention"] * 2
    )
    torch.manual_seed(0)
    theirs = module.KimiLinearDeltaAttention(config, 0).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = KimiDeltaAttention(32, 1, 8, 2, norm_eps=config.rms_norm_eps).eval()
    ours.load_state_dict(linear_attention_of_kimi(theirs.state_dict()))
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        assert (ours(x)[0] - theirs(x)).abs().max() < 1e-5
    for key, value in linear_attention_to_kimi(ours.state_dict()).items():
        assert torch.equal(theirs.state_dict()[key], value), key
    ours.g_proj[1].bias.data.fill_(1)
    with pytest.raises(ValueError, match=r"g_proj\.1\.bias is not 0"):
        linear_attention_to_kimi(ours.state_dict())


def test_what_has_no_counterpart_is_refused():
    for config, message in [
        (transformers.GPT2Config(), "model_type 'gpt2' is not known"),
        (transformers.LlamaConfig(**LLAMA, attention_bias=True), "attention_bias"),
        (transformers.KimiLinearConfig(**KIMI, attention_bias=True), "attention_bias"),
        (transformers.Mamba2Config(**SSM, num_heads=4, head_dim=16, n_groups=2), "n_groups is 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_config(config)


def test_rwkv_that_is_rescaled_for_inference_is_refused():
    theirs = build("rwkv")
    theirs(ids(1, 3))
    with pytest.raises(ValueError, match="divided weights by powers of 2"):
        convert_model(theirs)


def test_experts_keep_their_load_balancing_loss():
    arguments = MODELS["qwen3_next"][1] | dict(output_router_logits=True, mlp_only_layers=[0, 1, 2])
    theirs = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**arguments)).train()
    ours, x = convert_model(theirs), ids(2, 9)
    plain = copy.deepcopy(ours)
    plain.eval()
    want = theirs(x, labels=x).aux_loss * theirs.config.router_aux_loss_coef
    assert want > 0
    torch.testing.assert_close(ours(x, labels=x).loss - plain(x, labels=x).loss, want)


def test_the_command_there_and_back(tmp_path):
    theirs = build("llama")
    theirs.save_pretrained(tmp_path / "llama")
    convert = ("-m", "fla.cli", "convert")
    run(*convert, tmp_path / "llama", tmp_path / "ours", check=True)
    back = [tmp_path / "ours", tmp_path / "back", "--like", tmp_path / "llama"]
    run(*convert, *back, check=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again(ids(1, 5)).logits, theirs(ids(1, 5)).logits)
    done = run(*convert, tmp_path / "ours", tmp_path / "x")
    assert done.returncode == 2 and "expected a causal language model of llama" in done.stderr
