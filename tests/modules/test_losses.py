# SPDX-License-Identifier: MIT
"""Cross entropy and its chunked linear form against torch's own loss and autograd."""

import pytest
import torch
import torch.nn.functional as F

from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from tests.helpers import assert_same, gradients

M, D, V = 13, 6, 17
OPTIONS = [
    {},
    dict(label_smoothing=0.1),
    dict(logit_scale=0.3),
    dict(logit_softcapping=2.0),
    dict(lse_square_scale=1e-2),
    dict(label_smoothing=0.2, logit_scale=1.7, logit_softcapping=5.0, lse_square_scale=1e-3),
]


def make():
    target = torch.randint(0, V, (M,))
    target[[2, 7]] = -100

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return {"x": leaf(M, D), "weight": leaf(V, D), "bias": leaf(V)}, target


def plain(
    logits,
    target,
    label_smoothing=0.0,
    logit_scale=1.0,
    logit_softcapping=None,
    lse_square_scale=0.0,
    reduction="mean",
):
    z = logits * logit_scale
    if logit_softcapping:
        z = logit_softcapping * torch.tanh(z / logit_softcapping)
    kept = target != -100
    squares = (z.logsumexp(-1).square() * kept).sum() * lse_square_scale
    loss = F.cross_entropy(z, target, label_smoothing=label_smoothing, reduction=reduction)
    return loss + (squares / kept.sum() if reduction == "mean" else squares)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_chunks", [1, 3, 50])
def test_linear_cross_entropy(options, reduction, num_chunks):
    x, target = make()
    want = plain(
        F.linear(**{"input": x["x"], "weight": x["weight"], "bias": x["bias"]}),
        target,
        **options,
        reduction=reduction,
    )
    module = FusedLinearCrossEntropyLoss(**options, reduction=reduction, num_chunks=num_chunks)
    got = module(x["x"], target, x["weight"], x["bias"])
    assert_same(got, want, "loss")
    expected = gradients([want], x)
    for name, grad in gradients([got], x).items():
        assert_same(grad, expected[name], f"d{name}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy(options):
    x, target = make()
    logits = F.linear(x["x"], x["weight"], x["bias"])
    assert_same(
        FusedCrossEntropyLoss(**options)(logits, target), plain(logits, target, **options), "mean"
    )
    rows = FusedCrossEntropyLoss(**options, reduction="none")(logits, target)
    assert rows.shape == target.shape and rows[2] == 0
    assert_same(rows.sum(), plain(logits, target, **options, reduction="sum"), "sum of rows")
    _, z_loss = FusedCrossEntropyLoss(**options, return_z_loss=True)(logits, target)
    assert (z_loss > 0) == bool(options.get("lse_square_scale"))


def test_gradcheck():
    x, target = make()
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_linear_cross_entropy_loss(
            h,
            target,
            w,
            b,
            label_smoothing=0.1,
            logit_softcapping=3.0,
            lse_square_scale=1e-2,
            num_chunks=3,
        ),
        tuple(x.values()),
    )


def test_l2warp_pulls_the_largest_logit_down():
    x, target = make()
    plain_grad = gradients(
        [fused_linear_cross_entropy_loss(x["x"], target, x["weight"], x["bias"])], x
    )["bias"]
    warped = fused_linear_cross_entropy_loss(
        x["x"], target, x["weight"], x["bias"], use_l2warp=True, l2_penalty_factor=0.5
    )
    logits = F.linear(x["x"], x["weight"], x["bias"])
    largest, where = logits.max(-1)
    extra = torch.zeros(V, dtype=torch.float64).index_add(0, where, largest * 0.5 / M)
    weight = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same(gradients([warped], x)["bias"], plain_grad + extra * weight, "dbias")


def test_all_ignored_is_zero_and_finite():
    x, target = make()
    loss = fused_linear_cross_entropy_loss(x["x"], torch.full_like(target, -100), x["weight"])
    assert loss == 0 and gradients([loss], {"x": x["x"]})["x"].abs().max() == 0


def test_frozen_head_and_autocast():
    x, target = make()
    h = x["x"].detach().float().requires_grad_()
    w = x["weight"].detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_cross_entropy_loss(h, target, w)
    assert loss.dtype == torch.float32
    loss.backward()
    want = plain(F.linear(h.detach(), w), target)
    assert abs(loss - want) < 0.05 and h.grad.dtype == torch.float32


def test_full_logits_never_exist():
    """The largest tensor of the forward and backward is one chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    h, w = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Watch():
        fused_linear_cross_entropy_loss(h, torch.randint(0, 500, (64,)), w, num_chunks=8).backward()
    assert largest == 8 * 500


def test_wrong_arguments():
    with pytest.raises(ValueError, match="reduction is 'none'"):
        FusedLinearCrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match="num_chunks is 0"):
        FusedLinearCrossEntropyLoss(num_chunks=0)
    with pytest.raises(ValueError, match="reduction is 'median'"):
        FusedCrossEntropyLoss(reduction="median")
    with pytest.raises(ValueError, match="process_group is not supported"):
        FusedLinearCrossEntropyLoss(process_group=object())
    with pytest.raises(ValueError, match="x has width 5"):
        fused_linear_cross_entropy_loss(torch.zeros(2, 5), torch.zeros(2).long(), torch.zeros(7, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "logit_softcapping": 2.0}])
def test_inplace_backward_writes_the_gradient_over_the_logits(dtype, options):
    logits = torch.randn(5, 7).to(dtype).requires_grad_()
    target = torch.tensor([0, 3, -100, 6, 1])
    (want,) = torch.autograd.grad(FusedCrossEntropyLoss(**options)(logits, target), logits)
    loss = FusedCrossEntropyLoss(**options, inplace_backward=True)
    memory = logits.data_ptr()
    (grad,) = torch.autograd.grad(loss(logits, target), logits)
    assert torch.equal(grad, want) and grad.data_ptr() == memory
