# SPDX-License-Identifier: MIT
"""SequenceLayout: masks, boundaries and position ids in one form, and contradictions refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.core import boundaries as layout_module
from fla.core.boundaries import boundaries_to_list
from fla.core.layout import SequenceLayout
from fla.models.packing import resolve_layout

CU = torch.tensor


def test_dense_input_needs_nothing():
    for mask in (None, torch.ones(2, 5)):
        layout = SequenceLayout.resolve(2, 5, attention_mask=mask)
        assert not layout.packed and not layout.padded
        x = torch.randn(2, 5, 3)
        assert layout.pack(x) is x and layout.unpack(x) is x
        assert layout.positions().tolist() == [[0, 1, 2, 3, 4]] * 2
        assert layout.lengths() == [5, 5]


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pack_and_unpack_are_inverse_for_any_mask(rows):
    mask = torch.tensor(rows)
    layout = SequenceLayout.resolve(*mask.shape, attention_mask=mask)
    x = torch.randn(*mask.shape, 3)
    kept = layout.unpack(layout.pack(x))
    assert torch.equal(kept, x if bool(mask.all()) else x * mask[..., None])
    assert layout.lengths() == mask.sum(1).tolist()
    for row, n in zip(
        layout.unpack(layout.positions()[..., None] + 1).squeeze(-1), mask, strict=True
    ):
        assert row[n].tolist() == list(range(1, int(n.sum()) + 1))


def test_position_ids_become_boundaries():
    layout = resolve_layout("test", 1, 6, position_ids=CU([[0, 1, 2, 0, 1, 0]]))
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert layout.positions().tolist() == [[0, 1, 2, 0, 1, 0]]
    assert not resolve_layout("test", 1, 3, position_ids=CU([[4, 5, 6]])).packed
    assert not resolve_layout("test", 2, 2, position_ids=CU([[0, 1], [0, 1]])).packed


def test_positions_go_on_under_a_cache():
    dense = SequenceLayout.resolve(2, 2, past_length=3)
    assert dense.positions().tolist() == [[3, 4], [3, 4]]
    mask = CU([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = SequenceLayout.resolve(2, 2, attention_mask=mask, past_length=3)
    assert padded.positions().tolist() == [[2, 3], [3, 4]]
    assert SequenceLayout.resolve(2, 2, attention_mask=mask[:, 3:], past_length=3).starts == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(attention_mask=torch.ones(2, 4)),
            r"attention_mask has shape \[2, 4\]; expected \[B=2, T=6\]",
        ),
        (dict(attention_mask=torch.ones(2, 6, 6)), r"attention_mask has shape \[2, 6, 6\]"),
        (dict(cu_seqlens=CU([0, 6])), "packed sequences need B=1"),
    ],
)
def test_wrong_descriptions(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.resolve(2, 6, **arguments)


def test_boundaries_are_read_once(monkeypatch):
    """Boundaries on a device are copied to the host once, until they change."""
    monkeypatch.setattr(layout_module, "_waits", lambda x: True)
    bounds, read = torch.tensor([0, 2, 5]), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(x) or tolist(x))
    assert boundaries_to_list(bounds, 5) == boundaries_to_list(bounds, 5) == [0, 2, 5]
    assert len(read) == 1
    bounds[1] = 3
    assert boundaries_to_list(bounds, 5) == [0, 3, 5]
    with torch.inference_mode():
        assert boundaries_to_list(torch.tensor([0, 1]), 1) == [0, 1]
    assert len(read) == 3


def test_a_mask_that_contradicts_boundaries_is_refused():
    cu = CU([0, 2, 6])
    assert SequenceLayout.resolve(1, 6, attention_mask=torch.ones(1, 6), cu_seqlens=cu).packed
    with pytest.raises(ValueError, match="contradict"):
        SequenceLayout.resolve(1, 6, attention_mask=CU([[0, 1, 1, 1, 1, 1]]), cu_seqlens=cu)
    with pytest.raises(ValueError, match="ends at 5"):
        SequenceLayout.resolve(1, 6, cu_seqlens=CU([0, 5]))
