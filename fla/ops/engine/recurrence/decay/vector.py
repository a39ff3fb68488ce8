# SPDX-License-Identifier: MIT
"""One decay per channel and token inside a chunk, without a quotient or difference of decays."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.engine.recurrence.terms import AFTER_WRITE, BEFORE_DECAY
from fla.ops.engine.recurrence.workspace import Workspace


class VectorDecay:
    r"""One decay per channel and token: products over a binary tree of blocks.

    At level s a block of 2s tokens is two halves of s. With
    `prefix_i`, the decay from the block's middle to read i in the second half, and
    `suffix_j`, the decay from write j in the first half to the middle,

        D_ij = prefix_i suffix_j        for i in the second half, j in the first

    so the pairs that meet at this level are one matrix product of `x * prefix` and `y * suffix`,
    and over all levels s = 1, 2, 4 ... every pair i > j meets once. Prefix and suffix at level 2s
    are products of those at level s. Every factor lies in [0, 1] and nothing is ever divided or
    subtracted: any decay, exactly zero included, is harmless.

    Args:
        factors: exp(g) `[R, P, K]`, P a power of two.
        reads: how each of the l blocks of P left rows reads.
    """

    def __init__(self, ws: Workspace, factors: Tensor, reads: list[str]):
        self.ws, self.reads, self.factors = ws, reads, factors
        self.n = factors.shape[1]

    def _levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(s, prefix, suffix), each `[R, P / 2s, s, K]`; afterwards `self.prefix` and `self.suffix`
        are those of the whole chunk.
        """
        shape = self.factors.shape
        self.prefix = self.ws("prefix", *shape).copy_(self.factors)
        self.suffix = self.ws("suffix", *shape).fill_(1)
        s = 1
        while s < self.n:
            blocks = (shape[0], self.n // (2 * s), 2, s, shape[2])
            prefix, suffix = self.prefix.view(blocks), self.suffix.view(blocks)
            yield s, prefix[:, :, 1], suffix[:, :, 0]
            suffix[:, :, 0] *= prefix[:, :, 1, -1:]
            prefix[:, :, 1] *= prefix[:, :, 0, -1:]
            s *= 2

    def _rows(self, left: Tensor, s: int, prefix: Tensor) -> Tensor:
        """`x * prefix` of the second halves, `[R, P / 2s, l, s, K]`."""
        R, blocks, _, K = prefix.shape
        halves = left.view(R, len(self.reads), blocks, 2, s, K)[:, :, :, 1]
        out = self.ws("rows", R, blocks, len(self.reads), s, K)
        for i, read in enumerate(self.reads):
            if read == BEFORE_DECAY:
                out[:, :, i, 0] = halves[:, i, :, 0]
                torch.mul(halves[:, i, :, 1:], prefix[:, :, :-1], out=out[:, :, i, 1:])
            else:
                torch.mul(halves[:, i], prefix, out=out[:, :, i])
        return out

    def _columns(self, right: Tensor, s: int, suffix: Tensor) -> Tensor:
        """`y * suffix` of the first halves, `[R, P / 2s, r, s, K]`."""
        R, blocks, _, K = suffix.shape
        halves = right.view(R, -1, blocks, 2, s, K)[:, :, :, 0].transpose(1, 2)
        out = self.ws("columns", *halves.shape)
        return torch.mul(halves, suffix.unsqueeze(2), out=out)

    def _meeting(self, scores: Tensor, s: int) -> Tensor:
        """The view of `scores` `[R, l P, r P]` whose pairs meet at level s:
        `[R, l, s, r, s, P / 2s]`.
        """
        R, blocks = scores.shape[0], self.n // (2 * s)
        view = scores.view(R, len(self.reads), blocks, 2, s, -1, blocks, 2, s)
        return view[:, :, :, 1, :, :, :, 0].diagonal(dim1=2, dim2=5)

    def _diagonal(self, scores: Tensor, i: int) -> Tensor:
        """The view of `scores` where read i meets its own token's writes, `[R, r, P]`."""
        view = scores.view(scores.shape[0], len(self.reads), self.n, -1, self.n)
        return view[:, i].diagonal(dim1=1, dim2=3)

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """`[R, l P, r P]`, r blocks of P right rows."""
        R = left.shape[0]
        scores = self.ws("scores", R, left.shape[1], right.shape[1]).zero_()
        for s, prefix, suffix in self._levels():
            rows, columns = self._rows(left, s, prefix), self._columns(right, s, suffix)
            blocks = torch.bmm(_stacked(rows), _stacked(columns).mT)
            self._meeting(scores, s).copy_(_by_pair(blocks, rows, columns))
        for i, read in enumerate(self.reads):
            if read == AFTER_WRITE:
                own = left.view(R, -1, 1, self.n, left.shape[2])[:, i]
                product = own * right.view(R, -1, self.n, right.shape[2])
                self._diagonal(scores, i).copy_(product.sum(-1))
        return scores

    def spread_rows(self, weights: Tensor, right: Tensor) -> Tensor:
        """`rows_i = sum_j w_ij D_ij y_j` `[R, l P, K]` for weights `[R, l P, r P]`."""
        shape = (weights.shape[0], weights.shape[1], right.shape[2])
        rows = self.ws("dleft", *shape).zero_()
        self._own_rows(rows, weights, right)
        for s, prefix, suffix in self._levels():
            columns = self._columns(right, s, suffix)
            gained = torch.bmm(self._blocks(weights, s), _stacked(columns))
            self._add_rows(rows, gained.view(*prefix.shape[:2], -1, *prefix.shape[2:]), s, prefix)
        return rows

    def spread(
        self, weights: Tensor, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`spread_rows`, and `columns_j = sum_i w_ij D_ij x_i`: the gradients of `scores` under
        weights `[R, l P, r P]`. The list holds, per level, what the log decays of the halves gain
        by it: `[R, P / 2s, 2, s, K]`, suffixes first.
        """
        drows = self.ws("dleft", *left.shape).zero_()
        dcolumns = self.ws("dright", *right.shape).zero_()
        self._own_rows(drows, weights, right)
        self._own_columns(dcolumns, weights, left)
        logs = []
        for s, prefix, suffix in self._levels():
            rows, columns = self._rows(left, s, prefix), self._columns(right, s, suffix)
            blocks = self._blocks(weights, s)
            gained_rows = torch.bmm(blocks, _stacked(columns)).view(rows.shape)
            gained_columns = torch.bmm(blocks.mT, _stacked(rows)).view(columns.shape)
            logs.append(self._log_halves(rows.mul_(gained_rows), columns.mul_(gained_columns)))
            self._add_rows(drows, gained_rows, s, prefix)
            halves = dcolumns.view(left.shape[0], -1, suffix.shape[1], 2, s, suffix.shape[3])
            halves = halves[:, :, :, 0].transpose(1, 2)
            halves.addcmul_(gained_columns, suffix.unsqueeze(2))
        return drows, dcolumns, logs

    def _blocks(self, weights: Tensor, s: int) -> Tensor:
        """The weights that meet at level s as a batch of matrices `[R P / 2s, l s, r s]`."""
        blocks = self._meeting(weights, s).permute(0, 5, 1, 2, 3, 4)
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], blocks.shape[2] * s, -1)

    def _own_rows(self, rows: Tensor, weights: Tensor, right: Tensor) -> None:
        """Adds what reads AFTER_WRITE have of their own token's writes."""
        stack = right.view(right.shape[0], -1, self.n, right.shape[2])
        for i, read in enumerate(self.reads):
            if read == AFTER_WRITE:
                own = self._diagonal(weights, i).unsqueeze(-1) * stack
                rows.view(stack.shape[0], -1, self.n, stack.shape[3])[:, i] += own.sum(1)

    def _own_columns(self, columns: Tensor, weights: Tensor, left: Tensor) -> None:
        """Adds what writes have of their own token's reads AFTER_WRITE."""
        stack = left.view(left.shape[0], -1, 1, self.n, left.shape[2])
        columns = columns.view(left.shape[0], -1, self.n, left.shape[2])
        for i, read in enumerate(self.reads):
            if read == AFTER_WRITE:
                columns.addcmul_(self._diagonal(weights, i).unsqueeze(-1), stack[:, i])

    def _add_rows(self, drows: Tensor, gained: Tensor, s: int, prefix: Tensor) -> None:
        R, blocks, _, K = prefix.shape
        halves = drows.view(R, len(self.reads), blocks, 2, s, K)[:, :, :, 1]
        for i, read in enumerate(self.reads):
            if read == BEFORE_DECAY:
                halves[:, i, :, 0] += gained[:, :, i, 0]
                halves[:, i, :, 1:].addcmul_(gained[:, :, i, 1:], prefix[:, :, :-1])
            else:
                halves[:, i].addcmul_(gained[:, :, i], prefix)

    def _log_halves(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What a level's logs gain: a read BEFORE_DECAY belongs to the prefix one token earlier."""
        out = torch.stack([columns.sum(2), torch.zeros_like(columns[:, :, 0])], 2)
        for i, read in enumerate(self.reads):
            if read == BEFORE_DECAY:
                out[:, :, 1, :-1] += rows[:, :, i, 1:]
            else:
                out[:, :, 1] += rows[:, :, i]
        return out

    def log_gradient(self, prefix: Tensor, suffix: Tensor, logs: list[Tensor]) -> Tensor:
        """The gradient of g from the gradients of the logs of the chunk's prefix and suffix `[R, P,
        K]` and of every level's: back through the tree, by sums alone. Changes its arguments.
        """
        for level in reversed(logs):
            up, down = prefix.view(level.shape), suffix.view(level.shape)
            up[:, :, 0, -1] += up[:, :, 1].sum(2)
            up[:, :, 1, -1] += down[:, :, 0].sum(2)
            up[:, :, 1] += level[:, :, 1]
            down[:, :, 0] += level[:, :, 0]
        return prefix

    def entering(self, left: Tensor) -> Tensor:
        """The left rows as they read the chunk's first state, in a buffer of their own."""
        R, _, K = left.shape
        out = self.ws("entering", R, len(self.reads), self.n, K)
        for i, (x, read) in enumerate(zip(left.split(self.n, 1), self.reads, strict=True)):
            if read == BEFORE_DECAY:
                out[:, i, 0] = x[:, 0]
                torch.mul(x[:, 1:], self.prefix[:, :-1], out=out[:, i, 1:])
            else:
                torch.mul(x, self.prefix, out=out[:, i])
        return out.view(left.shape)

    def enter(self, left: Tensor, S: Tensor) -> Tensor:
        """What the left rows read of the chunk's first state, `[R, l P, V]`."""
        shape = (left.shape[0], left.shape[1], S.shape[2])
        return torch.bmm(self.entering(left), S, out=self.ws("inter", *shape))

    def leaving(self, right: Tensor) -> Tensor:
        """The right rows as the chunk's last state holds them, in a buffer of their own."""
        out = self.ws("leaving keys", *right.shape)
        for x, y in zip(right.split(self.n, 1), out.split(self.n, 1), strict=True):
            torch.mul(x, self.suffix, out=y)
        return out

    def advance(self, S: Tensor, right: Tensor, written: Tensor) -> None:
        """S becomes the chunk's last state."""
        S.mul_(self.prefix[:, -1, :, None]).baddbmm_(self.leaving(right).mT, written)

    def backward(
        self,
        left: Tensor,
        right: Tensor,
        scores: Tensor,
        X: Tensor,
        W: Tensor,
        S: Tensor,
        Z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the rows and of the decay, as in `ScalarDecay.backward`; Z becomes the
        gradient of the chunk's first state.
        """
        dscores = torch.bmm(X, W.mT, out=scores)
        dleft, dright, logs = self.spread(dscores, left, right)
        last, entering, leaving = self.prefix[:, -1], self.entering(left), self.leaving(right)
        read, written = torch.bmm(X, S.mT), torch.bmm(W, Z.mT)
        prefix, suffix = self.edge_gradients(entering, leaving, read, written, dleft, dright)
        prefix[:, -1] += last * (S * Z).sum(-1)
        Z.mul_(last.unsqueeze(-1)).baddbmm_(entering.mT, X)
        return dleft, dright, self.log_gradient(prefix, suffix, logs)

    def edge_gradients(
        self,
        entering: Tensor,
        leaving: Tensor,
        read: Tensor,
        written: Tensor,
        dleft: Tensor,
        dright: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add to `dleft` and `dright` what the gradients `read` of the entering and `written` of
        the leaving rows give; returns the gradients of the log prefix and the log suffix.
        """
        R, n, K = self.prefix.shape
        prefix, suffix = read.new_zeros(R, n, K), read.new_zeros(R, n, K)
        for i, how in enumerate(self.reads):
            rows = slice(i * n, (i + 1) * n)
            log = entering[:, rows] * read[:, rows]
            if how == BEFORE_DECAY:
                prefix[:, :-1] += log[:, 1:]
                dleft[:, rows.start] += read[:, rows.start]
                dleft[:, rows][:, 1:].addcmul_(read[:, rows][:, 1:], self.prefix[:, :-1])
            else:
                prefix += log
                dleft[:, rows].addcmul_(read[:, rows], self.prefix)
        for x, y, d in zip(*(z.split(n, 1) for z in (leaving, written, dright)), strict=True):
            suffix.addcmul_(x, y)
            d.addcmul_(y, self.suffix)
        return prefix, suffix


def _stacked(x: Tensor) -> Tensor:
    """`[R, blocks, l, s, K]` to a batch of matrices `[R blocks, l s, K]`."""
    return x.flatten(0, 1).flatten(1, 2)


def _by_pair(blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[R blocks, l s, r s]` to `[R, l, s, r, s, blocks]`."""
    R, count, left, s, _ = rows.shape
    return blocks.view(R, count, left, s, columns.shape[2], s).permute(0, 2, 3, 4, 5, 1)
