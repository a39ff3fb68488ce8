# SPDX-License-Identifier: MIT
"""The properties every operator of the family has, as functions of an `OpCase` that raise
`AssertionError`."""

from itertools import pairwise

import torch
from torch import Tensor

from fla.ops.engine.recurrence import chunk_form, token_form
from fla.ops.registry import OpCase
from tests.helpers import assert_same, assert_within_budget, error, gradients

K, V = 12, 20


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def random_state(N: int, H: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, H, K, V, generator=torch.Generator().manual_seed(7), dtype=dtype)


def expand_groups(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q and k repeated to the value heads: the meaning of grouped value heads."""
    groups = inputs["v"].shape[2] // inputs["q"].shape[2]
    return {n: x.repeat_interleave(groups, dim=2) if n in "qk" else x for n, x in inputs.items()}


def reference(op: OpCase, inputs: dict[str, Tensor], form=token_form) -> tuple[Tensor, Tensor]:
    inputs = expand_groups(inputs)
    return form(
        inputs["q"],
        scale=inputs["q"].shape[-1] ** -0.5,
        state=inputs["initial_state"],
        **op.on_equation(inputs),
    )


def call(function, op: OpCase, inputs: dict[str, Tensor], **kwargs) -> list[Tensor]:
    return list(function(**inputs, output_final_state=True, **op.fixed, **kwargs))


def check_page_is_the_equation(op: OpCase) -> None:
    """The page's literal loop is the recurrence."""
    inputs = op.inputs(2, 9, 3, K, V, dtype=torch.float64) | {"initial_state": random_state(2, 3)}
    for got, want, what in zip(
        op.naive(**inputs, output_final_state=True),
        reference(op, inputs),
        ("o", "state"),
        strict=True,
    ):
        assert_same(got, want, f"{op.name} naive {what}")


def check_forms_agree(op: OpCase, T: int, HV: int = 2, chunk_size: int | None = None) -> None:
    """Chunk, token and both generic forms: outputs, states and every gradient, in fp64."""
    H = 2
    inputs = leaves(
        op.inputs(2, T, H, K, V, HV=HV, dtype=torch.float64)
        | {"initial_state": random_state(2, HV)}
    )
    want = list(reference(op, inputs))
    want_grads = gradients(want, inputs)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    results = {
        "chunk": call(op.chunk, op, inputs, **options),
        "token": call(op.token, op, inputs),
        "generic chunk": list(reference(op, inputs, chunk_form)),
    }
    for form, got in results.items():
        for x, y, what in zip(got, want, ("o", "state"), strict=True):
            assert_same(x, y, f"{op.name} {form} T={T} {what}")
        for name, grad in gradients(got, inputs).items():
            assert_same(grad, want_grads[name], f"{op.name} {form} T={T} d{name}", rtol=1e-10)


def check_split_is_whole(op: OpCase, T: int, cut: int) -> None:
    """The first part, then the rest from its state, equals the whole: values and gradients."""
    inputs = leaves(
        op.inputs(2, T, 2, K, V, dtype=torch.float64) | {"initial_state": random_state(2, 2)}
    )
    state = inputs["initial_state"]
    tokens = {n: x for n, x in inputs.items() if n != "initial_state"}
    whole = call(op.chunk, op, inputs)
    outs = []
    for part in (slice(0, cut), slice(cut, T)):
        o, state = call(
            op.chunk, op, {n: x[:, part] for n, x in tokens.items()}, initial_state=state
        )
        outs.append(o)
    split = [torch.cat(outs, 1), state]
    grads = gradients(whole, inputs)
    for x, y, what in zip(split, whole, ("o", "state"), strict=True):
        assert_same(x, y, f"{op.name} split at {cut} {what}")
    for name, grad in gradients(split, inputs).items():
        assert_same(grad, grads[name], f"{op.name} split at {cut} d{name}", rtol=1e-10)


def check_packed_is_separate(
    op: OpCase, lengths: list[int], function=None, chunk_size: int = 64
) -> None:
    """A packed row equals its sequences run one by one: values, states and gradients."""
    function = function or op.chunk
    options = {"chunk_size": chunk_size} if function is op.chunk and chunk_size != 64 else {}
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    N = len(lengths)
    inputs = leaves(
        op.inputs(1, bounds[-1], 2, K, V, dtype=torch.float64)
        | {"initial_state": random_state(N, 2)}
    )
    packed = call(function, op, inputs, cu_seqlens=torch.tensor(bounds), **options)
    outs, states = [], []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        row = {n: x[:, begin:end] for n, x in inputs.items() if n != "initial_state"}
        o, state = call(
            function, op, row | {"initial_state": inputs["initial_state"][i : i + 1]}, **options
        )
        outs.append(o)
        states.append(state)
    separate = [torch.cat(outs, 1), torch.cat(states)]
    want = gradients(separate, inputs)
    for x, y, what in zip(packed, separate, ("o", "state"), strict=True):
        assert_same(x, y, f"{op.name} packed {lengths} {what}")
    for name, grad in gradients(packed, inputs).items():
        assert_same(grad, want[name], f"{op.name} packed {lengths} d{name}", rtol=1e-10)


def check_batch_mates_do_not_matter(op: OpCase) -> None:
    """A sequence's bits are the same alone and in a batch, whatever its place there."""
    inputs = op.inputs(3, 70, 2, K, V) | {"initial_state": random_state(3, 2, torch.float32)}
    batch = call(op.chunk, op, inputs)
    order = torch.tensor([2, 0, 1])
    shuffled = call(op.chunk, op, {n: x[order] for n, x in inputs.items()})
    alone = call(op.chunk, op, {n: x[1:2] for n, x in inputs.items()})
    for x, y, z, what in zip(batch, shuffled, alone, ("o", "state"), strict=True):
        assert torch.equal(x[order], y), f"{op.name} {what} depends on the batch order"
        assert torch.equal(x[1:2], z), f"{op.name} {what} depends on the batch-mates"


def check_error_budget(op: OpCase, dtype: torch.dtype, T: int = 130) -> None:
    """At most twice the error of the plain recurrence in the same dtype, both against fp64;
    states in fp32."""
    inputs = op.inputs(1, T, 2, 32, 24, dtype=dtype)
    exact_in = {n: x.double() for n, x in inputs.items()}
    zero = {"initial_state": None}
    exact = reference(op, exact_in | zero)
    plain = reference(op, inputs | zero)
    for form in (op.chunk, op.token):
        o, state = form(**inputs, output_final_state=True, **op.fixed)
        assert o.dtype == dtype and state.dtype == torch.float32
        assert_within_budget(o, plain[0], exact[0], f"{op.name} {form.__name__} {dtype} o")
        assert_within_budget(state, plain[1], exact[1], f"{op.name} {form.__name__} {dtype} state")


def check_gradient_budget(op: OpCase, dtype: torch.dtype, T: int = 130) -> None:
    """The same budget for every gradient of the chunk form; plain torch is the worse of the two plain forms, since
    rounding is met in another order chunk by chunk than token by token.
    """
    inputs = op.inputs(1, T, 2, 32, 24, dtype=dtype)
    zero = {"initial_state": None}

    def grads(inputs: dict[str, Tensor], run) -> dict[str, Tensor]:
        inputs = leaves(inputs)
        return gradients([run(inputs)[0]], inputs)

    exact = grads({n: x.double() for n, x in inputs.items()}, lambda x: reference(op, x | zero))
    forms = (
        [token_form, chunk_form] if dtype == torch.float32 else [token_form]
    )  # LAPACK stops there
    plains = [grads(inputs, lambda x, f=form: reference(op, x | zero, f)) for form in forms]
    for name, grad in grads(inputs, lambda x: op.chunk(**x, **op.fixed)).items():
        assert grad.dtype == dtype
        plain = max((p[name] for p in plains), key=lambda p, e=exact[name]: error(p, e))
        assert_within_budget(grad, plain, exact[name], f"{op.name} {dtype} d{name}")


def check_strides_do_not_matter(op: OpCase) -> None:
    """Slices, transposes and expanded gates give what contiguous copies give."""
    inputs = op.inputs(2, 70, 2, K, V, dtype=torch.float64)
    inputs |= {n: x[:, :1].expand_as(x) for n, x in inputs.items() if n in op.gates}
    odd = {}
    for name, x in inputs.items():
        if name in op.gates:
            odd[name] = x
        else:
            odd[name] = (
                torch.cat([x, x], -1)
                .transpose(1, 2)
                .contiguous()
                .transpose(1, 2)[..., : x.shape[-1]]
            )
        assert not odd[name].is_contiguous()
    plain = {n: x.contiguous() for n, x in inputs.items()}
    for form in (op.chunk, op.token):
        for x, y, what in zip(
            call(form, op, odd), call(form, op, plain), ("o", "state"), strict=True
        ):
            assert_same(x, y, f"{op.name} {form.__name__} strided {what}")
