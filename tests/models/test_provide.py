# SPDX-License-Identifier: MIT
"""transformers' models on our functions under the names causal_conv1d and mamba_ssm."""

import importlib
import importlib.util
import sys

import pytest
import torch

import fla
from fla.models import provider
from tests.models.tiny_transformers import MODELS, build, errors


def test_every_consumer_has_a_tiny_model():
    assert set(MODELS) == set(provider.CONSUMERS)


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_its_torch_fallback(name):
    for what, error in errors(name).items():
        assert error is None or error < 1e-5, (what, error)


def test_provided_reaches_models_imported_before_and_is_undone():
    build("mamba2")
    assert importlib.util.find_spec("mamba_ssm") is None
    with fla.provide() as provided:
        assert "fla's" in str(provided) and fla.provide().packages == provided.packages
        assert {use.runs for use in provider.report() if use.model == "mamba2"} == {"fla"}
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        assert selective_scan_fn.__module__.startswith("fla.")
        assert selective_state_update.__module__.startswith("fla.")
        assert importlib.util.find_spec("causal_conv1d").origin == "fla.provide()"
    assert "mamba_ssm" not in sys.modules and importlib.util.find_spec("causal_conv1d") is None
    assert {use.runs for use in provider.report() if use.model == "mamba2"} == {"transformers"}


def test_a_real_package_is_not_shadowed(tmp_path, monkeypatch):
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    body = "def causal_conv1d_fn(x, weight): return 'theirs'\ndef causal_conv1d_update(x): return 'theirs'\n"
    (package / "causal_conv1d_interface.py").write_text(body)
    (package / "__init__.py").write_text(
        "__version__ = '9.9'\nfrom .causal_conv1d_interface import *\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    build("lfm2")
    x, weight = torch.randn(1, 4, 5), torch.randn(4, 3)
    try:
        with fla.provide() as provided:
            assert (
                provided.packages["causal_conv1d"]
                == "9.9 for tensors on CUDA, fla's for all others"
            )
            real = importlib.import_module("causal_conv1d")
            assert real.__file__ == str(package / "__init__.py")
            assert real.causal_conv1d_fn(x, weight).shape == x.shape
        assert real.causal_conv1d_fn(x, weight) == "theirs"
    finally:
        for name in ("causal_conv1d", "causal_conv1d.causal_conv1d_interface"):
            sys.modules.pop(name, None)
        monkeypatch.undo()
        provider._look_up_again()


def test_hidden_package_stays_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with fla.provide() as provided:
        assert "hidden" in provided.packages["causal_conv1d"]


def test_rows_with_states_and_sequences():
    from fla.models.provided.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from fla.models.provided.mamba_ssm import mamba_chunk_scan_combined as scan

    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    number = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    y = causal_conv1d_fn(x, weight, seq_idx=number)
    torch.testing.assert_close(y[1:], causal_conv1d_fn(x[1:], weight))
    torch.testing.assert_close(y[:1, :, 4:], causal_conv1d_fn(x[:1, :, 4:], weight))
    whole = causal_conv1d_fn(x, weight)
    ring = torch.zeros(2, 6, 5)
    steps = [
        causal_conv1d_update(x[..., t], ring, weight, cache_seqlens=torch.full((2,), t))
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), whole)
    with pytest.raises(ValueError, match="one or the other"):
        causal_conv1d_fn(x, weight, seq_idx=number, return_final_states=True)
    v, dt, B = torch.randn(2, 9, 4, 3), torch.rand(2, 9, 4), torch.randn(2, 9, 2, 5)
    A, state, z = -torch.rand(4), torch.randn(2, 4, 3, 5), torch.randn(2, 9, 4, 3)
    o, last = scan(v, dt, A, B, B, 8, None, z, None, state, number, return_final_states=True)
    want, end = scan(
        v[1:], dt[1:], A, B[1:], B[1:], 8, None, z[1:], None, state[1:], return_final_states=True
    )
    torch.testing.assert_close((o[1:], last[1:]), (want, end))
    tail = [t[:1, 4:] for t in (v, dt, B, z)]
    want, end = scan(
        tail[0], tail[1], A, tail[2], tail[2], 8, None, tail[3], return_final_states=True
    )
    torch.testing.assert_close((o[:1, 4:], last[:1]), (want, end))


def test_selective_scan_refuses_what_it_does_not_compute():
    from fla.models.provided.mamba_ssm import selective_scan_fn

    u, A = torch.ones(1, 2, 3), -torch.ones(2, 1)
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan_fn(u, u, A, A, A)
    with pytest.raises(ValueError, match="A is complex"):
        selective_scan_fn(u, u, A + 0j, u[:, :1], u[:, :1])
