# SPDX-License-Identifier: MIT
"""transformers' own models on our operators: equal to transformers' torch code, in training and generation."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from transformers.integrations import hub_kernels

import fla
from fla.models import provider
from fla.ops.engine.native import library

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_num_value_heads=4,
    linear_value_head_dim=8,
)
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", dict(
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", dict(head_dim=8)),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", dict(linear_num_value_heads=2, linear_allow_neg_eigval=True)),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", dict(
        layer_types=["linear_attention"] * 3 + ["full_attention"], linear_num_heads=2, linear_head_dim=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def build(monkeypatch):
    def make(name):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        config, model, extra = MODELS[name]
        config = getattr(importlib.import_module("transformers"), config)(
            **{**COMMON, **extra}, pad_token_id=0
        )
        torch.manual_seed(0)
        built = getattr(module, model)(config).eval()
        assert "linear_attention" in config.layer_types and "full_attention" in config.layer_types
        return module, built

    return make


def run_on_the_fallback(module, monkeypatch):
    """Put transformers' undecorated torch functions in place of what it resolved."""
    for name in provider.CONSUMERS[module.__name__.rpartition("modeling_")[2]]:
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


def ids(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(3))


@every_model
def test_transformers_finds_our_operators(name):
    uses = {use.function: use for use in provider.report() if use.model == name}
    assert set(uses) == set(provider.CONSUMERS[name])
    for function, use in uses.items():
        package = provider.LOOKED_UP[function][0]
        assert use.runs == ("fla" if package == "fla" else "transformers")
        assert package == "fla" or use.why == f"{package} was not found; fla.provide() gives ours"


def test_report_says_why_where_ours_does_not_run(monkeypatch):
    """A later transformers may look up a function that we lack."""
    import inspect

    real = inspect.getclosurevars

    def lacking(function):
        found = real(function)
        if "implementation" in found.nonlocals:
            found.nonlocals["implementation"] = torch.add
        return found

    monkeypatch.setattr(provider.inspect, "getclosurevars", lacking)
    kimi = [use for use in provider.report() if use.model == "kimi_linear"]
    kimi = [use for use in kimi if provider.LOOKED_UP[use.function][0] == "fla"]
    assert kimi and all(use.runs == "transformers" and "fla has no" in use.why for use in kimi)


@every_model
def test_training_equals_the_fallback(name, build, monkeypatch):
    module, model = build(name)
    x = ids(2, 70)
    out = model(x, labels=x)
    out.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run_on_the_fallback(module, monkeypatch)
    want = model(x, labels=x)
    want.loss.backward()
    assert (out.logits - want.logits).abs().max() < 1e-4
    for k, p in model.named_parameters():
        if p.grad is not None:
            assert (grads[k] - p.grad).abs().max() < 1e-4 * max(1, p.grad.abs().max().item()), k


@every_model
def test_our_operator_is_the_one_that_runs(name, build, monkeypatch):
    calls = []
    kernel = "chunk" if library.MISSING else "native_chunk"
    original = getattr(torch.ops.fla, kernel)

    class Spy:
        def __call__(self, *args):
            calls.append(args)
            return original(*args)

    monkeypatch.setattr(torch.ops.fla, kernel, Spy())
    _, model = build(name)
    model(ids(1, 9))
    assert len(calls) == model.config.layer_types.count("linear_attention")


