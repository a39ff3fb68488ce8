# SPDX-License-Identifier: MIT
"""Problems for every member of the engine's family, how to run one with all its gradients, and how to compare."""

from functools import cache

import torch

from fla.core.stage import STAGES, watch
from fla.ops.engine.recurrence.chunk import chunk
from fla.ops.engine.recurrence.columns import chunk_columns
from fla.ops.engine.recurrence.terms import Switches, Terms
from fla.ops.registry import OPS
from tests.helpers import error, gradients

DECAYS, ERASES = ("none", "scalar", "vector"), ("none", "delta", "delta with b", "low rank")
COLUMNS = ("columns", "none")
FAMILY = [*((decay, erase) for decay in DECAYS for erase in ERASES), COLUMNS]


def problem(decay, erase, B=2, T=70, H=2, HV=4, K=24, V=40, seed=0, extreme=False):
    """Arguments of the engine's chunk form in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def unit(*shape):
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    x = dict(q=normal(B, T, H, K), k=unit(B, T, H, K), v=normal(B, T, HV, V))
    if decay != "none":
        channels = dict(scalar=[], vector=[K], columns=[V])[decay]
        g = x["gv" if decay == "columns" else "g"] = -normal(B, T, HV, *channels).abs()
        if extreme:
            g[:, 3::7], g[:, 5::11] = -torch.inf, -1e4
    if erase.startswith("delta"):
        x["beta"] = normal(B, T, HV).sigmoid()
    if erase in ("delta with b", "low rank"):
        x["b"] = unit(B, T, HV, K)
    if erase == "low rank":
        x["a"] = -x["b"] * normal(B, T, HV, 1).sigmoid()
    return x


def call(
    form, x, scale=0.3, initial_state=None, cu_seqlens=None, l2norm=False, read_before=False, **more
):
    """A form of the engine on terms by name."""
    switches = Switches(scale, l2norm, read_before)
    return form(Terms(**x), switches, initial_state, cu_seqlens, **more)


def run(form, x, dtype=torch.float32, **options):
    """o, the final state and all gradients, by name."""
    x = {n: y.to(dtype).requires_grad_() for n, y in x.items()}
    state = options.pop("state", None)
    leaf = dict(x) if state is None else x | {"state": state.to(dtype).requires_grad_()}
    o, final = call(form, x, initial_state=leaf.get("state"), **options)
    return {"o": o, "final": final} | gradients([o, final], leaf)


def plain(terms, switches, initial_state=None, cu_seqlens=None):
    """The chunk form in torch; with gv, whose heads it wants alike, that of columns."""
    if terms.gv is None:
        return chunk(terms, switches, initial_state, cu_seqlens)
    groups = terms.gv.shape[2] // terms.q.shape[2]
    terms = terms._replace(
        **{n: getattr(terms, n).repeat_interleave(groups, 2) for n in ("q", "k")}
    )
    return chunk_columns(terms, switches, initial_state, cu_seqlens)


@cache
def stages(title):
    """The stages that the chunk and the token form of an operator leave to the choice of a backend."""
    op = next(op for op in OPS if op.title == title)
    inputs = op.inputs(1, 4, 1, 4, 4)
    with watch() as seen, torch.no_grad():
        op.call(op.chunk, inputs)
        op.call(op.token, inputs)
    return [STAGES[d.stage] for d in seen if "backend argument" not in d.why]


def runs_on(op, backend):
    """Whether all stages of an operator have a form in a backend."""
    return all(backend in stage.forms for stage in stages(op.title))


def compare(got, want, what, tolerance=3e-6):
    """Within 25 units of fp32 rounding of the largest value, as plain fp32 is; small and odd shapes are given 1e-5."""
    for name, y in want.items():
        if not y.numel():
            assert got[name].shape == y.shape
            continue
        assert got[name].isfinite().all(), f"{what}: {name} is not finite"
        close = error(got[name], y) <= tolerance * max(1e-3, y.abs().max().item())
        assert close, f"{what}: {name} is off by {error(got[name], y):.2e} of {y.abs().max():.2e}"
