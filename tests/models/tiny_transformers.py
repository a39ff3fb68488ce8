# SPDX-License-Identifier: MIT
"""A tiny model with random weights of every architecture of transformers that looks for our packages."""

import importlib
from contextlib import contextmanager

import torch

import fla
from fla.models import provider

ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
GDN = dict(
    linear_num_key_heads=2, linear_key_head_dim=8, linear_num_value_heads=4, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"], **ATTENTION,
)  # fmt: skip
KDA = dict(
    linear_num_heads=2, linear_head_dim=8, kv_lora_rank=8, qk_nope_head_dim=4, v_head_dim=8,
    layer_types=["linear_attention", "full_attention"], num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip
SSD = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=8)
SSD_NAMES = dict(n_groups=2, conv_kernel=4, chunk_size=8)
S6 = dict(mamba_d_state=4, mamba_dt_rank=4)
INKLING = dict(
    head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4,
    rel_extent=64, n_routed_experts=4, layer_types=["hybrid_sliding", "hybrid"], **EXPERTS, **ATTENTION,
)  # fmt: skip

# modelling module -> (config class, model class, sizes beside hidden_size, layers and vocabulary)
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", dict(
        head_dim=8, num_experts=4, shared_expert_intermediate_size=16, **EXPERTS, **GDN)),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", dict(head_dim=8, **GDN)),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", dict(
        head_dim=8, num_experts=4, shared_expert_intermediate_size=16, **EXPERTS, **GDN)),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", dict(
        head_dim=8, num_experts=4, shared_expert_intermediate_size=16, hc_count=2, hc_lowrank=8,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=64,
        indexer_compress_ratio=4, **EXPERTS, **GDN)),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", dict(
        **GDN | dict(linear_num_value_heads=2), linear_allow_neg_eigval=True, eos_token_id=2)),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", dict(
        qk_rope_head_dim=4, num_local_experts=4, bos_token_id=1, eos_token_id=2, **EXPERTS, **KDA)),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextModel", dict(
        q_lora_rank=8, n_routed_experts=4, index_head_dim=8, index_n_heads=2, hc_mult=2, **EXPERTS, **KDA)),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", dict(
        qk_rope_head_dim=4, num_local_experts=4, n_group=2, topk_group=1, head_dim=8,
        eos_token_id=2, **EXPERTS, **KDA)),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        num_heads=4, head_dim=16, state_size=8, **SSD_NAMES)),
    "bamba": ("BambaConfig", "BambaForCausalLM", dict(attn_layer_indices=[1], **SSD, **ATTENTION)),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", dict(
        mamba_d_ssm=64, mamba_rms_norm=True, mamba_norm_before_gate=False, **SSD, **ATTENTION)),
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", dict(
        layer_types=["mamba", "attention"], num_local_experts=2, shared_intermediate_size=16, **SSD, **ATTENTION)),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", dict(
        layers_block_type=["mamba", "attention"], ssm_state_size=8, mamba_num_heads=4,
        mamba_head_dim=16, head_dim=8, **SSD_NAMES, **ATTENTION)),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM", dict(
        layers_block_type=["mamba", "hybrid"], mamba_d_state=8, mamba_ngroups=2, n_mamba_heads=4,
        chunk_size=8, num_attention_heads=4, num_key_value_heads=4, adapter_rank=4)),
    "mamba": ("MambaConfig", "MambaForCausalLM", dict(state_size=4)),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", dict(state_size=4)),
    "jamba": ("JambaConfig", "JambaForCausalLM", dict(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, **S6, **ATTENTION)),
    "zamba": ("ZambaConfig", "ZambaForCausalLM", dict(
        layers_block_type=["mamba", "hybrid", "hybrid"], num_attention_heads=4,
        num_key_value_heads=4, n_mamba_heads=2, **S6)),
    "inkling": ("InklingTextConfig", "InklingForCausalLM", dict(
        mlp_layer_types=["dense", "sparse"], n_shared_experts=1, logits_mup_width_multiplier=1.0, **INKLING)),
    "inkling2": ("Inkling2TextConfig", "Inkling2ForCausalLM", dict(
        unpadded_vocab_size=64, eos_token_id=2, **INKLING)),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"], **ATTENTION)),
    "lfm2_moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", dict(
        layer_types=["conv", "full_attention"], num_dense_layers=1, num_experts=4, **EXPERTS, **ATTENTION)),
}  # fmt: skip


