# SPDX-License-Identifier: MIT
"""A projection is called, never read: adapters, quantised layers, hooks, parametrisations and offload
on every linear layer of every model do what they do in any other model.
"""

import copy

import pytest
import torch
import torch.nn as nn
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize

from fla.models.utils import Cache
from fla.modules.linear import is_plain
from tests.helpers import relative_error
from tests.models.common import MODELS, ids, make

EVERY = pytest.mark.parametrize("name", MODELS)
X = ids(2, 12)


def projections(model):
    """Every linear layer, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def logits(model, **options):
    """Logits of a whole batch, then of a token after a cache, `[B, T + 1, vocabulary]`."""
    with torch.no_grad():
        whole = model(input_ids=X, use_cache=False, **options).logits
        cache = Cache(config=model.config)
        model(input_ids=X, past_key_values=cache, use_cache=True, **options)
        step = model(input_ids=X[:, :1], past_key_values=cache, use_cache=True, **options).logits
    return torch.cat([whole, step], 1)


def replaced(model, make_one):
    """A copy whose plain linear layers are `make_one(layer)`."""
    model = copy.deepcopy(model)
    for name, layer in projections(model).items():
        if type(layer) is nn.Linear:
            model.set_submodule(name, make_one(layer))
    return model


def scaled(model, factor):
    """A copy whose plain linear layers are multiplied by a factor."""
    model = copy.deepcopy(model)
    for layer in projections(model).values():
        if type(layer) is nn.Linear:
            for parameter in layer.parameters():
                parameter.data.mul_(factor)
    return model


@EVERY
def test_adapters_of_peft(name):
    """LoRA on every projection has an effect and gradients, and merging it changes nothing."""
    model = make(name, fuse_linear_cross_entropy=True)
    before = logits(model)
    names = list(projections(model))
    if name in ("mamba", "mamba2"):  # PEFT refuses it by model type, transformers' own too
        names = [n for n in names if not n.endswith("out_proj")]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    after = logits(adapted)
    assert relative_error(after, before) > 1e-3
    adapted.train()
    adapted(input_ids=X, labels=X).loss.backward()
    for parameter, value in adapted.named_parameters():
        if value.requires_grad:
            assert value.grad is not None and value.grad.isfinite().all(), parameter
            assert value.grad.abs().max() > 0, parameter
    if name != "bitnet":  # whose layers quantise the merged weight
        merged = adapted.eval().merge_and_unload()
        assert relative_error(logits(merged), after) < 1e-4


class Int8(nn.Module):
    """A layer that keeps whole numbers and a scale, as 8-bit packages do; it has no `weight`."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.numbers * self.scale, self.bias)


@EVERY
def test_eight_bit_wrappers(name):
    model = make(name)

    def rounded(linear):
        out, whole = copy.deepcopy(linear), Int8(linear)
        out.weight.data = whole.numbers * whole.scale
        return out

    same = logits(replaced(model, rounded))
    assert relative_error(logits(replaced(model, Int8)), same) < 1e-4


@EVERY
def test_dynamic_quantisation_of_torch(name):
    model = make(name)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    assert not any(type(m) is nn.Linear for m in small.modules())
    want = logits(model)
    bound = 0.12 if name == "mesa_net" else 0.1  # it solves with what was rounded
    assert (logits(small) - want).norm() < bound * want.norm()


@EVERY
def test_hooks_and_parametrisations(name):
    model = make(name)
    want = logits(scaled(model, 1.125))

    class Larger(nn.Module):
        def forward(self, x):
            return x * 1.125

    hooked, other = copy.deepcopy(model), copy.deepcopy(model)
    for layer in projections(hooked).values():
        if type(layer) is nn.Linear:
            layer.register_forward_hook(lambda m, a, y: y * 1.125)
    for layer in projections(other).values():
        if type(layer) is nn.Linear:
            for part, _ in list(layer.named_parameters()):
                parametrize.register_parametrization(layer, part, Larger())
    assert relative_error(logits(hooked), want) < 1e-4
    assert relative_error(logits(other), want) < 1e-4


@EVERY
def test_layers_on_disk(name, tmp_path):
    model = make(name)
    want = logits(model)
    assert torch.equal(logits(disk_offload(model, tmp_path, torch.device("cpu"))), want)


def test_what_is_plain():
    linear = nn.Linear(2, 3)
    assert is_plain(linear)
    handle = linear.register_full_backward_hook(lambda *a: None)
    assert not is_plain(linear)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not is_plain(linear)
    handle.remove()
    assert is_plain(linear)
    linear.forward = linear.forward
    assert not is_plain(linear)


class Reads(nn.Module):
    """A block that reads its projection, as a wrong fused path would."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


def test_a_read_projection_is_found():
    model = nn.Sequential(Reads(nn.Linear(4, 4)))
    x, want = torch.randn(2, 4), scaled(model, 1.125)
    for layer in projections(model).values():
        layer.register_forward_hook(lambda m, a, y: y * 1.125)
    assert relative_error(model(x), want(x)) > 1e-2
