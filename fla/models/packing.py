# SPDX-License-Identifier: MIT
"""Boundaries of packed sequences in the forms in which collators write them, as one
`SequenceLayout`.

Beside `cu_seqlens` these are transformers' `cu_seq_lens_q` and `cu_seq_lens_k` (the same
boundaries twice) with the longest length as `max_length_q` and `max_length_k`, `seq_idx` `[B, T]`
(the number of each token's sequence), and `position_ids` `[B, T]` that start again at 0 inside a
row. Forms that disagree are refused.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.core.parallel import refuse_sharded

KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def check_keywords(owner: str, given: dict[str, Any]) -> None:
    """Raise `TypeError` for a keyword that no collator writes."""
    for name in given:
        if name not in KEYWORDS:
            near = difflib.get_close_matches(name, KEYWORDS)
            hint = f"did you mean {near[0]}?" if near else f"beside those it takes {KEYWORDS}"
            raise TypeError(
                f"{owner}: forward() has no argument {name!r}; {hint} (transformers' collators)"
            )


def resolve_layout(
    owner: str,
    batch: int,
    length: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_length: int = 0,
    device: torch.device | None = None,
    **packing: Any,
) -> SequenceLayout:
    """`SequenceLayout.resolve` that also reads `position_ids` and `KEYWORDS`. Under a cache
    positions continue it and bound nothing.

    Example:
        >>> places = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
        >>> resolve_layout("model", 2, 5, position_ids=places).cu_seqlens.tolist()
        [0, 3, 5, 7, 10]
    """
    check_keywords(owner, packing)
    cu_seqlens = _boundaries(owner, cu_seqlens, packing)
    layout = SequenceLayout.resolve(
        batch,
        length,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        past_length=past_length,
        device=device,
    )
    for name, values, step in (
        ("position_ids", position_ids, 1),
        ("seq_idx", packing.get("seq_idx"), 0),
    ):
        if values is None:
            continue
        if layout.shard is not None:
            refuse_sharded(owner, f"with {name}: pass cu_seqlens of all tokens")
        values = _of_tokens(owner, name, values, batch, length)
        if not past_length:
            layout = _bounded(owner, name, values, step, layout, cu_seqlens is not None)
    return layout


def _boundaries(owner: str, cu_seqlens: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """The boundaries that `cu_seqlens`, `cu_seq_lens_q` and `cu_seq_lens_k` all are."""
    every: dict[str, Any] = {"cu_seqlens": cu_seqlens} | {n: packing.get(n) for n in KEYWORDS[:2]}
    given = {name: x for name, x in every.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.dim() != 1:
            what = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{owner}: {name} is {what}; expected a tensor [N + 1] of boundaries")
    names = list(given)
    for name in names[1:]:
        if given[names[0]].tolist() != given[name].tolist():
            raise ValueError(
                f"{owner}: {names[0]} {given[names[0]].tolist()} and {name} "
                f"{given[name].tolist()} bound other sequences; pass one of them"
            )
    if not names:
        return None
    bounds = given[names[0]]
    for name in KEYWORDS[2:4]:
        longest = packing.get(name)
        if longest is not None and int(bounds.diff().max()) > int(longest):
            raise ValueError(
                f"{owner}: {name} is {int(longest)}, and the longest sequence of {names[0]} has "
                f"{int(bounds.diff().max())} tokens; leave {name} out"
            )
    return bounds


def _of_tokens(owner: str, name: str, values: Tensor, batch: int, length: int) -> Tensor:
    """values as integers `[B, T]`, one row of them standing for all."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(values).__name__}; expected a tensor [B, T]")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{owner}: {name} is {values.dtype}; expected integers")
    if values.shape not in ((batch, length), (1, length), (length,)):
        raise ValueError(
            f"{owner}: {name} has shape {list(values.shape)}; expected [B={batch}, T={length}], "
            "one value per token"
        )
    return values.expand(batch, length)


def _bounded(
    owner: str, name: str, values: Tensor, step: int, layout: SequenceLayout, bounded: bool
) -> SequenceLayout:
    """layout with a sequence starting wherever values do not go on by `step` inside one; if it is
    `bounded` already, exactly its sequences have to start there.
    """
    batch, length = values.shape
    flat = layout.pack(values.unsqueeze(-1)).flatten()
    own = layout.cu_seqlens
    if own is None:
        own = torch.arange(0, batch * length + 1, length, device=flat.device)
    starts = torch.zeros(len(flat) + 1, dtype=torch.bool, device=flat.device)
    starts[own.to(flat.device)] = True
    jumps = flat.diff() != step
    new = jumps & ~starts[1:-1]
    if bounded and bool((jumps != starts[1:-1]).any()):
        raise ValueError(
            f"{owner}: cu_seqlens {own.tolist()} and {name} {values.flatten().tolist()[:64]} bound "
            "other sequences; pass one of them"
        )
    if not bool(new.any()):
        return layout
    first = flat[1:][new]
    if step and bool((first != 0).any()):
        raise ValueError(
            f"{owner}: {name} jumps to {first[first != 0][0]} inside a row; positions of a "
            "sequence follow each other, and the next sequence starts at 0"
        )
    inside = new.nonzero().flatten() + 1
    cu_seqlens = torch.cat([own.to(inside), inside]).sort().values
    indices = layout.indices
    if indices is None and batch > 1:
        indices = torch.arange(batch * length, device=flat.device)
    return SequenceLayout(batch, length, cu_seqlens, indices)
