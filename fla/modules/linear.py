# SPDX-License-Identifier: MIT
"""When a linear layer is its weight alone, which fused forms may then read."""

from typing import cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook


def is_plain(linear: nn.Module) -> bool:
    """Whether calling a module is `x W^T + b` of its own weight and bias and nothing else: no
    adapter, quantised layer, parametrisation or offload in its place, no hooks on it. A fused form
    reads the weight of such a layer; any other layer is called.

    Example:
        >>> is_plain(nn.Linear(2, 3)), is_plain(nn.Identity())
        (True, False)
    """
    return (
        type(linear) is nn.Linear
        and "forward" not in vars(linear)  # accelerate's offloading replaces it there
        and not _has_any_global_hook()
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
    )


def weight_of(linear: nn.Module, size: int, like: Tensor) -> Tensor:
    """The matrix `[out, size]` by which calling a linear layer multiplies an input of `size`
    channels, in the dtype and on the device of `like`: its weight where it is plain, else what it
    makes of the identity.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> torch.equal(weight_of(nn.Sequential(layer), 2, torch.empty(0)), layer.weight)
        True
    """
    if is_plain(linear):
        return cast(nn.Linear, linear).weight
    return linear(torch.eye(size, dtype=like.dtype, device=like.device)).mT
