# SPDX-License-Identifier: MIT
"""The properties every operator of the family has, as functions of an `OpCase` that raise
`AssertionError`."""

from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor

from fla.ops.engine.recurrence.equation import chunk_form, token_form
from fla.ops.registry import OpCase
from tests.helpers import assert_same, assert_within_budget, error, gradients

K, V = 12, 20


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def random_state(N: int, H: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, H, K, V, generator=torch.Generator().manual_seed(7), dtype=dtype)


def start(op: OpCase, N: int, H: int = 2, dtype: torch.dtype = torch.float64, **sizes) -> list:
    """Initial states as leaves."""
    states = op.states(N, H, K, V, dtype=dtype, **sizes)
    return [x.requires_grad_() if x.is_floating_point() else x for x in states]


def named(inputs: dict[str, Tensor], states: list[Tensor]) -> dict[str, Tensor]:
    own = {f"state {i}": x for i, x in enumerate(states) if x.is_floating_point()}
    return inputs | own


def reference(op: OpCase, inputs: dict[str, Tensor], states=None, form=token_form) -> list[Tensor]:
    """The recurrence on the operator's point of it; of an operator that is none, its loop."""
    if op.equation is None:
        # what plain torch makes of half precision: the loop without its cast to fp32
        with mock.patch("fla.ops.case.compute_dtype", lambda dtype: dtype):
            return op.call(op.naive, inputs, states)
    point = op.equation(op.without_groups(inputs))
    scale = point.pop("scale", op.fixed.get("scale", point["q"].shape[-1] ** -0.5))
    steps = point.pop("steps", 1)
    state = None if states is None else states[0]
    while state is not None and state.dim() < 4:  # a scan: K or V or both are 1
        state = state.unsqueeze(-1)
    o, final = form(**point, scale=scale, state=state)
    o = o[:, steps - 1 :: steps]
    axes = len(str(op.state["initial_state"]).split())
    return [o, final] if axes == 4 else [o[..., 0], final.flatten(axes - 1)]


def results(got: list[Tensor], want: list[Tensor], what: str, rtol: float = 1e-11) -> None:
    assert len(got) == len(want), f"{what}: {len(got)} results instead of {len(want)}"
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_same(x, y, f"{what} {f'state {i - 1}' if i else 'o'}", rtol)


