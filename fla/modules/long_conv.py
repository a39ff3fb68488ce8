# SPDX-License-Identifier: MIT
"""Convolutions as long as the sequence, by FFT; Poli et al. (2023), arXiv:2302.10866.

    y_t = sum_{s <= t} f_s x_{t-s} + x_t                     one filter f per channel

The FFT has 2T points, so a filter of more than T taps would come round and reach the start of the
sequence from its end: published code does that, and lets a token see later ones, wherever
`max_len` is above T. Here the filter ends at T, which changes no other number.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_shapes
from fla.core.parallel import refuse_sharded
from fla.core.precision import promote_to_fp32


@checked
def fft_conv(
    u: Tensor,
    k: Tensor,
    dropout_mask: Tensor | None,
    gelu: bool = True,
    k_rev: Tensor | None = None,
) -> Tensor:
    """The module's equation of u `[B, D, T]` with filters k `[D, taps]` or `[1, D, taps]`; GELU.

    k_rev, of k's shape, adds `sum_s k_rev_s u_{t+s}`, which looks ahead; dropout_mask `[B, D]` is
    multiplied last.

    Example:
        >>> u, k = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[1.0, 2.0, 4.0]])
        >>> fft_conv(u, k, None, gelu=False).round().flatten().tolist()
        [2.0, 2.0, 4.0]
    """
    refuse_sharded("fft_conv")
    filters = k if k.dim() == 3 else k.unsqueeze(0)
    check_shapes(
        "fft_conv", u=(u, "B D T"), k=(filters, "N D taps"), dropout_mask=(dropout_mask, "B D")
    )
    if filters.shape[0] not in (1, u.shape[0]):
        raise ValueError(
            f"fft_conv: k has shape {list(k.shape)}; expected filters of every channel, "
            f"[{u.shape[1]}, taps], or those of each of the {u.shape[0]} rows"
        )
    if k_rev is not None and k_rev.shape != k.shape:
        raise ValueError(
            f"fft_conv: k_rev has shape {list(k_rev.shape)}; expected that of k, {list(k.shape)}"
        )
    T, wide = u.shape[-1], promote_to_fp32(k).dtype
    if T == 0:
        return u
    spectrum = torch.fft.rfft(filters[..., :T].to(wide), n=2 * T)
    if k_rev is not None:
        spectrum = spectrum + torch.fft.rfft(k_rev[..., :T].to(wide), n=2 * T).conj()
    x = u.to(wide)
    y = torch.fft.irfft(torch.fft.rfft(x, n=2 * T) * spectrum, n=2 * T)[..., :T] + x
    y = F.gelu(y) if gelu else y
    return (y if dropout_mask is None else y * dropout_mask.unsqueeze(-1)).to(u.dtype)


class LongConvolution(nn.Module):
    """The module's equation with filters that are parameters, `[hidden_size, max_len]`, on x
    `[B, T, hidden_size]`. Tokens more than `max_len` back are not seen.

    Example:
        >>> LongConvolution(8, max_len=16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    @checked
    def __init__(self, hidden_size: int, max_len: int):
        super().__init__()
        self.hidden_size, self.max_len = hidden_size, max_len
        self.filter = nn.Parameter(torch.randn(hidden_size, max_len))

    @checked
    def forward(self, x: Tensor) -> Tensor:
        y = fft_conv(x.transpose(1, 2), self.filter, None, gelu=False)
        return y.transpose(1, 2).to(x.dtype)


class PositionalEmbedding(nn.Module):
    """Features of a position, fixed: time from 0 to 1, then the real and the imaginary parts of
    `exp(-i f w)` for `emb_dim // 2` frequencies f from 1e-4 up, `w = 2 pi t / seq_len`.

    Example:
        >>> PositionalEmbedding(3, 5)(4).shape
        torch.Size([1, 4, 3])
    """

    @checked
    def __init__(self, emb_dim: int, seq_len: int):
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(
                f"PositionalEmbedding: emb_dim is {emb_dim}; expected an odd number from 3 up: "
                "time, and two features per frequency"
            )
        self.emb_dim, self.seq_len = emb_dim, seq_len
        bands = (emb_dim - 1) // 2
        frequencies = torch.linspace(1e-4, bands - 1, bands)
        angle = 2 * math.pi / seq_len * torch.arange(seq_len).unsqueeze(-1) * frequencies
        time = torch.linspace(0, 1, seq_len).unsqueeze(-1)
        z = torch.cat([time, angle.cos(), -angle.sin()], -1)
        self.z = nn.Parameter(z.unsqueeze(0), requires_grad=False)

    @checked
    def forward(self, L: int) -> Tensor:
        """The features of the first L positions, `[1, L, emb_dim]`."""
        return self.z[:, :L]


class ImplicitLongConvolution(nn.Module):
    """The module's equation with filters that a small MLP makes of the position, on x `[B, T,
    hidden_size]`, T up to `max_len`.

    Example:
        >>> ImplicitLongConvolution(8, max_len=16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    @checked
    def __init__(self, hidden_size: int, max_len: int, d_emb: int = 3, d_hidden: int = 16):
        super().__init__()
        if d_emb < 3 or d_emb % 2 == 0:
            raise ValueError(
                f"ImplicitLongConvolution: d_emb is {d_emb}; expected an odd number from 3 up"
            )
        self.hidden_size, self.max_len = hidden_size, max_len
        self.pos_emb = PositionalEmbedding(d_emb, max_len)
        self.mlp = nn.Sequential(
            nn.Linear(d_emb, d_hidden), nn.ReLU(), nn.Linear(d_hidden, hidden_size)
        )

    def filter(self, T: int) -> Tensor:
        """The filters of the first T taps, `[1, hidden_size, T]`."""
        return self.mlp(self.pos_emb(T)).transpose(1, 2)

    @checked
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.max_len:
            raise ValueError(
                f"ImplicitLongConvolution: x has {x.shape[1]} tokens but max_len is "
                f"{self.max_len}; build it with a larger max_len"
            )
        y = fft_conv(x.transpose(1, 2), self.filter(x.shape[1]), None, gelu=False)
        return y.transpose(1, 2).to(x.dtype)
