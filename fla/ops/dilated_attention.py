# SPDX-License-Identifier: MIT
r"""# Dilated attention (LongNet)

Ding et al. (2023), *LongNet: Scaling Transformers to 1,000,000,000 Tokens*, arXiv:2307.02486.

A branch (w, r) cuts the tokens into segments of w and keeps every r-th of each; token t lies on
its grid for head h where t mod w = s(h) modulo r. Tokens on the grid of one segment attend to each
other, and branches are mixed by the denominators of their softmaxes (Eq. 10), which is one softmax:

    M_h[t, s] = number of branches in which t and s lie on the grid of one segment   (and s <= t)
    o_t = sum_s softmax_s(scale q_t . k_s + log M_h[t, s]) v_s

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, T, HQ, K]`, HQ a multiple of H |
| k, v | `k`, `v` | `[B, S, H, K]`, `[B, S, H, V]`; the queries are the last T of the S tokens |
| w, r | `segment_lengths`, `dilation_rates` | one of each per branch |
| s(h) | `head_offsets` | one per head of k, or of q and equal in a group; else h mod r |
| | `branch_heads` | for each branch the heads of k it has; all if absent |

A key on the grids of several branches counts once for each: Eq. 10 as printed. Segments are fixed
blocks, so the first tokens of one see little through that branch, and the last may be shorter. A
token on no grid gets o = 0 (lse = -inf); with a branch of rate 1 there is none.

Numerics: fp32 or wider throughout (on CUDA, torch's flash kernels in fp16 and bf16); exact for any
T, w and r, whether or not one divides another. The gradient of the mixing weights is exact too.

On the one equation: outside; its cost is linear in T where the w / r are bounded.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core import operator
from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_groups, check_same, check_sequences, check_shapes
from fla.core.operator import Schema
from fla.core.parallel import SequenceParallel, current
from fla.core.precision import compute_dtype
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.engine.attention import pieces
from fla.ops.engine.attention.pieces import Piece
from fla.ops.engine.attention.sharded import all_to_all, attend_sharded, check_heads

MODES = ("gather", "ring", "heads")


def naive_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The equation, with all M."""
    HQ, H, S = q.shape[2], k.shape[2], k.shape[1]
    M = multiplicities(S, H, segment_lengths, dilation_rates, head_offsets, branch_heads).to(q)
    k, v, M = (x.repeat_interleave(HQ // H, d) for x, d in ((k, 2), (v, 2), (M, 0)))
    if causal:
        M = M.tril()
    M = M[:, S - q.shape[1] :]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    empty = (M == 0).all(-1, keepdim=True)
    weights = (scores + M.log().masked_fill(empty, 0.0)).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def multiplicities(
    tokens: int,
    heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """M of the equation, `[heads, tokens, tokens]`: how many branches pair two tokens."""
    t, M = torch.arange(tokens), torch.zeros(heads, tokens, tokens, dtype=torch.long)
    for i, (w, r) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        for h in range(heads):
            if branch_heads is None or h in branch_heads[i]:
                on = (t % w - (h if head_offsets is None else head_offsets[h])) % r == 0
                M[h] += (t[:, None] // w == t // w) & on[:, None] & on
    return M


class Branches(NamedTuple):
    """Checked branches: offset of every head of k, and by branch and head whether it takes part."""

    segments: list[int]
    rates: list[int]
    offsets: list[int]
    on: list[bool]

    def heads(self, i: int) -> list[int]:
        H = len(self.offsets)
        return [h for h in range(H) if self.on[i * H + h]]


def _whole(op: str, name: str, values: Sequence[int]) -> list[int]:
    values = list(values)
    if not values or not all(isinstance(x, int) and x > 0 for x in values):
        raise ValueError(f"{op}: {name} is {values}; expected one positive integer per branch")
    return values


def branches(
    op: str,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    groups: int = 1,
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
) -> Branches:
    """The branches of `heads` heads of k, each with `groups` heads of q, or `ValueError`. Warns
    where no rate is 1.
    """
    segments = _whole(op, "segment_lengths", segment_lengths)
    rates = _whole(op, "dilation_rates", dilation_rates)
    if len(segments) != len(rates):
        raise ValueError(
            f"{op}: {len(segments)} segment_lengths {segments} and {len(rates)} dilation_rates "
            f"{rates}; expected one segment length and one dilation rate per branch"
        )
    if 1 not in rates:
        warnings.warn(
            f"{op}: no dilation rate of {rates} is 1: tokens on no branch's grid see nothing and "
            "give 0; add a branch of rate 1",
            RuntimeWarning,
            stacklevel=3,
        )
    offsets = list(range(heads)) if head_offsets is None else [int(x) for x in head_offsets]
    if len(offsets) == heads * groups:
        per_group = [offsets[i : i + groups] for i in range(0, len(offsets), groups)]
        if any(len(set(x)) > 1 for x in per_group):
            raise ValueError(
                f"{op}: head_offsets {offsets} differ within a group of {groups} query heads, "
                "which share one key; repeat k and v per query head, or give one offset per group"
            )
        offsets = [x[0] for x in per_group]
    if len(offsets) != heads or min(offsets) < 0:
        raise ValueError(
            f"{op}: head_offsets is {offsets}; expected {heads} numbers of at least 0, one per "
            "head of k"
        )
    chosen = [range(heads)] * len(rates) if branch_heads is None else branch_heads
    if len(chosen) != len(rates) or any(not 0 <= h < heads for row in chosen for h in row):
        raise ValueError(
            f"{op}: branch_heads is {branch_heads}; expected for each of {len(rates)} branches a "
            f"list of heads below {heads}"
        )
    return Branches(segments, rates, offsets, [h in row for row in chosen for h in range(heads)])


class Places(NamedTuple):
    """The places of tokens in the flat rows of q `[B, T, HQ, .]` and k `[B, S, H, .]`; the queries
    are the T tokens from `first` on, of S.
    """

    B: int
    T: int
    S: int
    HQ: int
    H: int
    first: int
    device: torch.device

    def of(self, tokens: Tensor, heads: Tensor, queries: bool) -> Tensor:
        """The flat rows of tokens `[count, h, n]` of heads `[h]` of k, for the whole batch."""
        length, H, groups = (self.T, self.HQ, self.HQ // self.H) if queries else (self.S, self.H, 1)
        tokens = tokens - self.first if queries else tokens
        tokens = tokens.repeat_interleave(groups, 1) if groups > 1 else tokens
        heads = (heads[:, None] * groups + torch.arange(groups, device=self.device)).flatten()
        batch = torch.arange(self.B, device=self.device).view(-1, 1, 1, 1)
        return ((batch * length + tokens) * H + heads[:, None]).flatten(0, 1)


def plan(
    b: Branches,
    places: Places,
    bounds: Sequence[int] | None,
    causal: bool,
    keys: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """The dense problems: for each branch and length of segment, one per set of heads that have the
    same number of tokens on its grid. `keys` are the tokens looked at, all if absent; they hold
    all queries or none.
    """
    for i, (w, r) in enumerate(zip(b.segments, b.rates, strict=True)):
        for edges, starts in _segments(w, places, bounds, keys).items():
            first = torch.tensor(starts, device=places.device).view(-1, 1, 1)
            for heads, counts in _classes(b, i, edges):
                offsets = torch.tensor([b.offsets[h] % r for h in heads], device=places.device)
                steps = r * torch.arange(counts[0], device=places.device)
                tokens = first + offsets[:, None] + steps
                at = torch.tensor(heads, device=places.device)
                yield from _problems(places, tokens, at, counts[1:], causal)


Edges = tuple[int, ...]  # a segment's length, then begin and end of its queries and of its keys


def _segments(
    w: int, places: Places, bounds: Sequence[int] | None, keys: tuple[int, int] | None
) -> dict[Edges, list[int]]:
    """First tokens of the segments that hold queries and keys, by their edges."""
    found: dict[Edges, list[int]] = {}
    spans = (places.first, places.first + places.T, *(keys or (0, places.S)))
    for begin, end in pairwise([0, places.S] if bounds is None else bounds):
        for start in range(begin + max(0, spans[0] - begin) // w * w, min(end, spans[1]), w):
            length = min(w, end - start)
            edges = (length, *(min(max(0, x - start), length) for x in spans))
            if edges[1] < edges[2] and edges[3] < edges[4]:
                found.setdefault(edges, []).append(start)
    return found


def _classes(b: Branches, i: int, edges: Edges) -> list[tuple[list[int], Edges]]:
    """Heads with equally many tokens on their grid before every edge of a segment: (heads, those
    numbers). Two offsets differ by at most one token.
    """
    r, found = b.rates[i], dict[Edges, list[int]]()
    for h in b.heads(i):
        counts: Any = tuple(len(range(b.offsets[h] % r, x, r)) for x in edges)
        if counts[1] < counts[2] and counts[3] < counts[4]:
            found.setdefault(counts, []).append(h)
    return [(heads, counts) for counts, heads in found.items()]


def _problems(
    places: Places, tokens: Tensor, heads: Tensor, spans: tuple[int, ...], causal: bool
) -> Iterator[Piece]:
    """The problems of tokens `[count, h, n]` on grids: the queries are the tokens from spans[0] to
    spans[1], the keys those from spans[2] to spans[3].
    """
    first, last, begin, end = spans
    q = places.of(tokens[:, :, first:last], heads, True)
    if not causal:
        yield Piece(q, places.of(tokens[:, :, begin:end], heads, False))
        return
    if begin < min(end, first):
        yield Piece(q, places.of(tokens[:, :, begin : min(end, first)], heads, False))
    if begin <= first and end >= last:
        yield Piece(q, places.of(tokens[:, :, first:last], heads, False), True)


def _pieces(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, b: Branches, causal: bool
) -> Callable[[], Iterator[Piece]]:
    bounds = None
    if cu_seqlens is not None:
        bounds = boundaries_to_list(cu_seqlens, k.shape[1], "dilated_attention")
    T, S = q.shape[1], k.shape[1]
    places = Places(q.shape[0], T, S, q.shape[2], k.shape[2], S - T, q.device)
    return partial(plan, b, places, bounds, causal)


def _flat(x: Tensor) -> Tensor:
    """`[B, T, H, D]` as blocks of one row."""
    return pieces.compute(x).reshape(-1, 1, x.shape[-1])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, segments: Sequence[int],
    rates: Sequence[int], offsets: Sequence[int], on: Sequence[bool], causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and the log-sum-exp `[B, T, HQ]`."""
    b = Branches(list(segments), list(rates), list(offsets), list(on))
    problems = _pieces(q, k, cu_seqlens, b, causal)
    o, lse = pieces.forward(pieces.Blocks(_flat(q), _flat(k), _flat(v)), problems, scale)
    return o.view(*q.shape[:3], v.shape[-1]).to(q.dtype), lse.view(q.shape[:3])


def _empty(q, k, v, *rest):
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[-1]), lse


def _backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens: Tensor | None, segments: Sequence[int], rates: Sequence[int],
    offsets: Sequence[int], on: Sequence[bool], causal: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    b = Branches(list(segments), list(rates), list(offsets), list(on))
    problems = _pieces(q, k, cu_seqlens, b, causal)
    flat = pieces.Blocks(_flat(q), _flat(k), _flat(v))
    grads = pieces.backward(_flat(do), flat, _flat(o), lse.reshape(-1, 1), problems, scale)
    return [g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True)]


operator.define(
    "dilated_attention",
    Schema(
        "Tensor q, Tensor k, Tensor v",
        "Tensor? cu_seqlens, int[] segments, int[] rates, int[] offsets, bool[] on, bool causal, "
        "float scale",
        differentiable=1,
        saved=(0, 1),
        state=False,
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
)


@checked
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    mode: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention; o `[B, T, HQ, V]`, and with `return_lse` the log-sum-exp `[B, T, HQ]`,
    through which no gradient flows. Segments restart at every boundary of `cu_seqlens`.

    Fewer queries than keys are the last of the tokens, as in decoding. One branch a head, as some
    packages have it, is `branch_heads=[[0, 1], [2, 3], ...]`.

    Inside `sequence_parallel` these are a rank's own tokens, and `mode` says what moves: "gather"
    (if absent) fetches from all ranks at once the keys and values that its queries meet, and no
    others; "ring" from one rank after the other, and holds those of one at a time; "heads" turns
    tokens into shares of the heads, which must go up. All give the same.

    Raises `ValueError` for branches that do not fit each other or the heads; warns where no rate
    is 1.

    Example:
        >>> q, k, v = torch.randn(3, 1, 50, 4, 8).unbind()
        >>> dilated_attention(
        ...     q, k, v, segment_lengths=[16, 32], dilation_rates=[1, 2], causal=True
        ... ).shape
        torch.Size([1, 50, 4, 8])
    """
    op = "dilated_attention"
    sizes = _check(op, q, k, v)
    check_sequences(op, sizes["B"], cu_seqlens, None)
    whole = cu_seqlens is not None or current() is not None
    if sizes["T"] > sizes["S"] or (whole and sizes["T"] != sizes["S"]):
        raise ValueError(
            f"{op}: q has T={sizes['T']} tokens and k has S={sizes['S']}; "
            + ("whole sequences need as many of each" if whole else "the queries "
               "are the last of the tokens of k, so T must be at most S")
        )  # fmt: skip
    b = branches(
        op, segment_lengths, dilation_rates, sizes["H"], sizes["HV"] // max(1, sizes["H"]),
        head_offsets, branch_heads,
    )  # fmt: skip
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    o, lse = BRANCHES(op, backend, q, k, v, cu_seqlens, b, causal, scale, mode)
    return (o, lse) if return_lse else o


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, b: Branches, causal: bool,
    scale: float, mode: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if mode is not None:
        raise ValueError(f"dilated_attention: mode={mode!r} is for sequence_parallel; drop it")
    return operator.call("dilated_attention", q, k, v, cu_seqlens, *b, causal, scale)


def _over_ranks(
    op: str, parallel: SequenceParallel, attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor,
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, b: Branches, causal: bool, scale: float,
    mode: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mode = mode or "gather"
    if mode not in MODES:
        raise ValueError(f"{op}: mode is {mode!r}; expected one of {', '.join(MODES)}")
    shard, H = parallel.of(op, q.shape[1]), k.shape[2]
    bounds = shard.bounds(op, cu_seqlens)
    if mode == "heads":
        check_heads(op, parallel, H)
        share = H // parallel.size
        mine = slice(parallel.rank * share, (parallel.rank + 1) * share)
        on = [x for i in range(len(b.rates)) for x in b.on[i * H : (i + 1) * H][mine]]
        own = Branches(b.segments, b.rates, b.offsets[mine], on)
        rows = (all_to_all(x, shard) for x in (q, k, v))
        o, lse = attend(*rows, cu_seqlens, own, causal, scale, None)
        return all_to_all(o, shard, False), all_to_all(lse.unsqueeze(3), shard, False).squeeze(3)

    def problems(rank: int, batch: int, keys: tuple[int, int]) -> Iterator[Piece]:
        begin, end = shard.ends[rank], shard.ends[rank + 1]
        places = Places(batch, end - begin, shard.total, q.shape[2], H, begin, q.device)
        return plan(b, places, bounds, causal, keys)

    return attend_sharded(q, k, v, shard, problems, scale, mode == "ring")


BRANCHES = Stage(
    "dilated_attention",
    {
        "torch": Form(
            _attend,
            "dense pieces in torch's flash kernels (elsewhere in blocks), merged; backward by hand",
        )
    },
    first_tensor,
    _over_ranks,
)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    sizes = check_shapes(op, q=(q, "B T HV K"), k=(k, "B S H K"), v=(v, "B S H V"))
    check_groups(op, sizes, "q")
    check_same(op, q=q, k=k, v=v)
    return sizes


@checked
def dilated_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    scale: float | None = None,
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Causal dilated attention of the last token, q `[B, 1, HQ, K]`, on k `[B, S, H, K]` and v
    `[B, S, H, V]`, which hold it and those before it; o `[B, 1, HQ, V]`. Reads at most sum(w / r)
    keys per head.

    `lengths` `[B]`: a row's tokens are the last `lengths[b]` of S; all if absent.

    Example:
        >>> k, v = torch.randn(2, 1, 50, 4, 8).unbind()
        >>> branches = dict(segment_lengths=[16, 32], dilation_rates=[1, 2])
        >>> dilated_attention_step(k[:, -1:], k, v, **branches).shape
        torch.Size([1, 1, 4, 8])
    """
    op = "dilated_attention_step"
    sizes = _check(op, q, k, v)
    if sizes["T"] != 1 or sizes["S"] == 0:
        raise ValueError(
            f"{op}: q has T={sizes['T']} tokens and k has S={sizes['S']}; one query and at least "
            "its own key were expected; dilated_attention takes several"
        )
    B, S, H = sizes["B"], sizes["S"], sizes["H"]
    b = branches(
        op, segment_lengths, dilation_rates, H, sizes["HV"] // H, head_offsets, branch_heads
    )
    check_shapes(op, q=(q, "B T HV K"), lengths=(lengths, "B"))
    count = torch.full((B,), S, device=q.device) if lengths is None else lengths.to(q.device)
    tokens, seen = zip(
        *(_grid(b, i, count.view(-1, 1, 1) - 1, S) for i in range(len(b.rates))), strict=True
    )
    at, visible = torch.cat(tokens, 2), torch.cat(seen, 2)  # [B, H, keys]
    at = (at + (S - count).view(-1, 1, 1)).clamp(0, S - 1)
    rows = (torch.arange(B, device=q.device).view(-1, 1, 1) * S + at) * H
    rows = rows + torch.arange(H, device=q.device).view(-1, 1)
    keys, values = (x.reshape(-1, x.shape[-1])[rows] for x in (k, v))
    nothing = ~visible.any(-1, keepdim=True)
    mask = (visible | nothing).repeat_interleave(q.shape[2] // H, 1).unsqueeze(2)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[2] != H
    )
    o = o.masked_fill(nothing.repeat_interleave(q.shape[2] // H, 1).unsqueeze(3), 0.0)
    return o.transpose(1, 2)


def _grid(b: Branches, i: int, t: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, H, n]` of a branch's grid in the segment of token t `[B, 1, 1]`, and which of
    them t sees.
    """
    w, r, H = b.segments[i], b.rates[i], len(b.offsets)
    off = torch.tensor(b.offsets, device=t.device).view(1, H, 1) % r
    on = torch.tensor(b.on[i * H : (i + 1) * H], device=t.device).view(1, H, 1)
    tokens = t // w * w + off + r * torch.arange(-(-min(w, most) // r), device=t.device)
    return tokens, (tokens <= t) & on & ((t % w - off) % r == 0)


class Coverage(NamedTuple):
    """What a head sees with a choice of branches.

    Fields:
        served: share of (token, head) pairs on each branch's grid.
        keys: keys that a token on it meets in each branch, without causality.
        pairs: scores per token and head, over all branches; dense attention costs T.
        blind: share of (token, head) pairs that no branch serves.
        residues: of each branch's r residues, those that some head serves.
    """

    served: list[float]
    keys: list[int]
    pairs: float
    blind: float
    residues: list[int]


def coverage_report(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    head_offsets: Sequence[int] | None = None,
    branch_heads: Sequence[Sequence[int]] | None = None,
) -> Coverage:
    """What the branches cover, on whole segments; `blind` is counted on the longest.

    Example:
        >>> report = coverage_report([2048, 4096], [1, 2], heads=12)
        >>> report.served, report.pairs, report.residues
        ([1.0, 0.5], 3072.0, [1, 2])
    """
    b = branches(
        "coverage_report", segment_lengths, dilation_rates, heads, 1, head_offsets, branch_heads
    )
    t = torch.arange(max(b.segments))
    blind = torch.ones(heads, len(t), dtype=torch.bool)
    served, residues, pairs = [], [], 0.0
    for i, (w, r) in enumerate(zip(b.segments, b.rates, strict=True)):
        offsets = [b.offsets[h] % r for h in b.heads(i)]
        counts = [len(range(off, w, r)) for off in offsets]
        served.append(sum(counts) / (w * heads))
        pairs += sum(n * n for n in counts) / (w * heads)  # n tokens on the grid meet n keys
        residues.append(len(set(offsets)))
        for h in b.heads(i):
            blind[h] &= (t % w - b.offsets[h]) % r != 0
    keys = [-(-w // r) for w, r in zip(b.segments, b.rates, strict=True)]
    return Coverage(served, keys, pairs, blind.double().mean().item(), residues)


def geometric_schedule(
    longest: int, first: int = 2048, ratio: int = 2, rate_ratio: int | None = None
) -> tuple[list[int], list[int]]:
    """Segment lengths `first ratio^i` up to the first that reaches `longest`, and rates
    `rate_ratio^i` (`ratio` if absent): then w / r, and with it the cost of a branch, stays or
    falls.

    Example:
        >>> geometric_schedule(16384)
        ([2048, 4096, 8192, 16384], [1, 2, 4, 8])
    """
    if first < 1 or ratio < 2 or longest < 1:
        raise ValueError(
            f"geometric_schedule: longest={longest}, first={first}, ratio={ratio}; expected "
            "lengths of at least 1 and a ratio of at least 2"
        )
    segments, rates = [first], [1]
    while segments[-1] < longest:
        segments.append(segments[-1] * ratio)
        rates.append(rates[-1] * (rate_ratio or ratio))
    return segments, rates
