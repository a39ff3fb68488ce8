# SPDX-License-Identifier: MIT
"""One decay per head and token, or none, inside a chunk."""

import torch
from torch import Tensor

from fla.ops.engine.recurrence.terms import AFTER_DECAY, AFTER_WRITE, BEFORE_DECAY
from fla.ops.engine.recurrence.workspace import Workspace


class ScalarDecay:
    """One decay per head and token, or none (`G` None). D = exp(G_i - G_j), from G in fp64.

    Args:
        G: inclusive cumulative log decay `[R, C]` in fp64.
        reads: how each of the l blocks of C left rows reads.
    """

    def __init__(self, ws: Workspace, G: Tensor | None, reads: list[str], like: Tensor, n: int):
        self.ws, self.reads, self.n = ws, reads, n
        self.enter_factor = self.leave_factor = self.last = None
        if G is None:
            lower = torch.ones(n, n, dtype=like.dtype, device=like.device).tril_()
            self.pair = torch.cat([lower if r == AFTER_WRITE else lower.tril(-1) for r in reads])
            return
        high = G.to(like.dtype)
        low = (G - high).to(like.dtype)
        self.pair = ws("pair", G.shape[0], len(reads) * n, n)
        lower = self.pair[:, :n]
        torch.sub(high[:, :, None], high[:, None, :], out=lower)
        lower.add_(low[:, :, None]).sub_(low[:, None, :])
        lower.add_(ws.constant("above", n)).exp_()
        enter = G.exp().to(like.dtype).unsqueeze(-1)
        self.last = enter[:, -1:].clone()
        self.leave_factor = (G[:, -1:] - G).exp_().to(like.dtype).unsqueeze(-1)
        self.enter_factor = torch.cat([enter] * len(reads), 1)
        for i in reversed(range(len(reads))):  # the first block, from which all come, comes last
            rows = slice(i * n, (i + 1) * n)
            self._as_read(reads[i], self.pair[:, rows], lower, self.enter_factor[:, rows])

    @staticmethod
    def _as_read(read: str, pair: Tensor, lower: Tensor, enter: Tensor) -> None:
        if read == BEFORE_DECAY:  # row i decays as row i - 1 does
            pair[:, 1:] = lower[:, :-1].clone()
            pair[:, 0] = 0
            enter[:, 1:] = enter[:, :-1].clone()
            enter[:, 0] = 1
            return
        if pair.data_ptr() != lower.data_ptr():
            pair.copy_(lower)
        if read == AFTER_DECAY:
            pair.diagonal(dim1=1, dim2=2).zero_()

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """`[R, l C, r C]`, r blocks of C right rows."""
        shape = (left.shape[0], left.shape[1], right.shape[1])
        return self._decayed(torch.bmm(left, right.mT, out=self.ws("scores", *shape)))

    def _decayed(self, scores: Tensor) -> Tensor:
        for columns in scores.split(self.n, dim=2):
            columns.mul_(self.pair)
        return scores

    def enter(self, left: Tensor, S: Tensor) -> Tensor:
        """What the left rows read of the chunk's first state, `[R, l C, V]`."""
        shape = (left.shape[0], left.shape[1], S.shape[2])
        return _scale_(torch.bmm(left, S, out=self.ws("inter", *shape)), self.enter_factor)

    def leaving(self, right: Tensor) -> Tensor:
        """The right rows as the chunk's last state holds them, in a buffer of their own."""
        if self.leave_factor is None:
            return right
        out = self.ws("leaving keys", *right.shape)
        for x, y in zip(right.split(self.n, 1), out.split(self.n, 1), strict=True):
            torch.mul(x, self.leave_factor, out=y)
        return out

    def advance(self, S: Tensor, right: Tensor, written: Tensor) -> None:
        """S becomes the chunk's last state."""
        _scale_(S, self.last).baddbmm_(self.leaving(right).mT, written)

    def backward(
        self,
        left: Tensor,
        right: Tensor,
        scores: Tensor,
        X: Tensor,
        W: Tensor,
        S: Tensor,
        Z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of left, right and of the log decay, from X `[R, l C, V]`, the gradient of what
        the left rows read, and W `[R, r C, V]`, what the right rows write. Z becomes the gradient
        of the chunk's first state in place.
        """
        ws, n, R = self.ws, self.n, left.shape[0]
        dscores = torch.bmm(X, W.mT, out=ws("dscores", *scores.shape))
        pairs = scores.mul_(dscores)
        self._decayed(dscores)
        _scale_(X, self.enter_factor)
        dleft = torch.bmm(X, S.mT, out=ws("dleft", *left.shape))
        dright = torch.bmm(W, Z.mT, out=ws("dright", *right.shape))
        dg = None
        if self.last is not None:
            for rows in dright.split(n, 1):
                rows.mul_(self.leave_factor)
            through = self.last[:, 0] * torch.bmm(S.reshape(R, 1, -1), Z.view(R, -1, 1))[:, 0]
            entered = torch.mul(left, dleft, out=ws("product", *left.shape)).sum(-1)
            left_over = torch.mul(right, dright, out=ws("product", *right.shape)).sum(-1)
            dg = self._log_gradient(pairs, entered, left_over).add_(through)
            Z.mul_(self.last)
        Z.baddbmm_(left.mT, X)
        dright.baddbmm_(dscores.mT, left)
        dleft.baddbmm_(dscores, right)
        return dleft, dright, dg

    def _log_gradient(self, pairs: Tensor, entered: Tensor, left_over: Tensor) -> Tensor:
        """dg `[R, C]`, but for the state that passes through the chunk.

        g_t decays whatever goes from before t to t or later, so dg_t sums what those ways carry:
        `pairs` from write j < t to read i >= t, `entered` from the first state to read i >= t,
        `left_over` from write j < t to the last state. No term is added and taken away again, which
        sums of row . drow - key . dkey would do.
        """
        n, R = self.n, pairs.shape[0]
        pairs = pairs.view(R, len(self.reads), n, -1, n).sum(3)
        entered = entered.view(R, -1, n)
        for i, read in enumerate(self.reads):
            if read == BEFORE_DECAY:  # row i's ways end one token earlier
                pairs[:, i, :-1] = pairs[:, i, 1:].clone()
                pairs[:, i, -1] = 0
                entered[:, i, :-1] = entered[:, i, 1:].clone()
                entered[:, i, -1] = 0
        pairs, entered, left_over = pairs.sum(1), entered.sum(1), left_over.view(R, -1, n).sum(1)
        up_to = self.ws.constant("up to", n)
        before = torch.matmul(pairs, up_to).mul_(self.ws.constant("below", n)).sum(1)
        before += left_over @ up_to
        dg = entered.flip(-1).cumsum(-1).flip(-1)
        dg[:, 1:] += before[:, :-1]
        return dg


def _scale_(x: Tensor, factor: Tensor | None) -> Tensor:
    """x times a decay factor, in place."""
    return x if factor is None else x.mul_(factor)
