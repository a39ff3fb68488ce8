# SPDX-License-Identifier: MIT
"""Starts the kernels, stage by stage, on one row of all sequences' tokens. Nothing is tuned at run
time: `TILES` holds the launch parameters.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.ops.engine.kernels import gradients, parts, scores, state, token, unit, vector
from fla.ops.engine.kernels.tensors import flat
from fla.ops.engine.recurrence import terms as terms_of
from fla.ops.engine.recurrence.operators import TERMS
from fla.ops.engine.recurrence.terms import Switches, Terms

CHUNK = 64
L2_EPS = 1e-6
NO_DECAY, SCALAR, VECTOR = (x.value for x in (parts.NO_DECAY, parts.SCALAR, parts.VECTOR))
NO_ERASE, DELTA, LOW_RANK = (x.value for x in (parts.NO_ERASE, parts.DELTA, parts.LOW_RANK))
ERASES = {terms_of.NONE: NO_ERASE, terms_of.DELTA: DELTA, terms_of.LOW_RANK: LOW_RANK}


@dataclass(frozen=True)
class Tiles:
    """Channels of keys and values that a program holds, and its warps and pipeline stages."""

    keys: int = 64
    values: int = 32
    warps: int = 4
    stages: int = 2


# by stage; `tight` where shared memory is small, or a program holds more than usual. With an erase
# `state` holds all key channels.
TILES = {
    "scores": Tiles(),
    "state": Tiles(keys=256, warps=8),
    "tight state": Tiles(keys=256, values=16, warps=8, stages=1),
    "output": Tiles(values=64),
    "edges": Tiles(keys=32),
    "gradients": Tiles(values=64, warps=8),
    "tight gradients": Tiles(keys=32, warps=8, stages=1),
    "rows": Tiles(warps=8),
    "tight rows": Tiles(keys=32, warps=8),
    "vector": Tiles(keys=32),
    "token": Tiles(values=16, warps=2),
}


AMPLE = 160 << 10  # bytes of shared memory of a program, as data-centre GPUs have


@cache
def shared_memory(device: torch.device) -> int:
    """The shared memory that a program may have on a device, in bytes."""
    if device.type != "cuda":  # the interpreter has no limit
        return AMPLE
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def on_amd() -> bool:
    """Whether kernels are for AMD's devices, of which one alone knows tf32."""
    return torch.version.hip is not None


def _power(n: int, most: int) -> int:
    """The power of two a tile of n channels takes; matrix products want 16 at least."""
    return max(16, min(most, triton.next_power_of_2(n)))


