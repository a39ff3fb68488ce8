# SPDX-License-Identifier: MIT
"""Products, softmax and the inverse inside a chunk."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.core.checks import check_boundaries
from fla.core.precision import promote_to_fp32
from fla.ops.utils.index import prepare_split_cu_seqlens

ACTIVATIONS = {
    "": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}
softplus = F.softplus


def softmax_fwd(x: Tensor, dtype: torch.dtype | None = torch.float) -> Tensor:
    """softmax(x) along the last dimension, in `dtype` (None keeps that of x).

    Example:
        >>> softmax_fwd(torch.zeros(1, 2)).tolist()
        [[0.5, 0.5]]
    """
    return promote_to_fp32(x).softmax(-1).to(dtype or x.dtype)


def softmax_bwd(p: Tensor, dp: Tensor, dtype: torch.dtype | None = torch.float) -> Tensor:
    """The gradient p * (dp - sum(p * dp)) of a softmax's input.

    Example:
        >>> softmax_bwd(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
    """
    wide = promote_to_fp32(p)
    product = wide * dp.to(wide.dtype)
    return (product - wide * product.sum(-1, keepdim=True)).to(dtype or p.dtype)


def logsumexp_fwd(
    x: Tensor, scale: float | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """log(sum(exp(scale * x))) over the last dimension; dtype None keeps that of x.

    Example:
        >>> round(logsumexp_fwd(torch.zeros(2)).item(), 4)
        0.6931
    """
    wide = promote_to_fp32(x)
    return (wide if scale is None else wide * scale).logsumexp(-1).to(dtype or x.dtype)


def matmul(a: Tensor, b: Tensor, activation: str = "") -> Tensor:
    """activation(a b) of `[..., M, K]` and `[..., K, N]`; no activation, leaky_relu, relu, sigmoid
    or tanh.

    Example:
        >>> matmul(torch.tensor([[-2.0]]), torch.tensor([[3.0]]), "relu").item()
        0.0
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"matmul: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation](a @ b)


def addmm(
    x: Tensor, a: Tensor, b: Tensor, alpha: float | None = None, beta: float | None = None
) -> Tensor:
    """beta * x + alpha * a b of `[..., M, K]` and `[..., K, N]`.

    Example:
        >>> addmm(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1), beta=3.0).item()
        5.0
    """
    product = a @ b if alpha is None else alpha * (a @ b)
    return product + (x if beta is None else beta * x)


def solve_tril(
    A: Tensor,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    output_dtype: torch.dtype = torch.float,
) -> Tensor:
    """(I + A)^-1 of every chunk of A `[B, T, H, C]`, C in 16, 32, 64: row t holds the weights of
    its own chunk's tokens, strictly below the diagonal. chunk_indices follow from cu_seqlens.

    Example:
        >>> solve_tril(torch.zeros(1, 3, 1, 16))[0, :, 0, :3].diag().tolist()
        [1.0, 1.0, 1.0]
    """
    B, T, _, C = A.shape
    if C not in (16, 32, 64):
        raise ValueError(f"solve_tril: A has chunks of {C} columns; expected 16, 32 or 64")
    if cu_seqlens is not None:
        check_boundaries("solve_tril", B, cu_seqlens)
    whole = torch.tensor([0, T]) if cu_seqlens is None else cu_seqlens
    bounds = prepare_split_cu_seqlens(split_size=C, cu_seqlens=whole).tolist()
    wide = promote_to_fp32(A).transpose(1, 2)
    parts = []
    for begin, end in pairwise(bounds):
        size = end - begin
        lower = wide[:, :, begin:end, :size].tril(-1)
        eye = torch.eye(size, dtype=wide.dtype, device=A.device)
        inverse = torch.linalg.solve_triangular(
            lower + eye, eye.expand_as(lower), upper=False, unitriangular=True
        )
        parts.append(F.pad(inverse, (0, C - size)))
    result = torch.cat(parts, 2) if parts else wide
    return result.transpose(1, 2).to(output_dtype)
