# SPDX-License-Identifier: MIT
"""What `fla.ops.cp` says a rank holds; `tests/distributed` computes with it."""

import inspect

import pytest
import torch

from fla.ops import cp
from fla.ops.cp.context import FLACPContext, build_cp_context, get_cp_cu_seqlens
from fla.ops.kda import chunk_kda
from fla.ops.precond_kda import chunk_precond_kda
from fla.ops.registry import OPS


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_each_rank_holds(dtype):
    """Rows of 6, 0, 1, 12 and 5 tokens on 4 ranks of 6."""
    bounds = torch.tensor([0, 6, 6, 7, 19, 24], dtype=dtype)
    plans = [get_cp_cu_seqlens(bounds, world_size=4, rank=r) for r in range(4)]
    assert [p.cu_seqlens.tolist() for p in plans] == [[0, 6], [0, 1, 6], [0, 6], [0, 1, 6]]
    assert [p.num_seqs for p in plans] == [1, 2, 1, 2]
    assert [p.is_first_rank for p in plans] == [True, True, False, False]
    assert [p.is_last_rank for p in plans] == [True, False, False, True]
    assert [p.pre_num_ranks for p in plans] == [0, 0, 1, 2]
    assert [p.post_num_ranks for p in plans] == [0, 2, 1, 0]
    assert [p.pre_num_conv_tokens for p in plans] == [0, 0, 5, 11]
    assert {(p.cu_seqlens.dtype, p.cu_seqlens_cpu.dtype) for p in plans} == {(torch.int32,) * 2}
    assert not any(p.is_cp_enabled for p in plans)
    assert torch.equal(plans[1].copy_for_backward().cu_seqlens, plans[1].cu_seqlens)


def test_what_each_rank_holds_in_a_zigzag_layout():
    """The same rows on 2 ranks: parts 0 and 3 of four, 1 and 2."""
    bounds = torch.tensor([0, 6, 6, 7, 19, 24])
    ends, middle = (
        get_cp_cu_seqlens(bounds, world_size=2, rank=r, layout="zigzag") for r in range(2)
    )
    assert ends.cu_seqlens.tolist() == [0, 6, 7, 12] and middle.cu_seqlens.tolist() == [0, 1, 6, 12]
    assert (ends.front_num_seqs, middle.front_num_seqs) == (1, 2)
    assert ends.part_len == middle.part_len == 6
    assert ends.pre_num_ranks_by_part == (0, 2) and middle.pre_num_ranks_by_part == (0, 1)
    assert ends.post_num_ranks_by_part == (0, 0) and middle.post_num_ranks_by_part == (2, 1)
    assert ends.is_first_by_part == (True, False) and middle.is_first_by_part == (True, False)
    assert ends.is_last_by_part == (True, True) and middle.is_last_by_part == (False, False)
    assert ends.pre_num_conv_tokens_by_part == (0, 11)
    assert middle.pre_num_conv_tokens_by_part == (0, 5)
    assert ends.is_first_rank is None and ends.copy_for_backward().layout == "zigzag"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(cu_seqlens=torch.tensor([0, 5]), world_size=2, rank=0), "cannot share evenly"),
        (
            dict(cu_seqlens=torch.tensor([0, 6]), world_size=2, rank=0, layout="zigzag"),
            "cannot share evenly in a zigzag layout; pad the row to a multiple of 4",
        ),
        (dict(cu_seqlens=torch.tensor([0, 0]), world_size=2, rank=0), "cannot share evenly"),
        (dict(cu_seqlens=torch.tensor([0, 4, 2, 6]), world_size=2, rank=0), "decreases"),
        (dict(cu_seqlens=torch.tensor([1, 4]), world_size=2, rank=0), "starts at 1"),
        (dict(cu_seqlens=torch.tensor([0.0, 4.0]), world_size=2, rank=0), "int32 or int64"),
        (dict(cu_seqlens=torch.tensor([0, 4]), world_size=2, rank=2), "world_size is 2 and rank"),
        (dict(cu_seqlens=torch.tensor([0, 4])), "pass a group, or both"),
        (
            dict(
                cu_seqlens=torch.tensor([0, 4]), cu_seqlens_cpu=torch.tensor([0, 2, 4]),
                world_size=2, rank=0,
            ),
            r"cu_seqlens_cpu has shape \[3\]",
        ),
    ],
)  # fmt: skip
def test_boundaries_that_ranks_cannot_share(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_cp_cu_seqlens(**arguments)


def test_what_build_cp_context_refuses():
    bounds = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="layout is 'striped'; expected 'contiguous' or 'zigzag'"):
        get_cp_cu_seqlens(bounds, world_size=2, rank=0, layout="striped")
    with pytest.raises(ValueError, match="use_tf32x3_affine_chain is False"):
        build_cp_context(bounds, None, use_tf32x3_affine_chain=False)
    with pytest.raises(
        ValueError, match=r"build_cp_context: torch\.distributed is not initialised"
    ):
        build_cp_context(bounds, None)
    with pytest.raises(TypeError, match="kernel_size"):
        build_cp_context(bounds, None, kernel_size=4)


def test_a_context_made_by_hand_is_refused():
    q = torch.randn(1, 4, 1, 8)
    context = FLACPContext(cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"chunk_kda: cp_context .*build_cp_context"):
        chunk_kda(q, q, q, -q.abs(), q[..., 0].sigmoid(), cp_context=context)
    with pytest.raises(ValueError, match="chunk_precond_kda: cp_context is not supported"):
        chunk_precond_kda(q, q, q, -q.abs(), q[..., 0], q[..., 0], q[..., 0], cp_context=context)


def test_who_takes_a_context():
    named = {o.name for o in OPS if "cp_context" in inspect.signature(o.chunk).parameters}
    assert named == {
        "gated_delta_rule", "kda", "generalized_delta_rule", "rwkv7", "gated_delta_product", "gdn2",
        "precond_gated_delta_rule", "precond_kda",
    }  # fmt: skip
    assert set(cp.__all__) >= {"FLACPContext", "build_cp_context", "get_cp_cu_seqlens"}
