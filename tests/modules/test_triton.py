# SPDX-License-Identifier: MIT
"""The modules' Triton kernels against the torch forms in fp64: on a GPU where there is one, else in the interpreter."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from fla._explain import explain
from fla.core import stage
from fla.core.stage import use_backend
from fla.modules import FusedCrossEntropyLoss
from fla.modules.fused_cross_entropy import CROSS_ENTROPY, cross_entropy_loss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.kernels import cross_entropy, gated_norm
from fla.modules.losses import LogitShape
from tests.helpers import gradients
from tests.modules.test_losses import OPTIONS
from tests.ops.family import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def both(form, tensors, **options):
    """Results and gradients by torch in fp64, and by the kernels in fp32."""
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = {n: x.to(DEVICE, dtype).requires_grad_() for n, x in tensors.items()}
        with use_backend(backend):
            y = form(**leaves, **options)
            outputs = list(y) if isinstance(y, tuple) else [y]
            results = {str(i): x for i, x in enumerate(outputs)}
            found.append(results | gradients(outputs, leaves))
    return found


@pytest.mark.parametrize("shape", [(3, 5, 12), (1, 9000, 3), (0, 12), (2, 600)], ids=str)
@pytest.mark.parametrize("extras", [(), ("weight",), ("weight", "bias", "residual")], ids=str)
def test_gated_norm(shape, extras):
    generator = torch.Generator().manual_seed(0)
    sizes = dict(x=shape, g=shape, weight=shape[-1:], bias=shape[-1:], residual=shape)
    x = {
        n: torch.randn(s, generator=generator) for n, s in sizes.items() if n in ("x", "g", *extras)
    }
    missing = {n: None for n in ("weight", "bias") if n not in x}
    for activation in ("swish", "sigmoid"):
        want, got = both(rms_norm_gated, x, **missing, activation=activation, prenorm=True)
        compare(got, want, f"{shape} {extras}", 1e-5)


def test_gated_norm_of_rows_that_are_not_contiguous():
    x, g = torch.randn(2, 8, 3, 5).transpose(1, 3)
    want, got = both(rms_norm_gated, dict(x=x, g=g, weight=torch.randn(8)), bias=None)
    compare(got, want, "transposed", 1e-5)


@pytest.mark.parametrize("V", [17, 5000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy(options, V):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(V, (7,), generator=generator).to(DEVICE)
    target[3] = -100
    x = dict(logits=4 * torch.randn(7, V, generator=generator))
    want, got = both(cross_entropy_loss, x, target=target, **options)
    compare(got, want, f"{options}", 1e-5)


@pytest.mark.parametrize(
    "options", [*OPTIONS, dict(use_l2warp=True, l2_penalty_factor=0.3)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(options, reduction):
    generator = torch.Generator().manual_seed(0)
    sizes = dict(x=(13, 6), weight=(17, 6), bias=(17,))
    x = {n: torch.randn(s, generator=generator) for n, s in sizes.items()}
    target = torch.randint(17, (13,), generator=generator).to(DEVICE)
    target[3] = -100
    form = fused_linear_cross_entropy_loss
    want, got = both(form, x, target=target, **options, reduction=reduction, num_chunks=3)
    compare(got, want, f"{options}", 1e-5)


def test_a_target_outside_the_vocabulary_is_seen():
    """On the host its value is looked at, on a device its loss is NaN."""
    x, y = torch.randn(2, 5, device=DEVICE), torch.tensor([1, 5]).to(DEVICE)
    rows, _ = CROSS_ENTROPY("test", "triton", x, y, LogitShape(1.0, None, 0.0, 0.0, -100), False)
    assert rows[1].isnan() and rows[0].isfinite()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="target holds 5; expected 0 to 4"):
            FusedCrossEntropyLoss()(x, y)


@pytest.mark.parametrize(
    ("kernels", "said"),
    [(gated_norm, "rms_norm_gated runs .* D 12"), (cross_entropy, "cross_entropy runs")],
)
def test_kernels_that_go_wrong_are_noticed_and_replaced(monkeypatch, kernels, said):
    monkeypatch.setenv("FLA_TRITON_CHECK", "1")
    stage.forget_choices()
    x, target = torch.randn(4, 12, device=DEVICE), torch.arange(4, device=DEVICE)
    run = (
        (lambda: rms_norm_gated(x, x, None, None))
        if kernels is gated_norm
        else (lambda: cross_entropy_loss(x, target)[0])
    )
    with use_backend("torch"):
        want = run()
    with use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        compare({"y": run()}, {"y": want.double()}, "sound", 1e-5)
    stage.forget_choices()
    forward = kernels.forward
    monkeypatch.setattr(
        kernels,
        "forward",
        lambda *a: type(y)(*(2 * z for z in y)) if isinstance(y := forward(*a), tuple) else 2 * y,
    )
    preferred = use_backend("triton", "torch")
    with preferred, pytest.warns(RuntimeWarning, match=said + ".*off by"):
        assert torch.equal(run(), want)
    with use_backend("triton"), pytest.raises(ValueError, match=r"'triton' was asked for.*off by"):
        run()
    monkeypatch.undo()
    stage.forget_choices()


def test_what_runs_is_told():
    x = torch.randn(2, 8, device=DEVICE)
    logits, target = torch.randn(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.long)
    told = explain(cross_entropy_loss, logits, target.to(DEVICE))
    assert told.backend == ("triton" if DEVICE.type == "cuda" else "torch")
    with (
        use_backend("native"),
        pytest.raises(ValueError, match="cross_entropy has no native kernel"),
    ):
        cross_entropy_loss(logits, target.to(DEVICE))
    with use_backend("native", "torch"):
        cross_entropy_loss(logits, target.to(DEVICE))
    x = x.double()
    assert "fp64" in explain(rms_norm_gated, x, x, None, None).rejected["triton"]