def build(name, **changes):
    """(the modelling module, the model in eval mode)"""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config, model, sizes = MODELS[name]
    config = getattr(importlib.import_module("transformers"), config)
    own = {"intermediate_size": 48, "num_hidden_layers": 2}
    if name in ("mamba", "falcon_mamba"):
        del own["intermediate_size"]
    if "layers_block_type" in sizes:
        own["num_hidden_layers"] = len(sizes["layers_block_type"])
    torch.manual_seed(0)
    config = config(vocab_size=64, hidden_size=32, pad_token_id=0, **own, **sizes | changes)
    return module, getattr(module, model)(config).eval()


# the boundaries that reach every mixer of the model; None where transformers hands them to some only:
# a selective scan gets none, nor do the convolutions of Inkling
PACKED = {
    **dict.fromkeys(MODELS, "seq_idx"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid"), "cu_seq_lens_q"
    ),
    **dict.fromkeys(("kimi_linear", "glm5_next", "bailing_hybrid"), "cu_seqlens"),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba", "inkling", "inkling2"), None),
}

# attention layers of these know no packed rows; their recurrent layers alone do
RECURRENT_ONLY = {
    "glm5_next": dict(layer_types=["linear_attention"] * 2),
    "granitemoehybrid": dict(layer_types=["mamba"] * 2),
}


def ids(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(3))


@contextmanager
def torch_only(module):
    """Inside the block transformers' own torch code, undecorated."""
    name = module.__name__.rpartition("modeling_")[2]
    kept = {f: getattr(module, f) for f in provider.CONSUMERS[name]}
    try:
        for f, function in kept.items():
            setattr(module, f, function.__wrapped__)
        yield
    finally:
        for f, function in kept.items():
            setattr(module, f, function)


def train(model):
    """(the output, every gradient) of a training step without a cache."""
    model.train().zero_grad()
    y = model(ids(2, 21), use_cache=False)[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * weights).mean().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return y.detach(), grads


@torch.no_grad()
def continued(model):
    """(a prompt's output, three decoded tokens' outputs)"""
    x = ids(2, 12)
    out = model(x[:, :9], use_cache=True)
    cache, steps = out.past_key_values if "past_key_values" in out else out.cache_params, []
    name = "past_key_values" if "past_key_values" in out else "cache_params"
    for t in range(9, 12):
        steps.append(model(x[:, t : t + 1], use_cache=True, **{name: cache})[0])
    return out[0], torch.cat(steps, 1)


def packed(model, x, mark):
    """The output for a row of two sequences, of 5 and of 7 tokens."""
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    marks = {
        "seq_idx": torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32),
        "cu_seq_lens_q": bounds,
        "cu_seqlens": bounds,
    }
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    if type(model).__name__ == "Mamba2ForCausalLM":  # which hands its backbone no boundaries
        y = model.backbone(x, use_cache=False, **{mark: marks[mark]})[0]
        return model.lm_head(y)
    return model(x, position_ids=places, use_cache=False, **{mark: marks[mark]})[0]


@torch.no_grad()
def packing_error(name):
    """Between a packed row and its sequences run alone; None where boundaries do not reach."""
    if PACKED[name] is None:
        return None
    model, x = build(name, **RECURRENT_ONLY.get(name, {}))[1], ids(1, 12)
    alone = [model(x[:, a:b], use_cache=False)[0] for a, b in ((0, 5), (5, 12))]
    row = packed(model, x, PACKED[name])
    moved = x.clone()
    moved[:, :5] = moved[:, :5].flip(1)
    again = packed(model, moved, PACKED[name])
    assert relative(again[:, 5:], row[:, 5:]) < 1e-6
    return relative(row, torch.cat(alone, 1))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


def errors(name):
    """Largest differences, relative to the largest number, between our functions and transformers'
    torch code; of the packed row, between it and its sequences run alone.
    """
    module, model = build(name)
    with fla.provide():
        (y, grads), (prompt, steps) = train(model), continued(model)
        apart = packing_error(name)
    with torch_only(module):
        (want, want_grads), (want_prompt, want_steps) = train(model), continued(model)
    assert grads.keys() == want_grads.keys()
    return {
        "training": relative(y, want),
        "gradients": max(relative(grads[k], want_grads[k]) for k in grads),
        "prefill": relative(prompt, want_prompt),
        "decoding": relative(steps, want_steps),
        "packed": apart,
    }


if __name__ == "__main__":  # the table of docs/transformers.md
    for model in MODELS:
        cells = ("-" if e is None else f"{e:.0e}" for e in errors(model).values())
        print(f"| `{model}` | {' | '.join(cells)} |", flush=True)
