# SPDX-License-Identifier: MIT
"""Functions with a gradient by hand as torch operators: `define` writes the schemas, the fake
kernels and the autograd of `torch.ops.fla.<name>` and of its gradient, `<name>_backward`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


class Schema(NamedTuple):
    """The signature of an operator and what its backward takes.

    Fields:
        inputs: the tensors that may have a gradient, as in "Tensor q, Tensor? g".
        rest: the other arguments, as in "Tensor? cu_seqlens, float scale".
        returns: number of tensors it returns; the first `differentiable` of them have gradients.
        saved: which of the returned tensors the backward takes.
        state: whether the last input is a first state. Its gradient has the shape and the dtype of
            the second result, whether it was given or not.
        saves_state: whether the backward takes that first state.
    """

    inputs: str
    rest: str = ""
    returns: int = 2
    differentiable: int = 2
    saved: tuple[int, ...] = ()
    state: bool = True
    saves_state: bool = False

    @property
    def arity(self) -> int:
        """The number of inputs."""
        return self.inputs.count(",") + 1

    @property
    def taken(self) -> int:
        """The number of inputs that the backward takes."""
        return self.arity - (self.state and not self.saves_state)

    def forward(self) -> str:
        return f"({_joined(self.inputs, self.rest)}) -> {_tensors(self.returns)}"

    def backward(self) -> str:
        grads = "Tensor d0" + "".join(f", Tensor? d{i}" for i in range(1, self.differentiable))
        saved = ", ".join(f"Tensor saved{i}" for i in self.saved)
        inputs = ", ".join(self.inputs.split(", ")[: self.taken])
        return f"({_joined(grads, saved, inputs, self.rest)}) -> {_tensors(self.arity)}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is recorded through any of the tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # a decode step asks too, and `any` takes longer
            if x is not None and x.requires_grad:
                return True
    return False


def empty_gradients(inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """An empty tensor like each input; one of size 0 for an input that is absent."""
    like = next(x for x in inputs if x is not None)
    return [like.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def define(
    name: str,
    schema: Schema,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    device_types: str | None = None,
) -> None:
    """Make `torch.ops.fla.<name>(*inputs, *rest)`, differentiable once in its inputs.

    Args:
        forward: the operator; `fake` returns the same with empty tensors.
        backward: `(*gradients of results, *saved results, *inputs, *rest)` to the gradients of all
            inputs, of any dtype, of size 0 where an input is absent.
        device_types: where it runs, as in "cpu"; everywhere if None.
    """
    kind: Any = dict(mutates_args=(), device_types=device_types)
    n, d, s = schema.arity, schema.differentiable, len(schema.saved)

    def gradient(*args: Any) -> tuple[Tensor, ...]:
        inputs = args[d + s : d + s + schema.taken]
        grads = list(backward(*args))
        for i, x in enumerate(inputs):
            grads[i] = grads[i].to(grads[i].dtype if x is None else x.dtype)
        return tuple(grads)

    def fake_gradient(*args: Any) -> tuple[Tensor, ...]:
        inputs, rest = args[d + s : d + s + schema.taken], args[d + s + schema.taken :]
        if not schema.state:
            return tuple(empty_gradients(inputs))
        rows = inputs[: n - 1]
        return *empty_gradients(rows), torch.empty_like(fake(*rows, None, *rest)[1])

    op = torch.library.custom_op(
        f"fla::{name}", lambda *args: tuple(forward(*args)), schema=schema.forward(), **kind
    )
    back = torch.library.custom_op(
        f"fla::{name}_backward", gradient, schema=schema.backward(), **kind
    )
    op.register_fake(lambda *args: tuple(fake(*args)))
    back.register_fake(fake_gradient)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        tensors, ctx.rest = inputs[:n], inputs[n:]
        ctx.dtypes = [x.dtype if _moves(x) else None for x in tensors]
        ctx.first = output[0].shape, output[0].dtype
        ctx.mark_non_differentiable(*output[d:])
        ctx.set_materialize_grads(False)
        others = [i for i, x in enumerate(ctx.rest) if isinstance(x, Tensor)]
        ctx.others, ctx.rest = others, [None if i in others else x for i, x in enumerate(ctx.rest)]
        ctx.save_for_backward(
            *(output[i] for i in schema.saved), *tensors[: schema.taken],
            *(inputs[n + i] for i in others),
        )  # fmt: skip

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved, tensors = tensors[: s + schema.taken], tensors[s + schema.taken :]
        rest = list(ctx.rest)
        for i, x in zip(ctx.others, tensors, strict=True):
            rest[i] = x
        shape, dtype = ctx.first
        first = grads[0]
        if first is None:
            first = saved[s].new_zeros(shape, dtype=dtype)
        found = call(f"{name}_backward", first, *grads[1:d], *saved, *rest)
        own = (None if t is None else g.to(t) for g, t in zip(found, ctx.dtypes, strict=True))
        return *own, *[None] * len(rest)

    op.register_autograd(differentiate, setup_context=setup_context)
    _functional[name] = _function(name, setup_context, differentiate)
    _functional[f"{name}_backward"] = _function(f"{name}_backward", lambda *context: None, _once)


def _function(name: str, setup_context: Callable[..., None], backward: Callable) -> Any:
    """An operator as an `autograd.Function` in the form that torch.func's transforms take."""
    parts = dict(forward=lambda *args: call(name, *args), setup_context=setup_context)
    methods = {key: staticmethod(part) for key, part in (parts | dict(backward=backward)).items()}
    return type(f"Functional_{name}", (torch.autograd.Function,), methods)


def _once(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("fla's operators are differentiable once")


_functional: dict[str, Any] = {}  # by operator, the form that torch.func differentiates


def call(name: str, *args: Any) -> Any:
    """`torch.ops.fla.<name>(*args)`, inside `torch.func.grad` too, whose transforms see through an
    `autograd.Function` and through no registered operator. None has a forward-mode derivative.
    """
    if not torch.compiler.is_compiling():
        refuse_forward_mode(name, *args)
        if transformed():
            return _functional[name].apply(*args)
    return getattr(torch.ops.fla, name)(*args)


def transformed() -> bool:
    """Whether tensors are those of a transform of torch.func, which have no memory of their own."""
    return torch._C._are_functorch_transforms_active()


def recomputed(form: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`form(...)`, computed again in the backward; torch.func's transforms keep it instead."""
    if transformed():
        return form(*args, **kwargs)
    return checkpoint(form, *args, use_reentrant=False, **kwargs)


def refuse_forward_mode(name: str, *args: Any) -> None:
    """Raise `NotImplementedError` where a derivative goes forward through the arguments, which a
    registered operator would drop without a word.
    """
    if transformed():
        forward = torch._C._functorch.peek_interpreter_stack().key() == TransformType.Jvp
    else:
        forward = forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        )
    if forward:
        raise NotImplementedError(
            f"fla::{name} has no forward-mode derivative; use reverse mode (torch.func.grad, vjp)"
        )


def _moves(x: Tensor | None) -> bool:
    """Whether x can have a gradient."""
    return x is not None and x.is_floating_point()