def grads_equal(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    for name, grad in got.items():
        assert_same(grad, want[name], f"{what} d{name}", rtol=1e-10)


def check_page_is_the_equation(op: OpCase) -> None:
    """The page's literal loop is the recurrence."""
    inputs = op.inputs(2, 9, 3, K, V, dtype=torch.float64)
    states = start(op, 2, 3)
    results(op.call(op.naive, inputs, states), reference(op, inputs, states), f"{op.name} naive")


def check_forms_agree(op: OpCase, T: int, HV: int = 2, chunk_size: int | None = None) -> None:
    """Chunk, token and both generic forms: outputs, states and every gradient, in fp64."""
    inputs = leaves(op.inputs(2, T, 2, K, V, HV=HV, dtype=torch.float64))
    states = start(op, 2, HV=HV)
    want = reference(op, inputs, states)
    want_grads = gradients(want, named(inputs, states))
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    forms = {
        "chunk": op.call(op.chunk, inputs, states, **options),
        "token": op.call(op.token, inputs, states),
    }
    if op.equation is not None:
        forms["generic chunk"] = reference(op, inputs, states, chunk_form)
    for form, got in forms.items():
        results(got, want, f"{op.name} {form} T={T}")
        grads_equal(gradients(got, named(inputs, states)), want_grads, f"{op.name} {form} T={T}")


def check_split_is_whole(op: OpCase, T: int, cut: int) -> None:
    """The first part, then the rest from its state, equals the whole: values and gradients."""
    inputs = leaves(op.inputs(2, T, 2, K, V, dtype=torch.float64))
    states = start(op, 2)
    cut -= cut % op.grain
    whole = op.call(op.chunk, inputs, states)
    first, *middle = op.call(op.chunk, op.tokens(inputs, 0, cut), states)
    second, *final = op.call(op.chunk, op.tokens(inputs, cut, T), middle)
    split = [torch.cat([first, second], 1), *final]
    results(split, whole, f"{op.name} split at {cut}")
    leaf = named(inputs, states)
    grads_equal(gradients(split, leaf), gradients(whole, leaf), f"{op.name} split at {cut}")


def check_packed_is_separate(
    op: OpCase, lengths: list[int], function=None, chunk_size: int = 64
) -> None:
    """A packed row equals its sequences run one by one: values, states and gradients."""
    function = function or op.chunk
    options = {"chunk_size": chunk_size} if function is op.chunk and chunk_size != 64 else {}
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = leaves(op.inputs(1, bounds[-1], 2, K, V, dtype=torch.float64))
    states = start(op, len(lengths))
    packed = op.call(function, inputs, states, cu_seqlens=torch.tensor(bounds), **options)
    rows = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        own = [x[i : i + 1] for x in states]
        rows.append(op.call(function, op.tokens(inputs, begin, end), own, **options))
    outs, *finals = zip(*rows, strict=True)
    separate = [torch.cat(outs, 1), *(torch.cat(x) for x in finals)]
    results(packed, separate, f"{op.name} packed {lengths}")
    leaf = named(inputs, states)
    grads_equal(gradients(packed, leaf), gradients(separate, leaf), f"{op.name} packed {lengths}")


def check_batch_mates_do_not_matter(op: OpCase) -> None:
    """A sequence's bits are the same alone and in a batch, whatever its place there."""
    inputs, states = op.inputs(3, 70, 2, K, V), op.states(3, 2, K, V, dtype=torch.float32)
    order = torch.tensor([2, 0, 1])

    def rows(index) -> list[Tensor]:
        part = {n: x[index] if "B" in op.axes(n) else x for n, x in inputs.items()}
        return op.call(op.chunk, part, [x[index] for x in states])

    batch, shuffled, alone = rows(slice(0, 3)), rows(order), rows(slice(1, 2))
    for i, (x, y, z) in enumerate(zip(batch, shuffled, alone, strict=True)):
        assert torch.equal(x[order], y), f"{op.name} result {i} depends on the batch order"
        assert torch.equal(x[1:2], z), f"{op.name} result {i} depends on the batch-mates"


def check_error_budget(op: OpCase, dtype: torch.dtype, T: int = 130, units: int = 1) -> None:
    """At most twice the error of the plain recurrence in the same dtype, both against fp64;
    states in fp32."""
    inputs = op.inputs(1, T, 2, 32, 24, dtype=dtype)
    exact = reference(op, {n: x.double() for n, x in inputs.items()})
    plain = reference(op, inputs)
    for form in (op.chunk, op.token):
        o, *states = op.call(form, inputs)
        assert o.dtype == dtype and all(x.dtype in (torch.float32, torch.long) for x in states)
        for i, x in enumerate([o, *(x for x in states if x.is_floating_point())]):
            assert_within_budget(x, plain[i], exact[i], f"{op.name} {dtype} result {i}", units)


def dense_deltaformer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> list[Tensor]:
    """DeltaFormer in one block: one system for the u of all tokens."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    T, scale = q.shape[2], q.shape[3] ** -0.5
    past = torch.ones(T, T, dtype=torch.bool).tril(-1)
    past[0, 0] = True  # the first token reads nothing: its row is masked again
    weights = (scale * q @ k.mT).masked_fill(~past, -torch.inf).softmax(-1).tril(-1)
    weights = beta.unsqueeze(-1) * weights
    u = torch.linalg.solve_triangular(weights, v, upper=False, unitriangular=True)
    scores = (scale * q @ k.mT).masked_fill(torch.ones_like(past).triu(1), -torch.inf)
    return [(scores.softmax(-1) @ u).transpose(1, 2)]


def plain_forms(op: OpCase, dtype: torch.dtype) -> list:
    """What plain torch makes of an operator: token by token, and in blocks, where rounding is met in another order."""
    forms = [lambda x: reference(op, x)]
    if dtype == torch.float32 and op.equation is not None:  # LAPACK stops there
        forms.append(lambda x: reference(op, x, form=chunk_form))
    if dtype == torch.float32 and op.name == "deltaformer":
        forms.append(lambda x: dense_deltaformer(**x))
    return forms


def check_gradient_budget(op: OpCase, dtype: torch.dtype, T: int = 130, units: int = 1) -> None:
    """The same budget for every gradient of the chunk form; plain torch is the worse of its forms."""
    for name, (off, budget) in gradient_errors(op, dtype, T, units).items():
        assert off <= budget, (
            f"{op.name} {dtype} d{name}: error {off:.2e} over its budget {budget:.2e}"
        )


def gradient_errors(
    op: OpCase, dtype: torch.dtype, T: int, units: int
) -> dict[str, tuple[float, float]]:
    """The error and the budget of every gradient."""
    inputs = op.inputs(1, T, 2, 32, 24, dtype=dtype)

    def grads(inputs: dict[str, Tensor], run) -> dict[str, Tensor]:
        inputs = leaves(inputs)
        return gradients([run(inputs)[0]], inputs)

    exact = grads({n: x.double() for n, x in inputs.items()}, lambda x: reference(op, x))
    plains = [grads(inputs, form) for form in plain_forms(op, dtype)]
    found = {}
    for name, grad in grads(inputs, lambda x: op.call(op.chunk, x)).items():
        assert grad.dtype == dtype
        worst = max(error(plain[name], exact[name]) for plain in plains)
        budget = 2 * worst + units * torch.finfo(dtype).eps * exact[name].abs().max().item()
        found[name] = error(grad, exact[name]), budget
    return found


def check_strides_do_not_matter(op: OpCase) -> None:
    """Slices, transposes and expanded gates give what contiguous copies give."""
    inputs = op.inputs(2, 70, 2, K, V, dtype=torch.float64)
    gates = [n for n, spec in op.tensors.items() if spec.endswith(("decay", "beta", "rate"))]
    inputs |= {n: x[:, :1].expand_as(x) for n, x in inputs.items() if n in gates}
    odd = {}
    for name, x in inputs.items():
        wide = torch.stack([x, x], -1)
        odd[name] = x if name in gates else wide[..., 0]
        assert not odd[name].is_contiguous()
    plain = {n: x.contiguous() for n, x in inputs.items()}
    for form in (op.chunk, op.token):
        results(op.call(form, odd), op.call(form, plain), f"{op.name} strided")