@dataclass(frozen=True)
class Cuts:
    """The places of sequences and chunks in the row of tokens, on the device.

    Fields:
        bounds: `[N + 1]`, as cu_seqlens.
        first_chunks: `[N]`, number of each sequence's first chunk.
        starts, ends, begins: `[chunks]`, first token of a chunk, end and begin of its sequence.
        owners: `[chunks]`, the number of that sequence.
    """

    bounds: Tensor
    first_chunks: Tensor
    starts: Tensor
    ends: Tensor
    begins: Tensor
    owners: Tensor

    @classmethod
    def of(cls, bounds: list[int], device: torch.device, size: int = CHUNK) -> "Cuts":
        """The cuts of sequences between `bounds`, in chunks of `size` tokens."""
        spans = list(pairwise(bounds))
        chunks = [
            (first, end, begin, n)
            for n, (begin, end) in enumerate(spans)
            for first in range(begin, end, size)
        ]
        counts = torch.tensor([0] + [-(-(end - begin) // size) for begin, end in spans])
        rows = torch.tensor(chunks, dtype=torch.int64).view(-1, 4)
        tensors = (torch.tensor(bounds), counts.cumsum(0)[:-1], *rows.unbind(1))
        return cls(*(x.to(device, torch.int64).contiguous() for x in tensors))


_kept: dict[tuple, Cuts] = {}
_captured: set[tuple] = set()  # what captured graphs read on every replay, and is never freed
KEPT = 256


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def cuts(q: Tensor, cu_seqlens: Tensor | None, size: int = CHUNK) -> Cuts:
    """The cuts of a call. They are cached, so that the next layer copies nothing to the device."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        key: tuple = (B, T, q.device, size)
    else:
        key = (tuple(boundaries_to_list(cu_seqlens, T, "triton")), q.device, size)
    if _capturing(q):
        _captured.add(key)
    if key not in _kept:
        for old in [k for k in _kept if k not in _captured][: len(_kept) - KEPT + 1]:
            del _kept[old]
        bounds = [i * T for i in range(B + 1)] if cu_seqlens is None else list(key[0])
        _kept[key] = Cuts.of(bounds, q.device, size)
    return _kept[key]


def _rows(x: Tensor) -> tuple[int, dict[str, float]]:
    """Programs, sizes and switches of the kernels of `unit.py` for the rows of x."""
    count, BK = x.shape[0] * x.shape[1], triton.next_power_of_2(x.shape[2])
    R = max(1, 2048 // BK)
    return triton.cdiv(count, R), dict(EPS=L2_EPS, R=R, BK=BK)


def _unit(x: Tensor) -> Tensor:
    """Rows `[tokens, H, K]` divided by their norms."""
    out, (grid, sizes) = torch.empty_like(x), _rows(x)
    unit.unit_kernel[(grid,)](x, out, x.shape[0] * x.shape[1], x.shape[2], **sizes)
    return out


class System(NamedTuple):
    """The results of `scores.py`: attention, the inverse T, M, and the scores of the rows of b."""

    attention: Tensor
    inverse: Tensor | None
    mixed: Tensor | None
    below: Tensor | None


class Call:
    """The tensors of a call of the chunk form, its sizes and switches, and its stages in order."""

    def __init__(
        self,
        terms: Terms,
        switches: Switches,
        cu_seqlens: Tensor | None,
        backward: bool = False,
    ):
        q, k, v, g = terms.q, terms.k, terms.v, terms.g
        self.backward, l2norm = backward, switches.l2norm
        self.shape, self.scale, self.cuts = v.shape, switches.scale, cuts(q, cu_seqlens)
        self.H, self.K = q.shape[2:]
        self.HV, self.V = v.shape[2:]
        self.raw, self.l2norm = dict(q=flat(q), k=flat(k)), l2norm
        q, k = (_unit(x) if l2norm else x for x in self.raw.values())
        self.q, self.k, self.v = q, k, flat(v)
        self.g, self.beta = flat(g), flat(terms.beta)
        self.a, self.own_b = flat(terms.a, v.dtype), flat(terms.b, v.dtype)
        self.kind: dict[str, Any] = dict(
            ERASE=ERASES[terms.erase],
            READ_BEFORE=switches.read_before,
            ERASE_BEFORE=terms.b is not None,
            C=CHUNK,
            PRECISION="ieee" if v.dtype == torch.float32 or on_amd() else "tf32",
        )
        self.decay = NO_DECAY if g is None else SCALAR if g.dim() == 3 else VECTOR
        self.b = self.k if self.own_b is None else self.own_b
        self.sequences, self.chunks = len(self.cuts.first_chunks), len(self.cuts.starts)
        self.width = 2 if self.erase == LOW_RANK else 1

    @property
    def erase(self) -> int:
        return self.kind["ERASE"]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype or self.v.dtype)

    def grid(self, tiles: int = 1) -> tuple[int, int, int]:
        return self.chunks, self.HV, tiles

    def tiles(self, stage: str, *sizes: str) -> dict[str, int]:
        """The launch parameters of a stage, with the sizes its kernel takes."""
        small = shared_memory(self.v.device) < AMPLE
        tight = small or self.erase == LOW_RANK or (stage == "state" and self.K > 128)
        tiles = TILES.get(f"tight {stage}" if tight else stage, TILES[stage])
        both = dict(BK=_power(self.K, tiles.keys), BV=_power(self.V, tiles.values))
        warps = dict(num_warps=tiles.warps, num_stages=tiles.stages)
        return {name: both[name] for name in sizes} | warps

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Rows that read and write across the chunk's edges: times their decay where that is per
        channel.
        """
        raw = dict(q=self.q, k=self.k, b=self.b)
        if self.a is not None:
            raw["a"] = self.a
        if self.decay != VECTOR:
            return raw | dict(last=self.q)
        out = {name: self.new(len(self.v), self.HV, self.K) for name in raw}
        out["last"] = self.new(self.chunks, self.HV, self.K, dtype=torch.float32)
        sizes = self.tiles("edges", "BK")
        kind = {name: self.kind[name] for name in ("ERASE", "READ_BEFORE", "ERASE_BEFORE", "C")}
        vector.edges_kernel[self.grid(triton.cdiv(self.K, sizes["BK"]))](
            self.q, self.k, self.b, self.a, self.g, out["q"], out["k"], out["b"], out.get("a"),
            out["last"], self.cuts.starts, self.cuts.ends, self.H, self.b.shape[1], self.HV,
            self.K, **kind, **sizes,
        )  # fmt: skip
        return out

    @cached_property
    def system(self) -> System:
        C, erase = CHUNK, self.erase
        attention = self.new(self.chunks, self.HV, C, self.width * C)
        inverse = None if erase == NO_ERASE else self.new(self.chunks, self.HV, C, C)
        mixed = self.new(self.chunks, self.HV, C, C) if erase == LOW_RANK else None
        where = (self.cuts.starts, self.cuts.ends)
        heads = (self.H, self.b.shape[1], self.HV)
        below, keep = None, erase != NO_ERASE and (self.decay == VECTOR or self.backward)
        if keep:
            below = torch.empty_like(attention, dtype=torch.float32)
        if self.decay != VECTOR:
            scores.scores_kernel[self.grid()](
                self.q, self.k, self.a, self.b, self.g, self.beta, attention, inverse, mixed,
                below, *where, *heads, self.K, DECAY=self.decay, KEEP=keep, **self.kind,
                **self.tiles("scores", "BK"),
            )  # fmt: skip
            return System(attention, inverse, mixed, below)
        vector.vector_scores_kernel[self.grid(C // parts.BLOCK.value)](
            self.q, self.k, self.a, self.b, self.g, attention, below, *where, *heads, self.K,
            **self.kind, **self.tiles("vector", "BK"),
        )  # fmt: skip
        if erase != NO_ERASE:
            scores.solve_kernel[self.grid()](
                below, self.beta, inverse, mixed, *where, self.HV, ERASE=erase, C=C,
                PRECISION=self.kind["PRECISION"], num_warps=TILES["scores"].warps,
            )  # fmt: skip
        return System(attention, inverse, mixed, below)

    def run_states(self, initial: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The first state of every chunk, u, and the final state."""
        states = self.new(self.chunks, self.HV, self.K, self.V)
        written = None if self.erase == NO_ERASE else torch.empty_like(self.v)
        final = self.new(self.sequences, self.HV, self.K, self.V, dtype=torch.float32)
        inverse, mixed = self.system.inverse, self.system.mixed
        rows, sizes = self.rows, self.tiles("state", "BK", "BV")
        kind = {name: self.kind[name] for name in ("ERASE", "ERASE_BEFORE", "C", "PRECISION")}
        state.state_kernel[self.state_grid(sizes)](
            rows["k"], rows["b"], rows.get("a"), self.v, self.g, self.beta, rows["last"], inverse,
            mixed, states, written, initial, final, self.cuts.bounds, self.cuts.first_chunks,
            rows["k"].shape[1], rows["b"].shape[1], self.HV, self.K, self.V, self.decay,
            INITIAL=initial is not None, **kind, **sizes,
        )  # fmt: skip
        return states, written, final

    def state_grid(self, sizes: dict[str, int]) -> tuple[int, int, int]:
        values, keys = triton.cdiv(self.V, sizes["BV"]), triton.cdiv(self.K, sizes["BK"])
        return self.sequences * self.HV, values, keys

    def output(self, states: Tensor, written: Tensor | None) -> Tensor:
        o, rows, sizes = torch.empty_like(self.v), self.rows, self.tiles("output", "BK", "BV")
        kind = {name: self.kind[name] for name in ("ERASE", "READ_BEFORE", "C", "PRECISION")}
        state.output_kernel[self.grid(triton.cdiv(self.V, sizes["BV"]))](
            rows["q"], self.v, written, self.g, self.system.attention, states, o, self.cuts.starts,
            self.cuts.ends, self.scale, rows["q"].shape[1], self.HV, self.K, self.V, self.decay,
            **kind, **sizes,
        )  # fmt: skip
        return o.view(self.shape)

    def state_gradients(
        self, do: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Z behind every chunk, r, dv, and the gradient of the initial state."""
        states_grad = self.new(self.chunks, self.HV, self.K, self.V)
        solved = None if self.erase == NO_ERASE else torch.empty_like(self.v)
        rows, sizes = self.rows, self.tiles("state", "BK", "BV")
        grid = self.state_grid(sizes)
        dv = self.new(grid[2], *self.v.shape, dtype=None if grid[2] == 1 else torch.float32)
        dinitial = self.new(self.sequences, self.HV, self.K, self.V, dtype=torch.float32)
        gradients.state_gradient_kernel[grid](
            rows["q"], rows["k"], rows["b"], rows.get("a"), do, self.g, self.beta, rows["last"],
            *self.system[:3], states_grad, solved, dv, dfinal, dinitial, self.cuts.bounds,
            self.cuts.first_chunks, self.scale, self.v.numel(),
            *(rows[name].shape[1] for name in "qkb"), self.HV, self.K, self.V, self.decay,
            FINAL=dfinal is not None, **self.kind, **sizes,
        )  # fmt: skip
        return states_grad, solved, dv[0] if grid[2] == 1 else dv.sum(0), dinitial

    def row_gradients(
        self,
        do: Tensor,
        states: Tensor,
        states_grad: Tensor,
        written: Tensor | None,
        solved: Tensor | None,
    ) -> dict[str, Tensor]:
        """Gradients of q, k, b, a (fp32, per value head), g and beta."""
        wide, HV, plane = torch.float32, self.HV, len(self.v) * self.HV
        vectors = self.decay == VECTOR
        sizes = self.tiles("gradients", "BK", "BV")
        tiles = triton.cdiv(self.K, sizes["BK"])
        dg = None
        if self.g is not None:  # per token: the chunk's own part, and one per tile
            dg = self.new(*(self.g.shape if vectors else (1 + tiles, *self.g.shape)), dtype=wide)
        height = 1 if self.erase == NO_ERASE else 2
        scores_grad = self.new(self.chunks, HV, height * CHUNK, self.width * CHUNK, dtype=wide)
        where = (self.cuts.starts, self.cuts.ends)
        rate = None if self.beta is None else torch.empty_like(self.beta, dtype=wide)
        gradients.score_gradient_kernel[self.grid()](
            do, self.v, self.beta, written, solved, self.system.attention, self.system.below,
            scores_grad, rate, None if dg is None or vectors else dg[0], *where, self.scale,
            HV, self.V, self.decay, **self.kind, **self.tiles("gradients", "BV"),
        )  # fmt: skip
        names = ["q", "k", *(["b"] if height == 2 else []), *(["a"] if self.width == 2 else [])]
        out = {name: self.new(len(self.v), HV, self.K, dtype=wide) for name in names}
        sinks = [out.get(name) for name in "qkba"]
        dlast = self.new(self.chunks, HV, self.K, dtype=wide) if vectors else None
        rows = self.rows
        gradients.edge_kernel[self.grid(tiles)](
            rows["q"], rows["k"], rows["b"], rows.get("a"), do, self.v, self.g, self.beta,
            rows["last"], states, states_grad, written, solved, *sinks,
            None if dg is None or vectors else dg[1:], dlast, *where, self.scale, plane,
            rows["k"].shape[1], rows["b"].shape[1], HV, self.K, self.V, self.decay,
            **self.kind, **sizes,
        )  # fmt: skip
        sizes = self.tiles("vector" if vectors else "rows", "BK")
        tiles = triton.cdiv(self.K, sizes["BK"])
        dbeta = None if rate is None else self.new(tiles, *rate.shape, dtype=wide)
        shared = (
            self.q, self.k, self.b, self.a, self.g, self.beta, scores_grad, *sinks, dbeta, *where,
            plane, self.H, self.b.shape[1], HV,
        )  # fmt: skip
        if vectors:
            vector.vector_rows_kernel[self.grid(tiles)](
                *shared, dg, dlast, self.K, **self.kind, **sizes
            )
        else:
            gradients.rows_kernel[self.grid(tiles)](
                *shared, self.K, DECAY=self.decay, **self.kind, **sizes
            )
        if dg is not None:
            out["g"] = dg if vectors else dg.sum(0)
        if rate is not None and dbeta is not None:
            out["beta"] = rate + dbeta.sum(0)
        return out

    def head_gradient(self, name: str, grad: Tensor, other: Tensor | None = None) -> Tensor:
        """The gradient of q or k from the gradients of its rows per value head."""
        x = self.raw[name]
        out, (grid, sizes) = torch.empty_like(x), _rows(x)
        unit.head_gradient_kernel[(grid,)](
            x, grad, other, out, x.shape[0] * self.H, self.H, self.HV, self.K,
            OTHER=other is not None, L2NORM=self.l2norm, **sizes,
        )  # fmt: skip
        return out

    def gradients(
        self, do: Tensor, initial: Tensor | None, dfinal: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of all inputs by name, `[B, T, ...]`, and of the initial state."""
        do = flat(do, self.v.dtype)
        states, written, _ = self.run_states(initial)
        states_grad, solved, dv, dinitial = self.state_gradients(do, dfinal)
        out = self.row_gradients(do, states, states_grad, written, solved)
        other = out.pop("b") if self.erase == DELTA and self.own_b is None else None
        out |= dict(q=self.head_gradient("q", out["q"]), k=self.head_gradient("k", out["k"], other))
        out["v"] = dv
        return {name: x.view(*self.shape[:2], *x.shape[1:]) for name, x in out.items()}, dinitial


def tokens(
    terms: Terms,
    switches: Switches,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """o and the final state, token by token. With `overwrite` it is written over `initial`."""
    q, v, g, beta = terms.q, terms.v, terms.g, terms.beta
    where = cuts(q, cu_seqlens)
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    o = v.new_empty(v.shape)
    N = len(where.first_chunks)
    final = initial if overwrite else None
    if final is None:
        final = v.new_empty(terms.state_shape(N), dtype=torch.float32)
    tiles = TILES["token"]
    BV = _power(V, tiles.values)
    token.token_kernel[(N * HV, triton.cdiv(V, BV))](
        *map(flat, terms.named(TERMS)), o, initial, final, where.bounds, switches.scale,
        H, HV, K, V,
        DECAY=NO_DECAY if g is None else SCALAR if g.dim() == 3 else VECTOR,
        ERASE=ERASES[terms.erase], READ_BEFORE=switches.read_before,
        ERASE_BEFORE=terms.b is not None, COLUMNS=terms.gv is not None,
        CHANNELS=beta is not None and beta.dim() == 4, L2NORM=switches.l2norm,
        INITIAL=initial is not None, BK=triton.next_power_of_2(K), BV=BV,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return o, final
