# SPDX-License-Identifier: MIT
"""One softmax over keys that come in pieces.

A row of q (one token of one head) may meet its keys in several pieces, each a small dense problem
on gathered rows; their results are merged by log-sum-exp into one softmax over all of them. The
backward gathers the same rows again and is exact from the merged output and log-sum-exp alone.
Nothing of the size of the input is made per piece.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import compute_dtype
from fla.ops.engine.attention.flash import attend, attend_backward, merge_

BYTES = 16 << 20  # gathered at a time


@dataclass(frozen=True)
class Piece:
    """P dense problems on blocks of rows.

    Fields:
        q: `[P, HQ, n]`, numbers of blocks of queries, each at most once.
        k: `[P, H, m]`, of keys and values; HQ a multiple of H.
        causal: the i-th query sees the first i keys only.
        keys: how many rows of the gathered keys there are; None for all.
        repeated: a block of keys may serve several problems.
        gate: as q, numbers of the gates of those blocks with these keys.
    """

    q: Tensor
    k: Tensor
    causal: bool = False
    keys: int | None = None
    repeated: bool = False
    gate: Tensor | None = None

    def parts(self, rows: "Blocks") -> Iterator["Piece"]:
        """The piece in parts, each of as many problems as gather less than `BYTES`."""
        blocks = self.q[0].numel() + self.k[0].numel()
        each = blocks * rows.q.shape[1] * (rows.q.shape[-1] + rows.v.shape[-1])
        step = max(1, BYTES // (each * rows.q.element_size()))
        for i in range(0, len(self.q), step):
            one = slice(i, i + step)
            gate = None if self.gate is None else self.gate[one]
            yield replace(self, q=self.q[one], k=self.k[one], gate=gate)


PieceSource = Callable[[], Iterator[Piece]]


class Blocks(NamedTuple):
    """q `[RQ, L, K]`, k `[R, L, K]`, v `[R, L, V]`: blocks of L rows; and gates `[n]`, each added
    to all scores of a block of queries in a problem.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None

    def of(self, part: Piece, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of a part. A gate becomes one more channel of the queries."""
        q, k, v = _take(self.q, part.q), _take(self.k, part.k), _take(self.v, part.k)
        if self.gate is not None and part.gate is not None:
            gate = self.gate[part.gate].repeat_interleave(self.q.shape[1], 2)
            q = torch.cat([q, gate.unsqueeze(-1).to(q.dtype)], -1)
            k, v = F.pad(k, (0, 1), value=1 / scale), F.pad(v, (0, 1))
        return q, k[:, :, : part.keys], v[:, :, : part.keys]


def compute(x: Tensor) -> Tensor:
    """x in the dtype that the products are computed in."""
    return x.to(compute_dtype(x.dtype)) if x.device.type == "cpu" else x


def _take(x: Tensor, blocks: Tensor) -> Tensor:
    """`[R, L, ...]` at `[P, H, n]` as `[P, H, n L, ...]`."""
    return x.index_select(0, blocks.flatten()).view(*blocks.shape, *x.shape[1:]).flatten(2, 3)


def _put(x: Tensor, blocks: Tensor, new: Tensor) -> None:
    """Write to the places that `_take` reads; no block comes twice."""
    x.index_copy_(0, blocks.flatten(), new.reshape(-1, *x.shape[1:]))


def _add(x: Tensor, blocks: Tensor, new: Tensor, repeated: bool) -> None:
    """Add to the places that `_take` reads; `new` may lack the last rows."""
    missing = blocks.shape[2] * x.shape[1] - new.shape[2]
    new = F.pad(new.to(x.dtype), (0, 0, 0, missing)) if missing else new.to(x.dtype)
    if repeated:
        x.index_add_(0, blocks.flatten(), new.reshape(-1, *x.shape[1:]))
    else:
        _put(x, blocks, new + _take(x, blocks))


def forward(
    rows: Blocks, pieces: PieceSource, scale: float, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """o `[RQ, L, V]` in fp32 or wider, and lse `[RQ, L]`; a row without keys has o = 0 and lse =
    -inf. `into` holds the o and lse of other pieces, into which these are merged.
    """
    wide, V = compute_dtype(rows.q.dtype), rows.v.shape[-1]
    if into is None:
        o = torch.zeros(*rows.q.shape[:2], V, dtype=wide, device=rows.q.device)
        into = o, torch.full(rows.q.shape[:2], -torch.inf, dtype=wide, device=rows.q.device)
    o, lse = into
    for piece in pieces():
        for part in piece.parts(rows):
            new, new_lse = attend(*rows.of(part, scale), scale, part.causal)
            merged = _take(o, part.q), _take(lse, part.q)
            merge_(*merged, new[..., :V].to(wide), new_lse.to(wide))
            _put(o, part.q, merged[0])
            _put(lse, part.q, merged[1])
    return o, lse


def backward(
    do: Tensor, rows: Blocks, o: Tensor, lse: Tensor, pieces: PieceSource, scale: float
) -> list[Tensor]:
    """Gradients of the rows, in fp32 or wider; o and lse are those of `forward`, o and do in the
    dtype of q.
    """
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in rows if x is not None]
    K, V = rows.q.shape[-1], rows.v.shape[-1]
    for piece in pieces():
        for part in piece.parts(rows):
            inputs = rows.of(part, scale)
            more = inputs[2].shape[-1] - V
            outputs = (F.pad(_take(x, part.q), (0, more)) for x in (do, o))
            do_, o_ = outputs
            dq, dk, dv = attend_backward(do_, *inputs, o_, _take(lse, part.q), scale, part.causal)
            _add(grads[0], part.q, dq[..., :K], False)
            _add(grads[1], part.k, dk[..., :K], part.repeated)
            _add(grads[2], part.k, dv[..., :V], part.repeated)
            if part.gate is not None and rows.gate is not None:
                dgate = dq[..., K].unflatten(2, (-1, rows.q.shape[1])).sum(-1)
                grads[3].index_add_(0, part.gate.flatten(), dgate.flatten().to(grads[3].dtype))
    return grads
