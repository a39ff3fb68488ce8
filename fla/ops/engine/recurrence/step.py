# SPDX-License-Identifier: MIT
r"""One chunk of the recurrence and its gradient, by hand, whatever the decay (`decay/`).

With S the chunk's first state, left rows [q; b], right rows y = [k] or [k; a], and P and B the
decayed scores of q and of b with the right rows:

    none        W = v
    delta       (I + B diag(beta)) y = v - enter(b) S            W = beta y
    low rank    (I - B_a) u = enter(b) S + B_k v                 W = [v; u]

    o = enter(q) S + P W
    S <- last S + leave(y)^T W

Backward, from the last chunk to the first, with do times scale and Z the gradient of the chunk's
final state: `m = P^T do + leave(y) Z` is the gradient of W but for the solve, and X stacks do and
the gradient of what b reads,

    delta       r = (I + B diag(beta))^{-T} (beta m)     dv = r     dbeta = y . (m - B^T r)
                X = [do; -r]
    low rank    r = (I - B_a)^{-T} m_u                   dv = m_v + B_k^T r
                X = [do; r]

from which `decay.backward` has the gradients of the rows, of the decay and of S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fla.ops.engine.recurrence.decay.scalar import ScalarDecay
from fla.ops.engine.recurrence.decay.vector import VectorDecay
from fla.ops.engine.recurrence.terms import LOW_RANK
from fla.ops.engine.recurrence.workspace import Workspace


@dataclass
class ChunkRows:
    """What one chunk reads and writes with: `left` `[R, l C, K]`, `right` `[R, r C, K]`, and beta
    `[R, C, 1]` exactly where the erase is a delta.
    """

    erase: str
    left: Tensor
    right: Tensor
    beta: Tensor | None


def _solve(ws: Workspace, system: Tensor) -> Tensor:
    """The inverse of I + strict(system), by substitution, not by a Neumann series: equal keys make
    the powers of B grow, their sum stays small.
    """
    R, n, _ = system.shape
    eye = ws.constant("eye", n).expand(R, n, n)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def forward(
    ws: Workspace, decay: ScalarDecay | VectorDecay, rows: ChunkRows, values: Tensor, S: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, solution, inverse) of one chunk, with S advanced in place; the solution is y or u.

    `values` `[R, r C, V]` holds v in its first C rows.
    """
    R, n, V = values.shape
    n = n // 2 if rows.erase == LOW_RANK else n
    scores = decay.scores(rows.left, rows.right)
    inter = decay.enter(rows.left, S)
    solution = inverse = None
    if rows.beta is not None:
        inverse = _solve(ws, torch.mul(scores[:, n:], rows.beta.mT, out=ws("system", R, n, n)))
        solution = torch.bmm(inverse, values.sub_(inter[:, n:]), out=ws("y", R, n, V))
        torch.mul(solution, rows.beta, out=values)
    elif rows.erase == LOW_RANK:
        inverse = _solve(ws, torch.neg(scores[:, n:, n:], out=ws("system", R, n, n)))
        read = inter[:, n:].baddbmm_(scores[:, n:, :n], values[:, :n])
        solution = torch.bmm(inverse, read, out=ws("y", R, n, V))
        values[:, n:] = solution
    out = torch.bmm(scores[:, :n], values, out=ws("o", R, n, V)).add_(inter[:, :n])
    decay.advance(S, rows.right, values)
    return out, solution, inverse


def backward(
    ws: Workspace,
    decay: ScalarDecay | VectorDecay,
    rows: ChunkRows,
    do: Tensor,
    S: Tensor,
    Z: Tensor,
    values: Tensor,
    inverse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dleft, dright, dv, dg, dbeta) of one chunk; Z becomes the gradient of its first state in
    place. `values` is v, y or [v; u]; without an erase there is no inverse.
    """
    R, n, V = do.shape
    scores = decay.scores(rows.left, rows.right)
    m = torch.bmm(scores[:, :n].mT, do, out=ws("m", *values.shape))
    m.baddbmm_(decay.leaving(rows.right), Z)
    X = ws("X", R, rows.left.shape[1], V)
    X[:, :n] = do
    dv, dbeta, W = m, None, values
    if inverse is not None and rows.beta is not None:
        torch.bmm(inverse.mT, torch.mul(m, rows.beta, out=do), out=X[:, n:])
        dv = do.copy_(X[:, n:])
        X[:, n:].neg_()
        dbeta = torch.mul(m.baddbmm_(scores[:, n:].mT, X[:, n:]), values, out=m).sum(-1)
        W = values.mul_(rows.beta)
    elif inverse is not None:
        torch.bmm(inverse.mT, m[:, n:], out=X[:, n:])
        dv = m[:, :n].baddbmm_(scores[:, n:, :n].mT, X[:, n:])
    dleft, dright, dg = decay.backward(rows.left, rows.right, scores, X, W, S, Z)
    return dleft, dright, dv, dg, dbeta
