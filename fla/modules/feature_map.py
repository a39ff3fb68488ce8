# SPDX-License-Identifier: MIT
"""Feature maps for linear attention: phi(x) `[..., D] -> [..., F]`, so that phi(q) . phi(k) is a
similarity.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.modules.layernorm import layer_norm


@checked
def flatten_diag_outer_product(x: Tensor, y: Tensor) -> Tensor:
    """`x_i y_j` for i <= j, `[..., D (D + 1) / 2]`."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return x[..., i] * y[..., j]


@checked
def flatten_diag_outer_product_off1(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`x_i y_j` for i < j, and for i = j."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return x[..., i] * y[..., j], x * y


class HedgehogFeatureMap(nn.Module):
    """`softmax([2 W x + c, -2 W x - c])`, W starting as the identity; Zhang et al. (2024),
    arXiv:2402.04347.

    Example:
        >>> HedgehogFeatureMap(8)(torch.randn(2, 8)).shape
        torch.Size([2, 16])
    """

    @checked
    def __init__(self, head_dim: int):
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim)
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    def initial_values(self) -> dict[str, Tensor]:
        """The identity, and no bias."""
        D = self.layer.in_features
        return {"layer.weight": torch.eye(D), "layer.bias": torch.zeros(D)}

    @checked
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([2 * y, -2 * y], -1).softmax(-1)


class T2RFeatureMap(nn.Module):
    """`relu(W x + c)`; Kasai et al. (2021), arXiv:2103.13076."""

    @checked
    def __init__(self, head_dim: int, dot_dim: int | None = None, bias: bool | None = False):
        super().__init__()
        self.layer = nn.Linear(head_dim, dot_dim or head_dim, bias=bool(bias))

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


class DPFPFeatureMap(nn.Module):
    """Products of `relu([x, -x])` with itself rolled by 1 .. nu; Schlag et al. (2021),
    arXiv:2102.11174.
    """

    @checked
    def __init__(self, head_dim: int, nu: int = 4):
        super().__init__()
        self.nu = nu

    @checked
    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, -x], -1).relu()
        rolled = torch.cat([x.roll(shifts=j, dims=-1) for j in range(1, self.nu + 1)], -1)
        return torch.cat([x] * self.nu, -1) * rolled


class HadamardFeatureMap(nn.Module):
    """`(W x + c) * (U x + d)`."""

    @checked
    def __init__(self, head_dim: int):
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


class LearnableOuterProductFeatureMap(nn.Module):
    """`x_i y_j` for i <= j, of x = `W z` and y = `U z`."""

    @checked
    def __init__(self, head_dim: int, feature_dim: int):
        super().__init__()
        self.layer1 = nn.Linear(head_dim, feature_dim, bias=False)
        self.layer2 = nn.Linear(head_dim, feature_dim, bias=False)

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return flatten_diag_outer_product(self.layer1(x), self.layer2(x))


class LearnablePolySketchNonNegativeFeatureMap(nn.Module):
    """A sketch of `(q . k)^(2 degree)` with learnt projections, made non-negative by squaring;
    Kacham et al. (2023), arXiv:2310.01655.
    """

    @checked
    def __init__(self, head_dim: int, sketch_size: int | None = None, degree: int = 2):
        super().__init__()
        if degree < 2 or degree & (degree - 1):
            raise ValueError(
                f"LearnablePolySketchNonNegativeFeatureMap: degree is {degree}; a power of two of "
                "at least 2 was expected"
            )
        self.head_dim, self.sketch_size, self.degree = head_dim, sketch_size or head_dim, degree
        self.gamma = nn.Parameter(torch.ones(head_dim))
        self.beta = nn.Parameter(torch.zeros(head_dim))
        self.layers = nn.ModuleList()
        width = head_dim
        for _ in range(int(math.log2(degree))):
            self.layers.append(
                nn.ModuleList(nn.Linear(width, self.sketch_size, bias=False) for _ in range(2))
            )
            width = self.sketch_size

    @checked
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = layer_norm(x, self.gamma, self.beta)  # type: ignore[assignment]
        for pair in self.layers:
            left, right = pair.children()
            y = left(y) * right(y) * self.sketch_size**-0.5
        return flatten_diag_outer_product(y, y)


class TaylorFeatureMap(nn.Module):
    """phi with `phi(q) . phi(k) = 1 + x + x^2 / 2` at `x = q . k / sqrt(D)`; arXiv:2402.18668."""

    @checked
    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    @checked
    def forward(self, x: Tensor) -> Tensor:
        x = x * self.head_dim**-0.25
        off, diagonal = flatten_diag_outer_product_off1(x, x)
        return torch.cat([torch.ones_like(x[..., :1]), x, diagonal * math.sqrt(0.5), off], -1)


class RebasedFeatureMap(nn.Module):
    """`gamma norm(x) + beta`, and with `flatten` its products `x_i x_j` for i <= j, so that
    phi(q) . phi(k) is the square of the dot product; Aksenov et al. (2024), arXiv:2402.10644.
    """

    @checked
    def __init__(
        self, head_dim: int, use_gamma: bool = True, use_beta: bool = True, normalize: bool = True
    ):
        super().__init__()
        self.head_dim, self.normalize = head_dim, normalize
        self.gamma = nn.Parameter(torch.ones(head_dim)) if use_gamma else None
        self.beta = nn.Parameter(torch.zeros(head_dim)) if use_beta else None

    @checked
    def forward(self, x: Tensor, flatten: bool = True) -> Tensor:
        if self.normalize:
            x = layer_norm(x, self.gamma, self.beta)  # type: ignore[assignment]
        else:
            x = x if self.gamma is None else x * self.gamma
            x = x if self.beta is None else x + self.beta
        if not flatten:
            return x
        off, diagonal = flatten_diag_outer_product_off1(x, x)
        return torch.cat([diagonal, off * math.sqrt(2)], -1) * self.head_dim**-0.5


class ReLUFeatureMap(nn.Module):
    """`relu(x)`."""

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class SquaredReLUFeatureMap(nn.Module):
    """`relu(x)^2`."""

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class GELUFeatureMap(nn.Module):
    """`gelu(x)`."""

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SwishFeatureMap(nn.Module):
    """`silu(x)`."""

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class SigmoidFeatureMap(nn.Module):
    """`sigmoid(x)`."""

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()
