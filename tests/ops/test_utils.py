# SPDX-License-Identifier: MIT
"""`fla.ops.utils` against loops."""

import pytest
import torch

from fla.ops import utils
from fla.ops.utils import index

BOUNDS = torch.tensor([0, 3, 3, 8, 15])
PIECES = [(0, 3), (3, 3), (3, 8), (8, 15)]


def loop_cumsum(x, pieces, reverse):
    out = torch.zeros_like(x)
    for begin, end in pieces:
        for t in range(begin, end):
            out[:, t] = x[:, t:end].sum(1) if reverse else x[:, begin : t + 1].sum(1)
    return out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 15, 2), (1, 15, 2, 3)])
def test_running_sums(shape, reverse):
    x = torch.randn(shape, dtype=torch.float64)
    options = dict(reverse=reverse, cu_seqlens=BOUNDS, scale=0.5, output_dtype=None)
    got = utils.chunk_global_cumsum(x, **options)
    torch.testing.assert_close(got, 0.5 * loop_cumsum(x, PIECES, reverse), rtol=0, atol=1e-13)
    pieces = [(t, min(t + 4, b)) for a, b in PIECES for t in range(a, b, 4)]
    got = utils.chunk_local_cumsum(x, 4, **options)
    torch.testing.assert_close(got, 0.5 * loop_cumsum(x, pieces, reverse), rtol=0, atol=1e-13)
    assert utils.chunk_global_cumsum(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="power of two"):
        utils.chunk_local_cumsum(x, 3)
    with pytest.raises(ValueError, match="batch size 2"):
        utils.chunk_global_cumsum(torch.cat([x, x]), cu_seqlens=BOUNDS)


def test_gradients_flow():
    x = torch.randn(1, 15, 2, 3, dtype=torch.float64, requires_grad=True)
    functions = (
        lambda x: utils.chunk_local_cumsum(x, 4, cu_seqlens=BOUNDS, output_dtype=None),
        lambda x: utils.mean_pooling(x, 4, BOUNDS),
        lambda x: utils.unpack_sequence(x[0], BOUNDS),
        lambda x: utils.pack_sequence(x[0].view(3, 5, 2, 3), torch.tensor([0, 2, 5, 9])),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, (x,))


def test_index_helpers():
    bounds = BOUNDS.int()
    assert index.prepare_lens(bounds).tolist() == [3, 0, 5, 7]
    pairs = [(n, t) for n, (a, b) in enumerate(PIECES) for t in range(b - a)]
    assert index.prepare_token_indices(bounds, BOUNDS).tolist() == [list(x) for x in pairs]
    assert index.prepare_sequence_ids(bounds).tolist() == [n for n, _ in pairs]
    assert index.prepare_position_ids(bounds).tolist() == [t for _, t in pairs]
    chunks = [[n, i] for n, (a, b) in enumerate(PIECES) for i in range(-((a - b) // 4))]
    assert index.prepare_chunk_indices(bounds, 4).tolist() == chunks
    assert index.prepare_chunk_indices(bounds, 4, BOUNDS).tolist() == chunks
    static, offsets = index.prepare_chunk_indices_static(bounds, 4, 7)
    assert static.tolist() == [*chunks, *[[-1, -1]] * (7 - len(chunks))]
    assert offsets.tolist() == index.prepare_chunk_offsets(bounds, 4).tolist() == [0, 1, 1, 3, 5]
    assert index.get_max_num_splits(bounds, 4) == index.get_max_num_splits(bounds, 4, BOUNDS) == 2
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    assert index.prepare_lens_from_mask(mask).dtype == torch.int32
    got = index.prepare_cu_seqlens_from_mask(mask, torch.int64)
    assert got.tolist() == [0, 2, 4] and got.dtype == torch.int64
    with pytest.raises(ValueError, match="split_size is 0"):
        index.prepare_split_cu_seqlens(2, 3, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packing_and_back(side):
    x = torch.arange(30.0).view(15, 2)
    rows = utils.unpack_sequence(x, BOUNDS, side)
    assert rows.shape == (4, 7, 2) and rows[1].abs().sum() == 0
    row = rows[0, -3:] if side == "left" else rows[0, :3]
    assert torch.equal(row, x[:3])
    assert torch.equal(utils.pack_sequence(rows, BOUNDS, side), x)
    wide = utils.unpack_sequence(x, BOUNDS, side, desired_shape=(4, 9, 2))
    assert wide.shape == (4, 9, 2) and torch.equal(utils.pack_sequence(wide, BOUNDS, side), x)
    with pytest.raises(ValueError, match="a sequence of 7 tokens; rows have 5"):
        utils.pack_sequence(x.view(3, 5, 2), BOUNDS, side)


def test_blocks_are_averaged_over_their_own_length():
    x = torch.randn(1, 15, 2, 3, dtype=torch.float64)
    want = [x[:, t : min(t + 4, b)].mean(1) for a, b in PIECES for t in range(a, b, 4)]
    torch.testing.assert_close(utils.mean_pooling(x, 4, BOUNDS), torch.stack(want, 1))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_solve_is_the_inverse(size):
    T = size + 5
    A = 0.1 * torch.randn(2, T, 3, size, dtype=torch.float64)
    rows = torch.arange(T) % size
    A = A.masked_fill((torch.arange(size) >= rows[:, None])[:, None], 0)
    got = utils.solve_tril(A, output_dtype=torch.float64)
    for begin, end in ((0, size), (size, T)):
        n = end - begin
        lower = A[:, begin:end, :, :n].transpose(1, 2) + torch.eye(n).double()
        product = lower @ got[:, begin:end, :, :n].transpose(1, 2)
        torch.testing.assert_close(product, torch.eye(n).double().expand_as(product))
        assert got[:, begin:end, :, n:].abs().sum() == 0


def test_softmax_products_and_sinkhorn():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    p, dp = x.softmax(-1), torch.randn(3, 5, dtype=torch.float64)
    (want,) = torch.autograd.grad(p, x, dp)
    torch.testing.assert_close(utils.softmax_bwd(p, dp, None), want)
    torch.testing.assert_close(utils.softmax_fwd(x, None), p)
    torch.testing.assert_close(utils.logsumexp_fwd(x, 2.0), (2 * x).logsumexp(-1))
    torch.testing.assert_close(utils.addmm(p, p, dp.mT @ p, 2.0, 3.0), 3 * p + 2 * p @ dp.mT @ p)
    torch.testing.assert_close(utils.matmul(p, dp.mT, "tanh"), (p @ dp.mT).tanh())
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        utils.matmul(p, dp.mT, "gelu")
    even = utils.sinkhorn(torch.randn(2, 4, 4, dtype=torch.float64), 200)
    for dim in (-1, -2):
        torch.testing.assert_close(even.sum(dim), torch.ones(2, 4).double(), rtol=0, atol=1e-9)
    assert pytest.approx(1.4426950408889634) == utils.constant.RCP_LN2
