# SPDX-License-Identifier: MIT
"""Norms and gates in the native kernels against torch in fp64, and what they leave to torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla import explain, use_backend
from fla.modules.activations import swiglu, swiglu_linear
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.layernorm import rms_norm
from fla.ops.engine.native import library
from fla.ops.engine.native import rows as gated

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))
FORMS = {
    "norm": lambda x, g, w, b: rms_norm(x, w, None),
    "norm and bias": lambda x, g, w, b: rms_norm(x, w, b),
    "bare norm": lambda x, g, w, b: rms_norm(x, None, None),
    "swish": lambda x, g, w, b: rms_norm_gated(x, g, w, b),
    "sigmoid": lambda x, g, w, b: rms_norm_gated(x, g, w, None, "sigmoid"),
    "swiglu": lambda x, g, w, b: swiglu(g, x),
    "swiglu and linear": lambda x, g, w, b: swiglu_linear(g, x, w[None]),
}


def problem(rows: int, D: int, layout: str = "rows", seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 2, rows, D, generator=generator, dtype=torch.float64) * 3
    if layout == "sliced":  # every second channel of rows that lie apart, the others NaN
        wide = torch.full((2, 2, rows, 2 * D), torch.nan, dtype=torch.float64)
        wide[0, ..., ::2], wide[1, ..., ::2] = x, g
        x, g = wide[..., ::2]
    if layout == "transposed":
        x, g = x.mT.contiguous().mT, g.mT.contiguous().mT
    w, b = torch.rand(2, D, generator=generator, dtype=torch.float64)
    return [x, g, w, b]


def run(form: str, inputs: list, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [y.detach().to(dtype).requires_grad_() for y in inputs]
    with use_backend(backend):
        y = FORMS[form](*leaves)
        wave = torch.linspace(-2, 2, y.numel(), dtype=torch.float64, device="cpu").view(y.shape)
        grads = torch.autograd.grad(y, leaves, wave.cos().to(dtype), allow_unused=True)
    assert y.dtype == dtype
    return [y.detach(), *(g for g in grads if g is not None)]


def check(form: str, inputs: list, dtype: torch.dtype = torch.float32) -> None:
    exact = run(form, inputs, torch.float64, "torch")
    plain, native = (run(form, inputs, dtype, backend) for backend in ("torch", "native"))
    unit = torch.finfo(dtype).eps
    for e, p, n in zip(exact, plain, native, strict=True):
        assert n.dtype == dtype and n.shape == e.shape
        budget = 3 * (p.double() - e).abs().max() + 8 * unit * max(1.0, float(e.abs().max()))
        assert (n.double() - e).abs().max() <= budget, form


@given(
    form=st.sampled_from(list(FORMS)), rows=st.integers(1, 70), D=st.integers(2, 150),
    layout=st.sampled_from(["rows", "sliced", "transposed"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_shape_layout_and_dtype(form, rows, D, layout, dtype):
    check(form, problem(rows, D, layout), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_kernel_would_be_noticed(form, monkeypatch):
    right = gated.backward
    monkeypatch.setattr(
        gated, "backward", lambda *a: [None if y is None else y * 1.001 for y in right(*a)]
    )
    with pytest.raises(AssertionError):
        check(form, problem(70, 33))


@pytest.mark.parametrize("isa", library.instruction_sets() if not library.MISSING else [])
def test_every_instruction_set_and_number_of_threads(isa, monkeypatch):
    lib, before = library.library(), torch.get_num_threads()
    number = next(i for i in range(lib.fla_isa_count()) if lib.fla_isa_name(i).decode() == isa)
    monkeypatch.setattr(library, "instruction_set", lambda: number)
    inputs = problem(150, 200)
    for form in FORMS:
        check(form, inputs)
        ours = slice("linear" in form, None)  # the output of a linear is torch's product
        results = []
        try:
            for threads in (1, 4):
                torch.set_num_threads(threads)
                results.append(run(form, inputs, torch.float32, "native")[ours])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_kernels_cannot_read_is_torchs():
    x, g, w, _ = (y.float() for y in problem(5, 8))
    narrow = g[..., :1]
    want = torch.nn.functional.rms_norm(x, (8,), w, 1e-6) * narrow.sigmoid()
    torch.testing.assert_close(rms_norm_gated(x, narrow, w, None, "sigmoid"), want)
    leaf = narrow.requires_grad_()
    swiglu_linear(leaf, x, w[None]).sum().backward()
    assert leaf.grad.shape == narrow.shape
    heads = torch.rand(5, 8)
    want = torch.nn.functional.rms_norm(x, (8,), eps=1e-6) * heads * g.sigmoid()
    torch.testing.assert_close(rms_norm_gated(x, g, heads, None, "sigmoid"), want)
    assert "do not broadcast" in gated.misfit(x, None, torch.rand(7), None)
    with pytest.raises(ValueError, match=r"weight has shape \[7\]; expected \[D=8\]"):
        rms_norm(x, torch.rand(7), None)
    assert rms_norm(x[:0], w, None).shape == (0, 5, 8)
    assert rms_norm(x.to("meta"), w.to("meta"), None).device.type == "meta"


def test_other_defaults_of_torch_change_nothing():
    inputs = problem(70, 33)
    want = run("swish", inputs, torch.float32, "native")
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        got = run("swish", inputs, torch.float32, "native")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_extremes():
    x = torch.tensor([[0.0, 0.0], [1e18, -1e18], [torch.nan, 1.0], [torch.inf, 1.0]])
    y = rms_norm(x, None, None, eps=1e-6)
    assert y[0].eq(0).all() and y[1].tolist() == [1.0, -1.0] and y[2].isnan().all()
    gate, up = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True), torch.ones(1, 3)
    swiglu_linear(gate, up, torch.ones(1, 3)).backward()
    assert gate.grad.tolist() == [[0.0, 1.0, 0.5]]
    x.requires_grad_()
    rms_norm(x[:1], None, None, eps=1e-6).sum().backward()
    assert x.grad[0].tolist() == pytest.approx([1e3, 1e3])


def test_it_is_explained_compiled_and_transformed():
    x, g, w, _ = (y.float() for y in problem(5, 8))
    calls = [(rms_norm, (x, w, None)), (rms_norm_gated, (x, g, w, None))]

    def trained(g, x, w):
        swiglu_linear(g, x.requires_grad_(), w).sum().backward()

    for function, inputs in [*calls, (swiglu, (g, x)), (trained, (g, x.clone(), w[None]))]:
        told = explain(function, *inputs)
        assert told.backend == "native" and "a pass over the rows in C++" in told.form
        with use_backend("torch"):
            assert explain(function, *inputs).backend == "torch"
    grad = torch.func.grad(lambda x: rms_norm(x, w, None).square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.rms_norm(leaf, (8,), w, 1e-5).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    form = torch.compile(rms_norm_gated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(form(x, g, w, None), rms_norm_gated(x, g, w, None))
    traced = torch.jit.trace(lambda x: rms_norm(x, w, None), x)
    torch.testing.assert_close(traced(2 * g), rms_norm(2 * g, w, None))
