# SPDX-License-Identifier: MIT
r"""# Gated DeltaProduct: several delta steps per token

Siems et al. (2025), *DeltaProduct: Improving State-Tracking in Linear RNNs via Householder
Products*, arXiv:2502.10297.

    S_{t,0} = exp(g_t) S_{t-1,n}
    S_{t,j} = S_{t,j-1} + beta_{t,j} k_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})^T        j = 1 .. n
    S_t = S_{t,n}        o_t = scale * S_t^T q_t

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, T, H, K]` |
| k | `k` | `[B, T n, H, K]`, the n substeps of a token side by side; `|k| <= 1` |
| v | `v` | `[B, T n, HV, V]`, HV a multiple of H |
| g | `g` | `[B, T, HV]`, natural log of the decay, or None |
| beta | `beta` | `[B, T n, HV]` in [0, 2] |
| n | `num_householder` | an integer >= 1 |
| S_0, S_T | `initial_state`, result | `[N, HV, K, V]` fp32 |

Boundaries `cu_seqlens` count tokens, not substeps. Numerics: as `gated_delta_rule`.

On the one equation: a gated delta rule over T n steps; g acts on the first of a token's substeps
and q reads after the last.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_tensors
from fla.ops.case import SIZES, Inputs, OpCase, gated_delta, literal
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms


@literal("q", "k")
def naive_recurrent_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    num_householder: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token and substep by substep."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(T):
        S = S if g is None else g[:, t, :, None, None].exp() * S
        for j in range(t * num_householder, (t + 1) * num_householder):
            error = v[:, j] - torch.einsum("bhkv,bhk->bhv", S, k[:, j])
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, j], beta[:, j, :, None] * error)
        o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append((K**-0.5 if scale is None else scale) * o)
    return torch.stack(out, 1), S if output_final_state else None


def _spread(x: Tensor, n: int, position: int) -> Tensor:
    """`[B, T, ...]` to `[B, T n, ...]`: each token at one substep, zero at the others."""
    out = x.new_zeros(x.shape[0], x.shape[1], n, *x.shape[2:])
    out[:, :, position] = x
    return out.flatten(1, 2)


def _product(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    n: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None = None,
    **state: Any,
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{op}: num_householder is {n!r}; an integer of at least 1 was expected")
    sizes = check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B Tn H K"),
        v=(v, "B Tn HV V"),
        g=(g, "B T HV"),
        beta=(beta, "B Tn HV"),
    )
    for name, x in (("k", k), ("v", v), ("beta", beta)):
        if x.shape[:2] != (sizes["B"], sizes["T"] * n):
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; {sizes['B']} x {sizes['T'] * n} steps "
                f"were expected: num_householder={n} for each of the T={sizes['T']} tokens of q"
            )
    bounds: Any = (c if c is None else c * n for c in (cu_seqlens, cu_seqlens_cpu))
    state |= dict(zip(("cu_seqlens", "cu_seqlens_cpu"), bounds, strict=True))
    o, final = recurrence(
        op,
        options,
        Terms(_spread(q, n, n - 1), k, v, g=None if g is None else _spread(g, n, 0), beta=beta),
        **state,
    )
    return o[:, n - 1 :: n], final


@checked
def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: FLACPContext | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaProduct chunk by chunk; `chunk_size` counts substeps.

    Example:
        >>> q, (k, v) = torch.randn(1, 50, 2, 16), torch.randn(2, 1, 100, 2, 16).unbind()
        >>> k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 100, 2)
        >>> o, _ = chunk_gated_delta_product(q, k, v, -torch.rand(1, 50, 2), beta, 2)
        >>> o.shape
        torch.Size([1, 50, 2, 16])
    """
    if cp_context is not None:
        return on_ranks(chunk_gated_delta_product, locals())
    options = Options(
        scale, output_final_state, use_qk_l2norm_in_kernel, chunk_size=chunk_size, backend=backend
    )
    return _product(
        "chunk_gated_delta_product",
        options,
        q,
        k,
        v,
        g,
        beta,
        num_householder,
        cu_seqlens,
        cu_seqlens_cpu,
        initial_state=initial_state,
    )


@checked
def chunk_gated_delta_product_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The literal loop in the order of the chunk form's arguments."""
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    return naive_recurrent_gated_delta_product(
        q, k, v, g, beta, scale, cu_seqlens, initial_state, output_final_state, num_householder
    )


@checked
def fused_recurrent_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaProduct substep by substep."""
    options = Options(scale, output_final_state, use_qk_l2norm_in_kernel, backend=backend)
    return _product(
        "fused_recurrent_gated_delta_product",
        options,
        q,
        k,
        v,
        g,
        beta,
        num_householder,
        cu_seqlens,
        initial_state=initial_state,
    )


def _point(x: Inputs) -> dict[str, Any]:
    n = SIZES["n"]
    q = torch.stack([torch.zeros_like(x["q"])] * (n - 1) + [x["q"]], 2).flatten(1, 2)
    g = torch.stack([x["g"]] + [torch.zeros_like(x["g"])] * (n - 1), 2).flatten(1, 2)
    return {**gated_delta(x | {"q": q, "g": g}), "steps": n}


CASES = [
    OpCase(
        "gated_delta_product",
        "Gated DeltaProduct",
        "arXiv:2502.10297",
        "delta rules",
        chunk_gated_delta_product,
        fused_recurrent_gated_delta_product,
        naive_recurrent_gated_delta_product,
        dict(
            q="B T H K",
            k="B T*n H K unit",
            v="B T*n HV V",
            g="B T HV decay",
            beta="B T*n HV beta",
        ),
        _point,
        fixed=dict(num_householder=SIZES["n"]),
    ),
]
