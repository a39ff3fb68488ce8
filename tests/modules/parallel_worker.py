# SPDX-License-Identifier: MIT
"""What each rank of `test_parallel.py` does: a module on a mesh against the same module alone."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fla.modules import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    GatedMLP,
    LayerNorm,
    RMSNorm,
)
from fla.modules.layernorm import NormParallel
from fla.modules.mlp import SwiGLULinear, SwiGLULinearParallel
from fla.modules.parallel import LinearLossParallel, PrepareModuleWeight
from tests.helpers import assert_same


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compare(module, alone, what):
    for name, parameter in alone.named_parameters():
        assert_same(whole(module.get_parameter(name).grad), parameter.grad, f"{what}: d{name}")


def norms(mesh):
    for build in (LayerNorm, RMSNorm):
        for local in (False, True):
            alone, module = build(6, bias=True).double(), build(6, bias=True).double()
            for p, q in zip(alone.parameters(), module.parameters(), strict=True):
                p.data.normal_()
                q.data.copy_(p)
            parallelize_module(module, mesh, NormParallel(use_local_output=local))
            assert all(isinstance(p, DTensor) for p in module.parameters())
            assert set(module.state_dict()) == set(alone.state_dict())
            x, dy = leaf(2, 8, 6), torch.randn(2, 8, 6, dtype=torch.float64)
            own = distribute_tensor(x.detach(), mesh, [Shard(1)]).to_local().requires_grad_()
            y, total = module(own, residual=own, prenorm=True)
            want, wanted = alone(x, residual=x, prenorm=True)
            ((want + wanted) * dy).sum().backward()
            share = distribute_tensor(dy, mesh, [Shard(1)])
            if local:
                ((y + total) * share.to_local()).sum().backward()
                y = DTensor.from_local(y, mesh, [Shard(1)])
            else:
                assert y.placements == (Shard(1),)
                ((y + total) * share).sum().full_tensor().backward()
            assert_same(y.full_tensor(), want, "norm")
            dx = DTensor.from_local(own.grad, mesh, [Shard(1)]).full_tensor()
            assert_same(dx, x.grad, "norm: dx")
            compare(module, alone, "norm")


def swiglu_linear(mesh):
    for bias in (False, True):
        x, y, weight = leaf(3, 8), leaf(3, 8), leaf(5, 8)
        given = (x, y, weight, leaf(5)) if bias else (x, y, weight)
        want, dy = SwiGLULinear()(*given), torch.randn(3, 5, dtype=torch.float64)
        (want * dy).sum().backward()
        layouts = [Shard(1), Shard(1), Shard(1), Replicate()]
        placed = [
            distribute_tensor(z.detach(), mesh, [p]).requires_grad_()
            for z, p in zip(given, layouts, strict=False)
        ]
        for local in (True, False):
            module = parallelize_module(
                SwiGLULinear(), mesh, SwiGLULinearParallel(use_local_output=local)
            )
            got = module(*placed)
            assert isinstance(got, DTensor) is not local
            assert_same(whole(got), want, "swiglu_linear")
            (whole(got) * dy).sum().backward()
            for z, other in zip(placed, given, strict=True):
                assert_same(z.grad.full_tensor(), other.grad, "swiglu_linear: gradient")
                z.grad = None


def mlp(mesh):
    alone = GatedMLP(6, intermediate_size=8).double()
    module = GatedMLP(6, intermediate_size=8).double()
    module.load_state_dict(alone.state_dict())
    plan = {
        "gate_proj": ColwiseParallel(),
        "up_proj": ColwiseParallel(),
        "down_proj": PrepareModuleWeight(layouts=Shard(1)),
        "swiglu_linear": SwiGLULinearParallel(),
    }
    parallelize_module(module, mesh, plan)
    x = leaf(3, 6)
    want, got = alone(x), module(x)
    assert_same(got, want, "mlp")
    want.square().sum().backward()
    got.square().sum().backward()
    compare(module, alone, "mlp")


def losses(mesh):
    for reduction in ("mean", "sum"):
        for local in (False, True):
            head = torch.nn.Linear(6, 9).double()
            alone = torch.nn.Linear(6, 9).double()
            alone.load_state_dict(head.state_dict())
            parallelize_module(head, mesh, PrepareModuleWeight())
            assert head.weight.placements == (Replicate(),)
            x, target = leaf(2, 8, 6), torch.randint(9, (2, 8))
            target[:, :3] = -100  # more on the first rank
            loss = FusedLinearCrossEntropyLoss(reduction=reduction)
            want = loss(x, target, alone.weight, alone.bias)
            want.backward()
            own, labels = (
                distribute_tensor(z, mesh, [Shard(1)]).to_local() for z in (x.detach(), target)
            )
            own.requires_grad_()
            loss = parallelize_module(loss, mesh, LinearLossParallel(use_local_output=local))
            got = loss(own, labels, weight=head.weight, bias=head.bias)
            assert local or got.placements == (Partial(),)
            assert_same(whole(got), want, "loss")
            got.backward()
            dx = DTensor.from_local(own.grad, mesh, [Shard(1)]).full_tensor()
            assert_same(dx, x.grad, "loss: dx")
            compare(head, alone, "loss")


def split_vocabulary(mesh):
    """Each rank holds its share of the vocabulary; loss and gradient are those of one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    target = torch.tensor([0, 5, -100, 11, 3])
    for options in (
        {}, dict(label_smoothing=0.1), dict(lse_square_scale=0.01, return_z_loss=True),
        dict(logit_scale=0.5, logit_softcapping=2.0, reduction="sum", inplace_backward=True),
    ):  # fmt: skip
        logits = leaf(5, 12)
        want = FusedCrossEntropyLoss(**options)(logits, target)
        own = logits.detach().chunk(size, 1)[rank].clone().requires_grad_()
        got = FusedCrossEntropyLoss(**options, process_group=mesh.get_group())(own * 1, target)
        if not isinstance(got, tuple):
            got, want = (got,), (want,)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b, f"loss of a split vocabulary, {options}")
        sum(x * (i + 1) for i, x in enumerate(want)).backward()
        sum(x * (i + 1) for i, x in enumerate(got)).backward()
        assert_same(own.grad, logits.grad.chunk(size, 1)[rank], f"its gradient, {options}")
    try:
        FusedCrossEntropyLoss(process_group=mesh.get_group())(leaf(5, 7 - 2 * rank), target)
    except ValueError as error:
        assert "hold [7, 5] logits of each row; equal shares" in str(error), error
    else:
        raise AssertionError("shares of different widths")
    for wrong in (12, -1):
        try:
            FusedCrossEntropyLoss(process_group=mesh.get_group())(
                own, target.where(target != 5, wrong)
            )
        except ValueError as error:
            assert "expected 0 to 11, the tokens of all ranks" in str(error), error
        else:
            raise AssertionError("a target outside the vocabulary")


def refusals(mesh):
    for module, said in (
        (torch.nn.Identity(), "put on a Identity; expected a FusedLinearCrossEntropyLoss"),
        (FusedLinearCrossEntropyLoss(use_l2warp=True), "use_l2warp is on"),
    ):
        try:
            parallelize_module(module, mesh, LinearLossParallel())
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(said)


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for check in (norms, swiglu_linear, mlp, losses, split_vocabulary, refusals):
        check(mesh)
    dist.destroy_process_group()
    print("all checks passed")


if __name__ == "__main__":
    main()
