# SPDX-License-Identifier: MIT
"""Short causal depthwise convolution with state and boundaries.

    y_t = act(b + sum_{i < W} w_i x_{t-W+1+i}) + residual_t          one filter w per channel

Tokens before the start of a sequence are its cache, or zero. The cache holds the last W inputs of
each sequence, `[N, D, W]`, so prefill, chunked prefill and single steps continue one another
exactly. A packed row is laid out with W slots of history before every sequence; no tap can reach
across a boundary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla._lazy import lazy_names
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.checks import check_sequences, check_shapes, check_tensors
from fla.core.parallel import SequenceParallel, refuse_sharded, tie, using
from fla.core.stage import Form, Stage
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.kernels import operators as triton
from fla.ops.engine.kernels import support
from fla.ops.engine.native import conv as native
from fla.ops.engine.native import library
from fla.ops.engine.recurrence.recurrence import check_packed
from fla.ops.engine.scan.sharded import tokens_before

# where they stood before they had a module
__getattr__, _names = lazy_names(
    __name__,
    {
        "fla.modules.long_conv": [
            "ImplicitLongConvolution",
            "LongConvolution",
            "PositionalEmbedding",
            "fft_conv",
        ]
    },
)
ACTIVATIONS = (None, "silu", "swish")


@checked
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: FLACPContext | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution above: x `[B, T, D]`, weight `[D, W]`, initial_state `[N, D, W]`; returns (y,
    final state or None).

    Differentiable in every tensor, the states included. `cu_seqlens` bounds packed sequences and
    needs B = 1; `cu_seqlens_cpu` and `chunk_indices`, which published kernels take, follow from it
    and are only checked.

    Example:
        >>> y, _ = causal_conv1d(torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0]]))
        >>> y.flatten().tolist()
        [10.0, 11.0, 11.0]
    """
    if cp_context is not None:
        return on_ranks(causal_conv1d, locals(), taps=weight.shape[-1])
    op = "causal_conv1d"
    check_tensors(
        op,
        x=(x, "B T D"),
        weight=(weight, "D W"),
        bias=(bias, "D"),
        residual=(residual, "B T D"),
        initial_state=(initial_state, "N D W"),
    )
    check_sequences(op, x.shape[0], cu_seqlens, initial_state)
    check_packed(op, cu_seqlens, cu_seqlens_cpu, chunk_indices)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected None, 'silu' or 'swish'")
    if initial_state is not None or output_final_state:
        refuse_sharded(op, "a call with a state has no such form")
    silu = activation is not None
    y, final = CONVOLUTION(op, backend, x, weight, bias, initial_state, cu_seqlens, silu)
    y = y if residual is None else y + residual
    return y, final.to(x.dtype) if output_final_state else None


@checked
def causal_conv1d_cp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: FLACPContext | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The output of `causal_conv1d` on a rank's tokens, in the published order of arguments;
    `chunk_size` is a block of published kernels and changes nothing.
    """
    if cp_context is None:
        raise ValueError(
            "causal_conv1d_cp: cp_context is None; pass what fla.ops.cp.build_cp_context returns, "
            "or call causal_conv1d"
        )
    return causal_conv1d(
        x, weight, bias, residual, activation=activation, backend=backend,
        chunk_indices=chunk_indices, cp_context=cp_context,
    )[0]  # fmt: skip


@checked
def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token for each of N sequences: x `[N, D]`, `[N, 1, D]` or `[1, N, D]`, weight `[D, W]`;
    returns (y of x's shape, cache). The cache `[N, D, W]` is moved on in place. No gradients: for
    those call `causal_conv1d` with an initial state.

    Example:
        >>> cache = torch.ones(1, 1, 2)
        >>> y, _ = causal_conv1d_update(
        ...     torch.tensor([[3.0]]), cache, weight=torch.tensor([[1.0, 10.0]])
        ... )
        >>> y.item(), cache.flatten().tolist()
        (31.0, [1.0, 3.0])
    """
    op = "causal_conv1d_update"
    if weight is None:
        raise ValueError(f"{op}: weight is None; pass the filters [D, W]")
    D, W = check_shapes(op, weight=(weight, "D W")).values()
    if x.dim() not in (2, 3) or x.shape[-1] != D or (x.dim() == 3 and 1 not in x.shape[:2]):
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}; expected one token per sequence, [N, D={D}], "
            f"[N, 1, D={D}] or [1, N, D={D}]; pass several tokens to causal_conv1d"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual has shape {list(residual.shape)}; expected that of x, {list(x.shape)}"
        )
    N = x.numel() // D
    if cache.shape != (N, D, W):
        raise ValueError(
            f"{op}: cache has shape {list(cache.shape)}; expected [N={N}, D={D}, W={W}], the last "
            "W inputs of every sequence"
        )
    with torch.no_grad():
        added = None if residual is None else residual.reshape(N, 1, D)
        y, after = causal_conv1d(x.reshape(N, 1, D), weight, bias, added, cache, True, activation)
        assert after is not None  # it was asked for
        cache.copy_(after)
    return y.view(x.shape), cache


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """(y, the last W inputs `[N, D, W]`): one product per tap, under plain autograd."""
    _B, T, D = x.shape
    N, W = count_sequences(x, cu_seqlens), weight.shape[1]
    state = x.new_zeros(N, D, W) if history is None else history.to(x.dtype)
    history = state.transpose(1, 2)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if cu_seqlens is None:
        row = torch.cat([history, x], 1)
        y = _taps(row[:, 1:], weight, T)
        final = row[:, -W:]
    else:
        boundaries_to_list(cu_seqlens, T, "causal_conv1d")
        slots, ends = _slots(cu_seqlens, T, W)
        row = x.new_zeros(T + N * W, D).index_copy(0, slots, x[0])
        before = ends[:, None] - cu_seqlens.diff()[:, None] - W + torch.arange(W, device=x.device)
        row = row.index_copy(0, before.flatten(), history.flatten(0, 1))
        y = _taps(row[None, 1:], weight, row.shape[0] - W).index_select(1, slots - W)
        final = row[ends[:, None] - W + torch.arange(W, device=x.device)]
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y, final.transpose(1, 2).contiguous()


