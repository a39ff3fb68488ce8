# SPDX-License-Identifier: MIT
"""Numeric checks and device facts under their known names."""

import subprocess
import sys

import pytest
import torch

import fla.utils as utils


def test_assert_close_accepts_close_and_rejects_the_rest():
    x = torch.randn(100)
    utils.assert_close("x", x, x + 1e-4 * torch.randn(100), 1e-3)
    utils.assert_close("x", torch.zeros(3), torch.full((3,), 1e-7), 1e-3)
    for other, message in [
        (x * 1.1, "error ratio"),
        (x * torch.nan, "holds NaN"),
        (x[:5], "differ"),
    ]:
        with pytest.raises(AssertionError, match=message):
            utils.assert_close("x", x, other, 1e-3)
    with pytest.raises(ValueError, match="would hide a miss"):
        utils.assert_close("x", x, x, 1e-3, warning=True)
    assert abs(utils.get_err_ratio(x, 1.1 * x) - 0.1) < 1e-6
    assert utils.get_abs_err(x, x + 2) == pytest.approx(2, abs=1e-6)


def test_input_guard_makes_tensors_contiguous():
    @utils.input_guard
    def every(a, b=None):
        return a.is_contiguous(), b is None or b.is_contiguous()

    @utils.input_guard(no_guard_contiguous=["a"])
    def but_a(a, b):
        return a.is_contiguous(), b.is_contiguous()

    @utils.input_guard(no_guard_contiguous=("a",))
    def a_in_a_tuple(a, b):
        return a.is_contiguous(), b.is_contiguous()

    @utils.contiguous(no_guard_contiguous=True)
    def none(a):
        return a.is_contiguous()

    x = torch.randn(3, 4).mT
    assert every(x, b=x) == (True, True)
    assert but_a(x, x) == (False, True) and but_a(a=x, b=x) == (False, True)
    assert a_in_a_tuple(x, x) == (False, True) and a_in_a_tuple(b=x, a=x) == (False, True)
    assert none(x) is False
    with pytest.raises(TypeError, match=r"no_guard_contiguous is 'a'.*pass \('a',\)"):
        utils.input_guard(no_guard_contiguous="a")


def test_facts_agree_with_torch_and_are_not_computed_at_import():
    assert utils.device == utils.get_available_device() == utils.device_name
    assert (torch.cuda.is_available() and torch.version.hip is None) == utils.IS_NVIDIA
    assert isinstance(utils.IS_NVIDIA_HOPPER, bool) and utils.is_amd == utils.IS_AMD
    assert utils.device_torch_lib is getattr(torch, utils.device)
    assert utils.check_pytorch_version("2.4") and not utils.check_pytorch_version("99.0")
    assert utils.get_multiprocessor_count() >= 1
    assert "IS_AMD" in dir(utils)
    if not torch.cuda.is_available():
        assert utils.get_all_max_shared_mem() == [] and not utils.check_shared_mem("hopper")
        assert utils.get_device_capability() is None
    with pytest.raises(AttributeError, match="IS_QUANTUM"):
        utils.IS_QUANTUM  # noqa: B018
    code = (
        "import torch\n"
        "def fail(*a, **k): raise SystemExit('a device was asked about at import')\n"
        "torch.cuda.is_available = torch.cuda.device_count = fail\n"
        "torch.accelerator.current_accelerator = fail\n"
        "import fla.utils, fla.ops, fla.modules, fla.layers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decorators_and_facts_under_their_published_names(monkeypatch):
    from transformers.utils.deprecation import deprecate_kwarg

    class Twice(torch.autograd.Function):
        @staticmethod
        @utils.autocast_custom_fwd
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @utils.autocast_custom_bwd
        def backward(ctx, dy):
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    calls = []

    def square(x):
        calls.append(1)
        return x * x

    utils.checkpoint(square)(x).sum().backward()
    assert len(calls) == 2  # once more in the backward pass
    assert utils.require_version("torch>=2.0", "")(square)(x).sum() == 3
    with pytest.raises(ImportError, match="torch>=99"):
        utils.require_version("torch>=99")(square)(x)
    with utils.custom_device_ctx(0):
        pass
    assert utils.deprecate_kwarg is deprecate_kwarg
    assert utils.check_transformers_version("5.0") and not utils.check_transformers_version("99")
    assert utils.find_spec_cached("nosuchpackage") is None and utils.find_spec_cached("torch")
    for name in ("IS_INTEL_ALCHEMIST", "IS_AMD", "is_nvidia", "has_usable_nvcc"):
        fact = getattr(utils, name)
        assert isinstance(fact() if callable(fact) else fact, bool)
    monkeypatch.setattr(utils, "find_spec_cached", lambda name: None)  # without Triton
    assert not utils.TRITON_ABOVE_3_6_0 and not utils.IS_GATHER_SUPPORTED
    assert utils.autotune_cache_kwargs == {}
    utils.check_environments()
