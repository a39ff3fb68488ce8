# SPDX-License-Identifier: MIT
"""LongNet as an encoder and a decoder, Ding et al. (2023), arXiv:2307.02486. The paper's language
models are decoders alone, with a cache and generation: `fla.models.LongNetForCausalLM`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.transformer import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
)
from fla.layers.dilated_attn import RATES, SEGMENTS
from fla.modules import LayerNorm


class LongNet(nn.Module):
    """`decoder(x, norm(encoder(x)))` on `[batch, tokens, d_model]`; causal throughout where
    `is_causal`. Initialised with MAGNETO's gains. `num_decoder_layers=0` is the encoder alone.

    Differs from the package of this name: positions turn queries and keys (`rope_theta`), where
    xPos was added to embeddings; a second forward, `deepcopy` and pickling work.

    Example:
        >>> model = LongNet(32, 4, 1, 1, 64, [16, 32], [1, 2])
        >>> model(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = SEGMENTS,
        dilation_rates: Sequence[int] = RATES,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rope_theta: float | None = 10000.0,
    ):
        super().__init__()
        N, M = max(1, num_encoder_layers), max(1, num_decoder_layers)
        rest: dict[str, Any] = dict(device=device, dtype=dtype, rope_theta=rope_theta)
        common = (
            d_model, nhead, list(segment_lengths), list(dilation_rates), dim_feedforward, dropout,
            activation, layer_norm_eps,
        )  # fmt: skip
        encoder = math.sqrt(math.log(3 * M) * math.log(2 * N) / 3)
        self.encoder = nn.ModuleList(
            DilatedTransformerEncoderLayer(*common, gamma_init=encoder, **rest)
            for _ in range(num_encoder_layers)
        )
        decoder = math.sqrt(math.log(3 * M))
        self.decoder = nn.ModuleList(
            DilatedTransformerDecoderLayer(*common, gamma_init=decoder, **rest)
            for _ in range(num_decoder_layers)
        )
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        self.encoder_norm = LayerNorm(d_model, eps=layer_norm_eps).to(**made)
        self.norm = LayerNorm(d_model, eps=layer_norm_eps).to(**made)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        memory = x
        for layer in self.encoder:
            memory = layer(memory, is_causal=is_causal)
        memory = self.encoder_norm(memory)
        if not len(self.decoder):
            return memory
        for layer in self.decoder:
            x = layer(x, memory, tgt_is_causal=is_causal, memory_is_causal=is_causal)
        return self.norm(x)


class LongNetLM(nn.Module):
    """Scores of the next token, `[batch, tokens, num_tokens]`, of ids `[batch, tokens]`: an
    embedding, `LongNet`, and a linear map. Without loss, cache and `generate`, as in the package of
    this name; `fla.models.LongNetForCausalLM` has them.

    Example:
        >>> model = LongNetLM(100, 32, 4, 1, 1, 64, [16, 32], [1, 2])
        >>> model(torch.randint(100, (2, 50))).shape
        torch.Size([2, 50, 100])
    """

    def __init__(self, num_tokens: int, d_model: int = 768, *args: Any, **kwargs: Any):
        super().__init__()
        made: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.token_embedding = nn.Embedding(num_tokens, d_model, **made)
        self.long_net = LongNet(d_model, *args, **kwargs)
        self.out = nn.Linear(d_model, num_tokens, **made)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        return self.out(self.long_net(self.token_embedding(x), is_causal=is_causal))