def _slots(cu_seqlens: Tensor, T: int, W: int) -> tuple[Tensor, Tensor]:
    """The position of each token once W slots precede every sequence, and the end of each sequence
    in that row.
    """
    N = cu_seqlens.shape[0] - 1
    owner = torch.arange(N, device=cu_seqlens.device).repeat_interleave(
        cu_seqlens.diff(), output_size=T
    )
    shift = (owner + 1) * W
    ends = cu_seqlens[1:].long() + torch.arange(1, N + 1, device=cu_seqlens.device) * W
    return torch.arange(T, device=cu_seqlens.device) + shift, ends


def _taps(row: Tensor, weight: Tensor, length: int) -> Tensor:
    """`y[:, t] = sum_i weight[:, i] row[:, t + i]` for t < length."""
    y = row[:, :length] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y = torch.addcmul(y, row[:, i : i + length], weight[:, i])
    return y


class Taps(NamedTuple):
    """What the choice of a form looks at: W is the number of taps."""

    device: torch.device
    dtype: torch.dtype
    W: int
    silu: bool


def _facts(x: Tensor, weight: Tensor, bias: Any, history: Any, bounds: Any, silu: bool) -> Taps:
    return Taps(x.device, x.dtype, weight.shape[1], silu)


def _problem(facts: Taps) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 70, 20), (20, facts.W), (20,))  # more tokens than a chunk
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(facts.device, facts.dtype) for shape in shapes
    )
    return x, weight, bias, None, None, facts.silu


def _over_ranks(
    op: str, parallel: SequenceParallel, form: Callable[..., tuple[Tensor, Tensor]], x: Tensor,
    weight: Tensor, bias: Tensor | None, history: None, cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's tokens, with those before them as history; the final state is of this rank."""
    states, cuts = tokens_before(op, parallel, x, cu_seqlens, weight.shape[1])
    with using(None):
        y, final = form(x, weight, bias, states.transpose(1, 2), cuts, silu)
        return tie(y, states), final


CONVOLUTION = Stage(
    "convolution",
    {
        "triton": Form(
            triton.convolve,
            "chunks of 64 tokens side by side, in Triton; backward by hand",
            (support.runs,),
            support.checked,
        ),
        "native": Form(
            native.convolve,
            library.in_cpp("channels side by side, token by token, in {}; backward by hand"),
            (library.runs,),
        ),
        "torch": Form(_convolve, "one product per tap, under plain autograd"),
    },
    _facts,
    _over_ranks,
    _problem,
    lambda device, dtype: Taps(device, dtype, 4, True),
)


class ShortConvolution(nn.Conv1d):
    """`causal_conv1d` with its filters, kept in an `nn.Conv1d` (weight `[D, 1, W]`).

    forward returns (y, cache); the cache `[N, D, W]` is None unless `output_final_state`.

    Example:
        >>> conv = ShortConvolution(8, 4)
        >>> x = torch.randn(2, 5, 8)
        >>> y, cache = conv(x, output_final_state=True)
        >>> step, _ = conv(torch.randn(2, 1, 8), cache=cache)
        >>> y.shape, cache.shape, step.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 8, 4]), torch.Size([2, 1, 8]))
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"ShortConvolution: activation is {activation!r}; expected None, 'silu' or 'swish'"
            )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    @property
    def state_size(self) -> int:
        """Numbers held in the cache per sequence."""
        return self.hidden_size * self.kernel_size[0]

    @checked
    def forward(  # type: ignore[override]  # it also returns a state
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        cp_context: FLACPContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x `[B, T, D]`; mask `[B, T]` reads masked tokens as zero (they stay in place: to drop
        padding altogether pack it with `SequenceLayout`).
        """
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError(
                    "ShortConvolution: mask and cu_seqlens exclude each other; pack the real tokens"
                )
            x = x * mask.unsqueeze(-1).to(x.dtype)
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            residual,
            cache,
            output_final_state,
            self.activation,
            self.backend,
            cu_seqlens,
            chunk_indices=chunk_indices,
            cp_context=cp_context,
        )

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One token per sequence: `forward` with a cache."""
        return self(x, residual, None, cache, output_final_state, cu_seqlens)
