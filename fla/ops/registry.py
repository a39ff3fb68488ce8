# SPDX-License-Identifier: MIT
"""OPS: the one list that tests, benchmarks and docs are made from. A new operator is its page and a
line here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.ops import abc as abc_
from fla.ops import (
    based,
    comba,
    delta_rule,
    deltaformer,
    gated_delta_product,
    gated_delta_rule,
    gated_oja_rule,
    gdn2,
    generalized_delta_rule,
    gla,
    gsa,
    hgrn,
    kda,
    lightning_attn,
    linear_attn,
    log_linear_attn,
    mamba,
    mamba2,
    mamba3,
    mesa_net,
    mlstm,
    precond_gated_delta_rule,
    precond_kda,
    rebased,
    retention,
    rwkv4,
    rwkv6,
    rwkv7,
    simple_gla,
    titans,
    ttt,
)

Inputs = dict[str, Tensor]
Equation = Callable[[Inputs], dict[str, Any]]

QKV = dict(q="B T H K", k="B T H K unit", v="B T HV V")
SIZES = dict(M=9, D=16, R=2, L=10, Q=2, n=2)  # axes that not every operator has
SIZES |= {"1": 1, "3": 3}


def _values(kind: str, x: Tensor) -> Tensor:
    """Normal numbers x brought into the domain of an argument."""
    return {
        "normal": lambda: x,
        "unit": lambda: F.normalize(x, dim=-1),
        "decay": lambda: F.logsigmoid(x + 1),
        "beta": lambda: 2 * x.sigmoid(),
        "rate": x.sigmoid,
        "small": lambda: x / 10,
        "negative": lambda: -x.exp(),
        "positive": lambda: 0.5 + x.square(),
        "count": lambda: torch.zeros(x.shape, dtype=torch.long),
        "average": lambda: torch.stack([x[:, 0], torch.ones_like(x[:, 1]), x[:, 2]], 1),
        "squares": lambda: x @ x.mT,
    }[kind]()


@dataclass(frozen=True)
class OpCase:
    """One operator, as its tests and benchmarks see it.

    Fields:
        name: the page, `fla/ops/<name>.py`.
        title: the operator in words; paper: its source.
        chunk, token, naive: the public functions (`naive` is the page's literal loop).
        tensors: axes, and the domain where it is not any number, of each tensor argument. `T*n` is
            an axis of n steps per token; without T an argument is a parameter.
        state: axes of each state argument; a tuple of them for an argument that is a tuple.
        fixed: keyword arguments that every call passes.
        chunk_fixed: those that calls of chunk and token pass and calls of naive do not.
        grain: tokens of a mini-batch that is part of the operator: it may be split there only, and
            its chunk size is no choice.
        equation: inputs to the arguments q, k, v, g, a, b, bonus of `recurrence/equation.py`, and
            `steps` where a token takes several; None if the operator is not a point of it.
    """

    name: str
    title: str
    paper: str
    chunk: Callable
    token: Callable
    naive: Callable
    tensors: dict[str, str]
    equation: Equation | None = None
    state: dict[str, str | tuple[str, ...]] = field(
        default_factory=lambda: {"initial_state": "N HV K V"}
    )
    fixed: dict[str, Any] = field(default_factory=dict)
    chunk_fixed: dict[str, Any] = field(default_factory=dict)
    grain: int = 1

    @cached_property
    def grouped(self) -> bool:
        """Whether value (or query) heads may be a multiple of the others."""
        axes = " ".join(self.tensors.values()).split()
        return "HV" in axes and "H" in axes

    def axes(self, name: str) -> list[str]:
        """The axes of a tensor argument."""
        return [a for a in self.tensors[name].split() if not a.islower() or a == "n"]

    def inputs(
        self,
        B: int,
        T: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        **sizes: int,
    ) -> Inputs:
        """Random arguments inside the operator's domain."""
        generator = torch.Generator().manual_seed(seed)
        sizes = SIZES | dict(B=B, T=T, H=H, HV=HV or H, K=K, V=V) | sizes
        sizes["T*n"] = sizes["T"] * sizes["n"]
        values = {}
        for name, spec in self.tensors.items():
            kind = spec.split()[-1] if spec.split()[-1].islower() else "normal"
            shape = [sizes[a] for a in self.axes(name)]
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            values[name] = _values(kind, x).to(device, dtype)
        return values

    def without_groups(self, inputs: Inputs) -> Inputs:
        """Heads repeated to the value heads: the meaning of grouped value heads."""
        if not self.grouped:
            return inputs
        HV = next(x.shape[a.index("HV")] for n, x in inputs.items() if "HV" in (a := self.axes(n)))
        out = {}
        for name, x in inputs.items():
            axis = self.axes(name).index("H") if "H" in self.axes(name) else None
            out[name] = x if axis is None else x.repeat_interleave(HV // x.shape[axis], dim=axis)
        return out

    def states(
        self,
        N: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 7,
        **sizes: int,
    ) -> list[Tensor]:
        """Random initial states, flat."""
        generator = torch.Generator().manual_seed(seed)
        sizes = SIZES | dict(N=N, H=H, HV=HV or H, K=K, V=V) | sizes
        sizes |= {"V+1": V + 1, "F": 1 + K + K * (K + 1) // 2, "P": K * (K + 1) // 2}
        states = []
        for spec in self.state.values():
            for axes in [spec] if isinstance(spec, str) else spec:
                kind = axes.split()[-1] if axes.split()[-1].islower() else "normal"
                shape = [sizes[a] for a in axes.split() if not a.islower()]
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                x = _values(kind, x)
                states.append(x.to(dtype) if x.is_floating_point() else x)
        return states

    def state_arguments(self, states: Sequence[Tensor] | None) -> dict[str, Any]:
        """Flat states as the arguments of a call; none at all for None."""
        if states is None:
            return {}
        rest: list[Tensor] = list(states)
        out: dict[str, Any] = {}
        for name, spec in self.state.items():
            if isinstance(spec, str):
                out[name] = rest.pop(0)
            else:
                out[name] = tuple(rest.pop(0) for _ in spec)
        return out

    def tokens(self, inputs: Inputs, begin: int, end: int) -> Inputs:
        """The tokens from begin to end of every input that has tokens."""
        out = {}
        for name, x in inputs.items():
            axes = self.axes(name)
            n = SIZES["n"] if "T*n" in axes else 1
            out[name] = x[:, begin * n : end * n] if {"T", "T*n"} & set(axes) else x
        return out

    def call(
        self, function: Callable, inputs: Inputs, states: Sequence[Tensor] | None = None, **kw: Any
    ) -> list[Tensor]:
        """`function` on the inputs: the output and the final states, flat."""
        fixed = self.fixed if function is self.naive else self.fixed | self.chunk_fixed
        fixed = fixed | {"output_final_state": bool(self.state)}
        results = function(**inputs, **self.state_arguments(states), **fixed, **kw)
        if isinstance(results, Tensor):
            return [results]
        flat: list[Tensor] = []
        for x in results:
            flat += x if isinstance(x, tuple) else [x]
        return [x for x in flat if x is not None]


def _renamed(function: Callable, **names: str) -> Callable:
    """`function` taking some of its arguments by the names the chunk form has for them."""

    @wraps(function)
    def call(**kwargs: Any) -> Any:
        return function(**{names.get(name, name): x for name, x in kwargs.items()})

    return call


def _linear(x: Inputs) -> dict[str, Any]:
    return dict(q=x["q"], k=x["k"], v=x["v"])


def _delta(x: Inputs) -> dict[str, Any]:
    beta = x["beta"][..., None]
    return dict(q=x["q"], k=x["k"], v=beta * x["v"], a=-beta * x["k"], b=x["k"])


def _constant(log_decay: Tensor) -> Equation:
    return lambda x: _linear(x) | {"g": log_decay.to(x["v"]).expand(x["v"].shape[:3])[..., None]}


def _gated_delta(x: Inputs) -> dict[str, Any]:
    decay = x["g"][..., None] if x["g"].dim() == 3 else x["g"]
    return {**_delta(x), "g": decay, "b": decay.exp() * x["k"]}


def _product(x: Inputs) -> dict[str, Any]:
    n = SIZES["n"]
    q = torch.stack([torch.zeros_like(x["q"])] * (n - 1) + [x["q"]], 2).flatten(1, 2)
    g = torch.stack([x["g"]] + [torch.zeros_like(x["g"])] * (n - 1), 2).flatten(1, 2)
    return {**_gated_delta(x | {"q": q, "g": g}), "steps": n}


def _gdn2(x: Inputs) -> dict[str, Any]:
    b = x["g"].exp() * x["b"] * x["k"]
    return dict(q=x["q"], k=x["k"], v=x["w"] * x["v"], g=x["g"], a=-x["k"], b=b)


def _comba(x: Inputs) -> dict[str, Any]:
    return {**_delta(x), "g": x["g"][..., None], "b": x["p"]}


def _mamba2(x: Inputs) -> dict[str, Any]:
    dt = x["dt"][..., None]
    return dict(q=x["C"], k=x["B"], v=dt * x["x"], g=dt * x["A"][:, None], scale=1.0)


def _rwkv6(x: Inputs) -> dict[str, Any]:
    return dict(q=x["r"], k=x["k"], v=x["v"], g=x["w"], bonus=x["u"])


OPS = [
    OpCase(
        "linear_attn",
        "Linear attention",
        "arXiv:2006.16236",
        linear_attn.chunk_linear_attn,
        linear_attn.fused_recurrent_linear_attn,
        linear_attn.naive_recurrent_linear_attn,
        QKV,
        _linear,
        fixed=dict(normalize=False),
    ),
    OpCase(
        "simple_gla",
        "Simple GLA",
        "arXiv:2312.06635",
        simple_gla.chunk_simple_gla,
        simple_gla.fused_recurrent_simple_gla,
        simple_gla.naive_recurrent_simple_gla,
        QKV | dict(g="B T HV decay"),
        lambda x: _linear(x) | {"g": x["g"][..., None]},
    ),
    OpCase(
        "retention",
        "Retention",
        "arXiv:2307.08621",
        retention.chunk_retention,
        retention.fused_recurrent_retention,
        retention.naive_recurrent_retention,
        QKV,
        lambda x: _constant(retention.log_decay(x["v"].shape[2]))(x),
    ),
    OpCase(
        "lightning_attn",
        "Lightning attention",
        "arXiv:2401.04658",
        lightning_attn.chunk_lightning_attn,
        lightning_attn.fused_recurrent_lightning_attn,
        lightning_attn.naive_recurrent_lightning_attn,
        QKV,
        lambda x: _constant(-6 / x["v"].shape[2] * torch.arange(x["v"].shape[2]))(x),
        fixed=dict(layer_idx=3, num_layers=12),
    ),
    OpCase(
        "gla",
        "Gated linear attention",
        "arXiv:2312.06635",
        gla.chunk_gla,
        _renamed(gla.fused_recurrent_gla, g="gk"),
        _renamed(gla.naive_recurrent_gla, g="gk"),
        QKV | dict(g="B T HV K decay"),
        lambda x: _linear(x) | {"g": x["g"]},
    ),
    OpCase(
        "hgrn",
        "HGRN",
        "arXiv:2311.04823",
        hgrn.chunk_hgrn,
        hgrn.fused_recurrent_hgrn,
        hgrn.naive_recurrent_hgrn,
        dict(x="B T D", g="B T D decay"),
        lambda x: hgrn.point(**x) | {"scale": 1.0},
        state=dict(initial_state="N D"),
    ),
    OpCase(
        "gsa",
        "Gated slot attention",
        "arXiv:2409.07146",
        gsa.chunk_gsa,
        gsa.fused_recurrent_gsa,
        gsa.naive_recurrent_gsa,
        dict(q="B T HV K", k="B T H K", v="B T H V", s="B T H M rate", g="B T H M decay"),
        state=dict(initial_state=("N H K M", "N H M V")),
    ),
    OpCase(
        "abc",
        "ABC",
        "arXiv:2110.02488",
        abc_.chunk_abc,
        abc_.fused_recurrent_abc,
        abc_.naive_recurrent_abc,
        dict(q="B T HV K", k="B T H K", v="B T H V", s="B T H M"),
        state=dict(initial_state=("N H K M", "N H M V", "N H M")),
    ),
    OpCase(
        "rwkv6",
        "RWKV-6",
        "arXiv:2404.05892",
        rwkv6.chunk_rwkv6,
        rwkv6.fused_recurrent_rwkv6,
        rwkv6.naive_recurrent_rwkv6,
        dict(r="B T H K", k="B T H K unit", v="B T HV V", w="B T HV K decay", u="H K"),
        _rwkv6,
    ),
    OpCase(
        "rwkv7",
        "RWKV-7",
        "arXiv:2503.14456",
        rwkv7.chunk_rwkv7,
        rwkv7.fused_recurrent_rwkv7,
        rwkv7.naive_recurrent_rwkv7,
        dict(
            r="B T H K",
            w="B T H K decay",
            k="B T H K unit",
            v="B T H V",
            a="B T H K unit",
            b="B T H K unit",
        ),
        lambda x: dict(q=x["r"], k=x["k"], v=x["v"], g=x["w"], a=x["b"], b=x["a"]),
        state=dict(initial_state="N H K V"),
        fixed=dict(scale=0.3),
    ),
    OpCase(
        "generalized_delta_rule",
        "Generalised delta rule (DPLR)",
        "arXiv:2503.14456",
        generalized_delta_rule.chunk_dplr_delta_rule,
        generalized_delta_rule.fused_recurrent_dplr_delta_rule,
        generalized_delta_rule.naive_recurrent_dplr_delta_rule,
        QKV | dict(a="B T HV K unit", b="B T HV K unit", gk="B T HV K decay"),
        lambda x: _linear(x) | dict(g=x["gk"], a=x["b"], b=x["a"]),
    ),
    OpCase(
        "generalized_delta_rule",
        "Generalised delta rule (IPLR)",
        "arXiv:2503.14456",
        generalized_delta_rule.chunk_iplr_delta_rule,
        generalized_delta_rule.fused_recurrent_iplr_delta_rule,
        generalized_delta_rule.naive_recurrent_iplr_delta_rule,
        QKV | dict(a="B T HV K unit", b="B T HV K small"),
        lambda x: _linear(x) | dict(a=x["b"], b=x["a"]),
    ),
    OpCase(
        "delta_rule",
        "Delta rule",
        "arXiv:2406.06484",
        delta_rule.chunk_delta_rule,
        delta_rule.fused_recurrent_delta_rule,
        delta_rule.naive_recurrent_delta_rule,
        QKV | dict(beta="B T HV beta"),
        _delta,
    ),
    OpCase(
        "gated_delta_product",
        "Gated DeltaProduct",
        "arXiv:2502.10297",
        gated_delta_product.chunk_gated_delta_product,
        gated_delta_product.fused_recurrent_gated_delta_product,
        gated_delta_product.naive_recurrent_gated_delta_product,
        dict(
            q="B T H K",
            k="B T*n H K unit",
            v="B T*n HV V",
            g="B T HV decay",
            beta="B T*n HV beta",
        ),
        _product,
        fixed=dict(num_householder=SIZES["n"]),
    ),
    OpCase(
        "kda",
        "Kimi delta attention",
        "arXiv:2510.26692",
        kda.chunk_kda,
        kda.fused_recurrent_kda,
        kda.naive_recurrent_kda,
        QKV | dict(g="B T HV K decay", beta="B T HV beta"),
        _gated_delta,
    ),
    OpCase(
        "gdn2",
        "Gated DeltaNet 2",
        "arXiv:2412.06464",
        gdn2.chunk_gdn2,
        gdn2.fused_recurrent_gdn2,
        gdn2.naive_recurrent_gdn2,
        QKV | dict(g="B T HV K decay", b="B T HV K rate", w="B T HV V rate"),
        _gdn2,
    ),
    OpCase(
        "comba",
        "Comba",
        "arXiv:2506.02475",
        comba.chunk_comba,
        comba.fused_recurrent_comba,
        comba.naive_recurrent_comba,
        QKV | dict(p="B T H K unit", g="B T HV decay", beta="B T HV rate"),
        _comba,
    ),
    OpCase(
        "gated_oja_rule",
        "Gated Oja rule",
        "arXiv:2203.06246",
        gated_oja_rule.chunk_gated_oja_rule,
        gated_oja_rule.fused_recurrent_gated_oja_rule,
        gated_oja_rule.naive_recurrent_gated_oja_rule,
        dict(q="B T H K", k="B T H K", v="B T H V unit", gv="B T H V decay", beta="B T H beta"),
        state=dict(initial_state="N H K V"),
    ),
    OpCase(
        "precond_gated_delta_rule",
        "Preconditioned gated delta rule",
        "arXiv:2412.06464",
        precond_gated_delta_rule.chunk_precond_gated_delta_rule,
        precond_gated_delta_rule.fused_recurrent_precond_gated_delta_rule,
        precond_gated_delta_rule.naive_recurrent_precond_gated_delta_rule,
        QKV
        | dict(g_atk="B T HV decay", g="B T HV decay", beta_atk="B T HV rate", beta="B T HV rate"),
        state=dict(initial_state="N HV K V", initial_A_state="N HV K rate"),
        fixed=dict(log_atk_scale=-0.2),
        chunk_fixed=dict(use_qk_l2norm_in_kernel=False),
    ),
    OpCase(
        "precond_kda",
        "Preconditioned KDA",
        "arXiv:2510.26692",
        precond_kda.chunk_precond_kda,
        precond_kda.fused_recurrent_precond_kda,
        precond_kda.naive_recurrent_precond_kda,
        QKV
        | dict(
            g="B T HV K decay", g_atk="B T HV decay", beta_atk="B T HV rate", beta="B T HV rate"
        ),
        state=dict(initial_state="N HV K V", initial_A_state="N HV K rate"),
        fixed=dict(log_atk_scale=-0.2),
        chunk_fixed=dict(use_qk_l2norm_in_kernel=False),
    ),
    OpCase(
        "rwkv4",
        "RWKV-4",
        "arXiv:2305.13048",
        rwkv4.chunk_rwkv4,
        rwkv4.fused_recurrent_rwkv4,
        rwkv4.naive_recurrent_rwkv4,
        dict(w="D", u="D", k="B T D", v="B T D"),
        state=dict(state="N 3 1 D average"),
    ),
    OpCase(
        "mamba",
        "Mamba",
        "arXiv:2312.00752",
        mamba.chunk_mamba,
        mamba.fused_recurrent_mamba,
        mamba.naive_recurrent_mamba,
        dict(x="B T D", dt="B T D rate", A="D K negative", B="B T K", C="B T K"),
        lambda x: mamba.point(**x) | {"scale": 1.0},
        state=dict(initial_state="N D K"),
    ),
    OpCase(
        "mamba2",
        "Mamba-2",
        "arXiv:2405.21060",
        mamba2.chunk_mamba2,
        mamba2.fused_recurrent_mamba2,
        mamba2.naive_recurrent_mamba2,
        dict(x="B T HV V", dt="B T HV rate", A="HV negative", B="B T H K", C="B T H K"),
        _mamba2,
        fixed=dict(),
    ),
    OpCase(
        "mamba3",
        "Mamba-3",
        "arXiv:2405.21060",
        mamba3.chunk_mamba3,
        mamba3.fused_recurrent_mamba3,
        mamba3.naive_recurrent_mamba3,
        dict(
            x="B T H V",
            dt="B T H rate",
            A="B T H negative",
            B="B T H K",
            C="B T H K",
            trap="B T H rate",
            angles="B T H R",
        ),
        state=dict(initial_state=("N H R", "N H K V", "N H K", "N H V")),
    ),
    OpCase(
        "mamba3",
        "Mamba-3, MIMO",
        "arXiv:2405.21060",
        mamba3.chunk_mamba3,
        mamba3.fused_recurrent_mamba3,
        mamba3.naive_recurrent_mamba3,
        dict(
            x="B T H Q V",
            dt="B T H rate",
            A="B T H negative",
            B="B T H Q K",
            C="B T H Q K",
            trap="B T H rate",
            angles="B T H R",
        ),
        state=dict(initial_state=("N H R", "N H K V", "N H Q K", "N H Q V")),
    ),
    OpCase(
        "mlstm",
        "mLSTM",
        "arXiv:2405.04517",
        mlstm.chunk_mlstm,
        mlstm.fused_recurrent_mlstm,
        mlstm.naive_recurrent_mlstm,
        QKV | dict(i="B T HV", f="B T HV"),
        state=dict(initial_state=("N HV K V", "N HV K", "N HV")),
    ),
    OpCase(
        "based",
        "Based",
        "arXiv:2402.18668",
        based.chunk_based,
        based.fused_recurrent_based,
        based.naive_recurrent_based,
        QKV,
        state=dict(initial_state="N HV F V+1 positive"),
    ),
    OpCase(
        "rebased",
        "ReBased",
        "arXiv:2402.10644",
        rebased.chunk_rebased,
        rebased.fused_recurrent_rebased,
        rebased.naive_recurrent_rebased,
        QKV,
        state=dict(initial_state="N HV P V+1"),
        fixed=dict(use_normalize=False),
    ),
    OpCase(
        "mesa_net",
        "MesaNet",
        "arXiv:2506.05233",
        mesa_net.chunk_mesa_net,
        mesa_net.fused_recurrent_mesa_net,
        mesa_net.naive_mesa_net_exact,
        dict(
            q="B T H K",
            k="B T H K unit",
            v="B T H V",
            g="B T H decay",
            beta="B T H rate",
            lamb="H K positive",
        ),
        state=dict(h_kk_init="N H K K squares", h_kv_init="N H K V"),
    ),
    OpCase(
        "log_linear_attn",
        "Log-linear attention",
        "arXiv:2506.04761",
        log_linear_attn.chunk_log_linear_attn,
        log_linear_attn.fused_recurrent_log_linear_attn,
        log_linear_attn.naive_recurrent_log_linear_attn,
        QKV | dict(g="B T HV decay", level_scales="B T HV L rate"),
        state=dict(initial_state=("N HV L K V", "N count")),
    ),
    OpCase(
        "ttt",
        "TTT-linear",
        "arXiv:2407.04620",
        ttt.chunk_ttt_linear,
        ttt.fused_chunk_ttt_linear,
        ttt.naive_recurrent_ttt_linear,
        dict(q="B T H K", k="B T H K", v="B T H K", w="H K", b="H K", eta="B T H 1 small"),
        state=dict(initial_state="N H K K", initial_state_bias="N H 1 K"),
        grain=16,
    ),
    OpCase(
        "titans",
        "Titans-linear",
        "arXiv:2501.00663",
        titans.chunk_titans_linear,
        titans.chunk_titans_linear,
        titans.naive_recurrent_titans_linear,
        dict(
            q="B T H K",
            k="B T H K unit",
            v="B T H K",
            w="H K",
            b="H K",
            theta="B T H 1 rate",
            alpha="B T H 1 rate",
            eta="B T H 1 rate",
        ),
        state=dict(initial_state=("N H K K", "N H K K")),
        grain=16,
    ),
    OpCase(
        "deltaformer",
        "DeltaFormer",
        "arXiv:2505.19488",
        deltaformer.deltaformer_attn,
        deltaformer.fused_recurrent_deltaformer,
        deltaformer.naive_deltaformer_attn,
        dict(q="B T H K", k="B T H K", v="B T H V", beta="B T H rate"),
        state={},
    ),
    OpCase(
        "gated_delta_rule",
        "Gated delta rule",
        "arXiv:2412.06464",
        gated_delta_rule.chunk_gated_delta_rule,
        gated_delta_rule.fused_recurrent_gated_delta_rule,
        gated_delta_rule.naive_recurrent_gated_delta_rule,
        QKV | dict(g="B T HV decay", beta="B T HV beta"),
        _gated_delta,
    ),
]
