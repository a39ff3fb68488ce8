# SPDX-License-Identifier: MIT
"""How our modules lie on the ranks of a one-dimensional `DeviceMesh`: styles for torch's
`parallelize_module`, next to its own `ColwiseParallel` and `SequenceParallel`.

Every rank computes on its local tensors, so the same kernels run as on one process; parameters and
what crosses a style's border are DTensors. Gradients are those of one process: a replicated
parameter's is summed over the ranks.
"""

from copy import copy
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle


def _place(x: Tensor, mesh: DeviceMesh, here: Placement, wanted: Placement) -> DTensor:
    """x as `wanted`; a tensor that is no DTensor lies as `here`."""
    x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [here], run_check=False)
    return x.redistribute(mesh, [wanted])


def _local(x: Tensor, mesh: DeviceMesh, here: Placement, wanted: Placement) -> Tensor:
    """This rank's part of x as `wanted`. Where that is all of it, each rank uses it for its own
    tokens, and its gradients are summed.
    """
    grads = [Partial() if wanted.is_replicate() else wanted]
    return _place(x, mesh, here, wanted).to_local(grad_placements=grads)


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make DTensors of the module's own parameters, of which rank 0's values count."""
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            placed = distribute_tensor(parameter, mesh, [placement])
            kept = nn.Parameter(placed, requires_grad=parameter.requires_grad)
            module.register_parameter(name, kept)


class PrepareModuleWeight(ParallelStyle):
    """A module's own parameters as DTensors, replicated or as `layouts` says; its forward stays as
    it is. For a head or a projection whose weight a fused function takes.

    Example (under torchrun):
        parallelize_module(model, mesh, {"lm_head": PrepareModuleWeight()})
    """

    def __init__(self, *, layouts: Placement | None = None):
        super().__init__()
        self.layouts = layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, self.layouts)
        return module


class NormParallel(ParallelStyle):
    """A norm of `fla.modules` whose tokens lie on the ranks along `sequence_dim`. Tensors that it
    is given are this rank's tokens, or DTensors; its outputs are DTensors, or with
    `use_local_output` this rank's tokens. Parameters are replicated.

    Example (under torchrun):
        parallelize_module(model, mesh, {"norm": NormParallel()})
    """

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = False):
        super().__init__()
        self.sharding, self.use_local_output = Shard(sequence_dim), use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        module.forward = partial(self._forward, module, device_mesh)
        return module

    def _forward(self, module: nn.Module, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
        def here(x: Any) -> Any:
            return _local(x, mesh, self.sharding, self.sharding) if isinstance(x, Tensor) else x

        rank = copy(module)  # the same module with this rank's parameters
        rank._parameters = {
            name: None if p is None else _local(p, mesh, Replicate(), Replicate())  # type: ignore[misc]
            for name, p in module._parameters.items()
        }
        kwargs = {name: here(x) for name, x in kwargs.items()}
        out = type(module).forward(rank, *map(here, args), **kwargs)
        if self.use_local_output:
            return out
        if isinstance(out, Tensor):
            return DTensor.from_local(out, mesh, [self.sharding], run_check=False)
        return tuple(DTensor.from_local(x, mesh, [self.sharding], run_check=False) for x in out)


class SwiGLULinearParallel(ParallelStyle):
    """A `SwiGLULinear` whose channels lie on the ranks: `sum over ranks of silu(x) y W^T`, x and
    y sharded in their last axis, W in its second.

    Fields:
        input_layouts: how x and y lie that are no DTensors, by default `Shard(-1)`.
        output_layouts: of the result, by default `Replicate()`.
        use_local_output: whether the result is this rank's tensor instead of a DTensor.

    Example (under torchrun):
        parallelize_module(mlp, mesh, {"swiglu_linear": SwiGLULinearParallel()})
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts = input_layouts or Shard(-1)
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.forward = partial(self._forward, module, device_mesh)
        return module

    def _forward(
        self, module: nn.Module, mesh: DeviceMesh, x: Tensor, y: Tensor, weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        last = Shard(x.dim() - 1)
        x, y = (_local(z, mesh, self.input_layouts, last) for z in (x, y))
        weight = _local(weight, mesh, Replicate(), Shard(1))
        if bias is not None:  # in the sum once
            bias = _local(bias, mesh, Replicate(), Replicate()) * (mesh.get_local_rank() == 0)
        part = type(module).forward(module, x, y, weight, bias)
        out = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        out = out.redistribute(mesh, [self.output_layouts])
        return out.to_local() if self.use_local_output else out


class LinearLossParallel(ParallelStyle):
    """A `FusedLinearCrossEntropyLoss` whose tokens lie on the ranks along `sequence_dim`, called
    with (x, target, weight, bias): x and target are this rank's, or DTensors; the head is
    replicated. The result is the loss of all tokens together, each rank's share of which is a
    `Partial` DTensor; with `use_local_output` it is the whole loss as a tensor.

    Example (under torchrun):
        parallelize_module(criterion, mesh, LinearLossParallel())
    """

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = False):
        super().__init__()
        self.sharding, self.use_local_output = Shard(sequence_dim), use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        options = getattr(module, "options", {})
        if options.get("reduction") not in ("mean", "sum"):
            raise ValueError(
                f"LinearLossParallel: it is put on a {type(module).__name__}; expected a "
                "FusedLinearCrossEntropyLoss"
            )
        if options["use_l2warp"]:
            raise ValueError(
                "LinearLossParallel: use_l2warp is on, whose penalty is an average over the tokens "
                "of one rank; turn it off"
            )
        module.forward = partial(self._forward, module, device_mesh)
        return module

    def _forward(
        self, module: nn.Module, mesh: DeviceMesh, x: Tensor, target: Tensor, weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x, target = (_local(z, mesh, self.sharding, self.sharding) for z in (x, target))
        weight = _local(weight, mesh, Replicate(), Replicate())
        bias = None if bias is None else _local(bias, mesh, Replicate(), Replicate())
        loss = type(module).forward(module, x, target, weight, bias)
        options: dict[str, Any] = module.options  # type: ignore[assignment]
        if options["reduction"] == "mean":
            loss = loss * _share(target, options["ignore_index"], mesh).to(loss.dtype)
        out = DTensor.from_local(loss, mesh, [Partial()], run_check=False)
        return out.full_tensor() if self.use_local_output else out


def _share(target: Tensor, ignored: int, mesh: DeviceMesh) -> Tensor:
    """The share of this rank's targets among all that count."""
    own = (target != ignored).sum().double()
    every = own.clone()
    dist.all_reduce(every, group=mesh.get_group())
    return own / every.clamp(min=1)
