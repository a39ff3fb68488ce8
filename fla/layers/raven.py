# SPDX-License-Identifier: MIT
"""Raven: Afzal et al. (2026), arXiv:2607.25357. Gated slot attention (arXiv:2409.07146) whose slots
are chosen by a router.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.checks import refuse
from fla.core.precision import promote_to_fp32
from fla.layers import mixer
from fla.layers.mixer import (
    Context,
    RecurrentMixer,
    State,
    check_mode,
    gate_steps,
    multiple,
    register,
    whole,
)
from fla.modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding
from fla.modules.activations import ACT2FN
from fla.ops.engine.recurrence.gates import softplus_gate
from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa


class Raven(RecurrentMixer):
    """Routed slots, on `[B, T, hidden_size]`.

        q, k = rms_norm(map(W x))        v = gate_fn(W_v x)
        r = score(W_r x), kept for the topk slots of a head (of score + bias), else 0
        g = -exp(A_log) softplus(W_a x + dt_bias) r        s = 1 - exp(g)
        o = W_o rms_norm(gate_fn(gsa(q, k, v, s, g)))

    so a slot that is not chosen neither forgets nor is written. With `decay_type="GLA"`
    `g = r log sigmoid(W_f x) / gate_logit_normalizer`, per slot. `router_score` is sigmoid, whose
    kept scores are divided by their sum, or softmax. In training Gumbel noise joins W_r x
    (`add_gumbel_noise`), so it changes the scores too. `bias_rmm` adds a bias to the choice alone.
    With `use_output_gate` the norm is per head: `rms_norm(gate_fn(o)) * gate_fn(W_g x)`.
    `router_type="mlp"` makes W_r two layers with a GELU between. Without `num_slots` there are as
    many as key channels per head, and topk is at most that. `fuse_norm` changes nothing here: the
    norms are fused where their kernels run.

    Example:
        >>> layer = Raven(hidden_size=64, num_heads=2, num_slots=8, topk=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates = (*RecurrentMixer.gates, "r_proj")

    A_log: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 8,
        feature_map: str = "swish",
        use_output_gate: bool = False,
        gate_fn: str = "swish",
        layer_idx: int | None = None,
        scale: float = 1.0,
        decay_type: str = "Mamba2",
        topk: int = 32,
        bias_rmm: bool = False,
        add_gumbel_noise: bool = True,
        router_score: str = "sigmoid",
        router_type: str = "lin",
        use_rope: bool = False,
        rope_theta: float = 10000.0,
        max_position_embeddings: int | None = None,
        use_short_conv: bool = False,
        fuse_norm: bool = True,
    ):
        super().__init__()
        name = "Raven"
        refuse(name, "use_short_conv", use_short_conv or None, "it has no convolution: drop it")
        self.mode, self.layer_idx = check_mode(name, mode), layer_idx
        for what, value, known in (
            ("decay_type", decay_type, ("Mamba2", "GLA")),
            ("router_score", router_score, ("sigmoid", "softmax")),
            ("router_type", router_type, ("lin", "mlp")),
            ("gate_fn", gate_fn, tuple(ACT2FN)),
        ):
            if value not in known:
                raise ValueError(f"{name}: {what} is {value!r}; expected one of {', '.join(known)}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        groups = multiple(name, "num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        key_dim = whole(name, "hidden_size * expand_k", hidden_size * expand_k)
        value_dim = whole(name, "hidden_size * expand_v", hidden_size * expand_v)
        head_k = multiple(name, "the key width", key_dim, "num_heads", num_heads)
        self.head_v_dim = multiple(name, "the value width", value_dim, "num_heads", num_heads)
        self.num_slots = head_k if num_slots is None else num_slots
        if num_slots is None:
            topk = min(topk, self.num_slots)
        if not 1 <= topk <= self.num_slots:
            raise ValueError(
                f"{name}: topk is {topk}; 1 to num_slots={self.num_slots} was expected"
            )
        self.use_short_conv, self.head_k_dim, self.scale = False, head_k, scale
        self.decay_type, self.topk, self.router_score = decay_type, topk, router_score
        self.add_gumbel_noise, self.gate_logit_normalizer = add_gumbel_noise, gate_logit_normalizer
        self.feature_map = mixer.feature_map(name, feature_map, head_k)
        self.gate_fn, self.use_output_gate = gate_fn, use_output_gate
        slots = self.num_kv_heads * self.num_slots
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim // groups, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim // groups, bias=False)
        if decay_type == "Mamba2":
            self.a_proj = nn.Linear(hidden_size, self.num_kv_heads, bias=False)
            register(self)
        else:
            self.f_proj = nn.Linear(hidden_size, slots, bias=False)
        self.r_proj: nn.Module = nn.Linear(hidden_size, slots, bias=False)
        if router_type == "mlp":
            first = nn.Linear(hidden_size, hidden_size)
            self.r_proj = nn.Sequential(first, nn.GELU(), self.r_proj)
        bias = torch.zeros(self.num_kv_heads, self.num_slots)
        self.r_bias = nn.Parameter(bias) if bias_rmm else None
        self.q_norm = RMSNorm(head_k, elementwise_affine, eps=norm_eps)
        self.k_norm = RMSNorm(head_k, elementwise_affine, eps=norm_eps)
        if use_output_gate:
            self.o_gate_proj = nn.Linear(hidden_size, value_dim, bias=False)
            # other gates than the fused norm's are multiplied in by hand
            self.fused_gate = gate_fn in ("swish", "silu", "sigmoid")
            self.o_norm = (
                FusedRMSNormGated(self.head_v_dim, elementwise_affine, norm_eps, gate_fn)
                if self.fused_gate
                else RMSNorm(self.head_v_dim, elementwise_affine, eps=norm_eps)
            )
        else:
            self.g_norm = RMSNorm(value_dim, elementwise_affine, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(head_k, base=rope_theta) if use_rope else None

    def initial_values(self) -> dict[str, Tensor]:
        """A_log and dt_bias start as in Gated DeltaNet, where the decay is Mamba-2's."""
        if self.decay_type != "Mamba2":
            return {}
        A = torch.empty(self.num_kv_heads).uniform_(1e-3, 16)
        return {"A_log": A.log(), "dt_bias": gate_steps(self.num_kv_heads)}

    def route(self, x: Tensor) -> Tensor:
        """Scores `[B, T, H, M]`, zero but for the topk slots of a head."""
        logits = promote_to_fp32(self.r_proj(x)).unflatten(-1, (-1, self.num_slots))
        if self.training and self.add_gumbel_noise:
            logits = logits - torch.empty_like(logits).exponential_().log()
        scores = logits.sigmoid() if self.router_score == "sigmoid" else logits.softmax(-1)
        choice = scores.detach()
        if self.r_bias is not None:
            choice = choice + self.r_bias
        kept = scores * torch.zeros_like(scores).scatter(-1, choice.topk(self.topk).indices, 1.0)
        if self.router_score == "sigmoid":
            kept = kept / (kept.sum(-1, keepdim=True) + 1e-9)
        return kept

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), _ = self.project(x, context)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        q, k = self.q_norm(self.feature_map(q)), self.k_norm(self.feature_map(k))
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions=context.layout.positions(x.device))
        gate = ACT2FN[self.gate_fn]
        v = gate(v).unflatten(-1, (-1, self.head_v_dim))
        if self.decay_type == "Mamba2":
            decay = softplus_gate(self.a_proj(x), self.A_log, self.dt_bias).unsqueeze(-1)
        else:
            decay = F.logsigmoid(
                promote_to_fp32(self.f_proj(x)).unflatten(-1, (-1, self.num_slots))
            )
            decay = decay / self.gate_logit_normalizer
        g = decay * self.route(x)
        rule = fused_recurrent_gsa if self.token_by_token(x) else chunk_gsa
        s = (1 - g.exp()).to(v.dtype)
        o, state = rule(q, k, v, s, g, scale=self.scale, **context.sequences)
        return self.finish(gate(o), x), context.after(state)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        if not self.use_output_gate:
            return self.o_proj(self.g_norm(o.flatten(-2)))
        g = self.o_gate_proj(x).view_as(o)
        o = self.o_norm(o, g) if self.fused_gate else self.o_norm(o) * ACT2FN[self.gate_fn](g)
        return self.o_proj(o.flatten(-2))