@every_model
def test_generation_equals_the_fallback(name, build, monkeypatch):
    module, model = build(name)
    x = ids(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    options = dict(
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ours = model.generate(x, **options)
    run_on_the_fallback(module, monkeypatch)
    want = model.generate(x, **options)
    assert torch.equal(ours.sequences, want.sequences)
    for a, b in zip(ours.logits, want.logits, strict=True):
        assert (a - b).abs().max() < 1e-4


@every_model
def test_packed_sequences_stay_apart(name, build, monkeypatch):
    """Which newer fallbacks refuse. Softmax layers separate by position ids; ours by the boundaries."""
    module, model = build(name)
    x, spans = ids(1, 12), [(0, 5), (5, 12)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    packing = dict(
        position_ids=torch.cat([torch.arange(b - a) for a, b in spans])[None],
        use_cache=False,
    )
    packing["cu_seqlens" if name == "kimi_linear" else "cu_seq_lens_q"] = bounds
    with fla.provide():
        packed = model(x, **packing).logits
    separate = torch.cat([model(x[:, a:b], use_cache=False).logits for a, b in spans], 1)
    assert (packed - separate).abs().max() < 1e-4
    moved = x.clone()
    moved[:, :5] = moved[:, :5].flip(1)
    with fla.provide():
        assert torch.equal(model(moved, **packing).logits[:, 5:], packed[:, 5:])
    if name == "kimi_linear" or not FALLBACK_REFUSES:
        return
    q = torch.randn(1, 12, 2, 8)
    gates = torch.rand(2, 1, 12, 2)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        fallback_wrapper(module)(q, q, q, g=-gates[0], beta=gates[1], cu_seqlens=bounds)


# transformers 5.17's, the oldest that is supported, mixes them without a word
FALLBACK_REFUSES = "keep packed sequences apart" in inspect.getsource(hub_kernels)


def fallback_wrapper(module):
    """The function as transformers builds it where no package `fla` is found."""
    decorate = hub_kernels.use_kernel_func_from_hub_with_fallback(
        "no_such_function", "no_such_package"
    )
    return decorate(module.torch_chunk_gated_delta_rule.__wrapped__)


EACH_IN_A_CHILD = """
import os, sys, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
for code in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(code, {"__name__": "__main__"})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


def run_in_fresh_interpreters(codes):
    """Each in a process that has imported torch, with what of it transformers imports, and nothing else."""
    subprocess.run([sys.executable, "-c", EACH_IN_A_CHILD, *codes], check=True)


def test_importing_fla_registers_its_models(tmp_path):
    from tests.models.common import make

    make("gated_deltanet").save_pretrained(tmp_path)
    orders = [
        "import fla\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport fla",
        "from fla.models import Cache\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "import fla, transformers\nfrom fla.ops import chunk_gdn\nAutoConfig = transformers.AutoConfig\n"
        "AutoModelForCausalLM = transformers.AutoModelForCausalLM",
    ]
    check = (
        f"\nassert AutoConfig.from_pretrained({str(tmp_path)!r}).model_type == 'gated_deltanet'\n"
        f"name = type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__\n"
        "assert name == 'GatedDeltaNetForCausalLM'"
    )
    run_in_fresh_interpreters([imports + check for imports in orders])


def test_every_model_type_is_found_by_its_name_and_imports_one_architecture():
    code = (
        "import sys, fla\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "AutoConfig.for_model('gla')\n"
        "assert 'fla.models.gla' in sys.modules and 'fla.models.kda' not in sys.modules\n"
        "for name in fla.models.MODELS:\n"
        "    config = AutoConfig.for_model(name)\n"
        "    assert (config.model_type, type(config).__module__) == (name, f'fla.models.{name}')\n"
        "    model = AutoModelForCausalLM._model_mapping[type(config)]\n"
        "    assert model is getattr(fla, fla.models.MODELS[name] + 'ForCausalLM')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_finds_us_in_any_order_of_imports():
    orders = [
        "import transformers\nfrom transformers import AutoModelForCausalLM",
        "from transformers import Qwen3NextForCausalLM",
        "import fla\nfrom transformers import Qwen3NextForCausalLM",
        "from transformers import AutoModel\nimport fla.models",
    ]
    check = (
        "\nfrom transformers.models.qwen3_next import modeling_qwen3_next as m\n"
        "import inspect\n"
        "for f in (m.torch_chunk_gated_delta_rule, m.torch_recurrent_gated_delta_rule):\n"
        "    used = inspect.getclosurevars(f).nonlocals['implementation']\n"
        "    assert used.__module__ == 'fla.ops.gated_delta_rule', used\n"
    )
    run_in_fresh_interpreters([imports + check for imports in orders])


def test_names_older_and_newer_transformers_look_up():
    for name in (
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "recurrent_gated_delta_rule",
    ):
        assert callable(getattr(fla, name))
    assert fla.ops.gated_delta_rule.chunk_gated_delta_rule is fla.chunk_gated_delta_rule
    from fla.modules import FusedRMSNormGated, ShortConvolution

    FusedRMSNormGated(8, eps=1e-6, activation="silu", device="cpu", dtype=torch.float32)
    ShortConvolution(hidden_size=8, kernel_size=4, bias=False, activation="silu")
    assert int(fla.__version__.split(".")[0]) >= 1
