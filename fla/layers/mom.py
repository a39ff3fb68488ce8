# SPDX-License-Identifier: MIT
"""Mixture of memories: Du et al. (2025), arXiv:2502.13685."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import refuse_symbolic
from fla.core.parallel import refuse_sharded
from fla.layers.mixer import Context, RecurrentMixer, State, check_mode, gate_steps, register, whole
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


class MomAttention(RecurrentMixer):
    """Several gated delta rules, of which every token uses `topk`, on `[B, T, hidden_size]`.

        p = softmax(W_r x), renormalised over its topk memories
        o_t = sum_m p_tm gdn_m(x)_t  (+ gdn_shared(x)_t with shared_mem)
        y = W_o (rms_norm(o) * silu(W_g x))

    Memory m is a Gated DeltaNet over the tokens that chose it, as if they were its whole sequence:
    its convolutions skip the others too. It has its own k, v, beta and decay projections (with
    `single_kv_proj` one for all), and shares queries, convolutions, A_log and dt_bias. The routing
    logits `[B, T, num_memories]` are what the layer returns last. `capacity` drops no token
    here: 1.0 alone is accepted.

    Example:
        >>> layer = MomAttention(hidden_size=64, head_dim=16, num_heads=2, num_memories=3, topk=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates = (*RecurrentMixer.gates, "gate", "shared_a", "shared_b")

    gives = ("router_logits",)
    A_log: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int = 256,
        num_heads: int = 4,
        expand_v: float = 2,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        num_memories: int = 8,
        topk: int = 2,
        capacity: float = 1.0,
        shared_mem: bool = False,
        single_kv_proj: bool = False,
    ):
        super().__init__()
        name = "MomAttention"
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        if not 1 <= topk <= num_memories:
            raise ValueError(
                f"{name}: topk is {topk}; 1 to num_memories={num_memories} was expected"
            )
        if capacity != 1.0:
            raise ValueError(
                f"{name}: capacity is {capacity}; no token is dropped, so leave it 1.0"
            )
        self.num_heads, self.num_memories, self.topk = num_heads, num_memories, topk
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.shared_mem, self.single_kv_proj = shared_mem, single_kv_proj
        head_v = whole(name, "head_dim * expand_v", head_dim * expand_v)
        widths = dict(k=num_heads * head_dim, v=num_heads * head_v, b=num_heads, a=num_heads)
        self.q_proj = nn.Linear(hidden_size, widths["k"], bias=False)
        self.gate = nn.Linear(hidden_size, num_memories, bias=False)
        for letter, width in widths.items():
            if single_kv_proj:
                maps: nn.Module = nn.Linear(hidden_size, width, bias=False)
            else:
                maps = nn.ModuleList(
                    nn.Linear(hidden_size, width, bias=False) for _ in range(num_memories)
                )
            self.add_module(f"{letter}_proj", maps)
            if shared_mem:
                self.add_module(f"shared_{letter}", nn.Linear(hidden_size, width, bias=False))
        register(self)
        if use_short_conv:
            for letter in "qkv":
                width = widths["v" if letter == "v" else "k"]
                conv = ShortConvolution(width, conv_size, bias=conv_bias)
                self.add_module(f"{letter}_conv1d", conv)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, widths["v"], bias=False)
            self.o_norm = FusedRMSNormGated(head_v, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(head_v, eps=norm_eps)
        self.o_proj = nn.Linear(widths["v"], hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """A_log and dt_bias start as in Gated DeltaNet."""
        A = torch.empty(self.num_heads).uniform_(1e-3, 16)
        return {"A_log": A.log(), "dt_bias": gate_steps(self.num_heads)}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        refuse_sharded("MomAttention")
        refuse_symbolic("MomAttention", x.shape[1])
        logits = self.gate(x)
        context.handed["router_logits"] = logits
        weights, chosen = logits.softmax(-1).topk(self.topk, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = torch.zeros_like(logits).scatter(-1, chosen, weights)
        lengths = context.layout.lengths()
        flat, q = x.flatten(0, 1), self.q_proj(x).flatten(0, 1)
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(x.device)
        o: Tensor | None = None
        states, convs = [], []
        for m in range(self.num_memories + self.shared_mem):
            shared = m == self.num_memories
            share = torch.ones_like(weights[..., 0]) if shared else weights[..., m]
            share = share.flatten()
            index = share.nonzero().flatten() if not shared else torch.arange(len(owner))
            index = index.to(x.device)
            counts = torch.bincount(owner[index], minlength=len(lengths))
            bounds = F.pad(counts.cumsum(0), (1, 0))
            part, state, conv = self._memory(flat[index], q[index], m, bounds, context)
            part = part * share[index, None, None]
            empty = part.new_zeros(len(owner), *part.shape[1:])
            o = (empty if o is None else o).index_add(0, index, part)
            states.append(state)
            convs += conv
        assert o is not None  # there is a memory
        o = o.view(*x.shape[:2], *o.shape[1:])
        gate = [self.g_proj(x).view_as(o)] if self.use_output_gate else []
        y = self.o_proj(self.o_norm(o, *gate).flatten(-2))
        return y, context.after(tuple(states), tuple(convs))

    def _map(self, letter: str, m: int) -> Any:
        """The projection of a memory."""
        if m == self.num_memories:
            return getattr(self, f"shared_{letter}")
        maps = getattr(self, f"{letter}_proj")
        return maps if self.single_kv_proj else maps[m]

    def _memory(
        self, x: Tensor, q: Tensor, m: int, bounds: Tensor, context: Context
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(o `[tokens, H, V]`, state, conv states) of one memory over the tokens that chose it."""
        qkv = [q[None], self._map("k", m)(x)[None], self._map("v", m)(x)[None]]
        old, conv = context.state, []
        if self.use_short_conv:
            caches = [None] * 3 if old is None else old.conv[3 * m : 3 * m + 3]
            results = [
                getattr(self, f"{letter}_conv1d")(
                    y, cache=cache, output_final_state=context.keep, cu_seqlens=bounds
                )
                for letter, y, cache in zip("qkv", qkv, caches, strict=True)
            ]
            qkv = [y for y, _ in results]
            conv = [s for _, s in results] if context.keep else []
        else:
            qkv = [F.silu(y) for y in qkv]
        token = self.mode == "fused_recurrent" or x.shape[0] <= len(bounds) - 1
        rule = fused_recurrent_gated_delta_rule if token else chunk_gated_delta_rule
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        o, state = rule(
            q,
            k,
            v,
            g=self._map("a", m)(x)[None],
            beta=self._map("b", m)(x)[None],
            initial_state=None if old is None else old.recurrent[m],
            output_final_state=context.keep,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=bounds,
        )
        return o[0], state, conv
