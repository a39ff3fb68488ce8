# SPDX-License-Identifier: MIT
"""What `explain` says is what ran: for every stage and backend, with kernels counted where they start."""

import warnings

import pytest
import torch

import fla
from fla._explain import explain
from fla.core import selfcheck, stage
from fla.core.stage import STAGES, Facts, Form, Stage, Warned, use_backend, watch
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.modules import activations, fused_linear_divergence
from fla.modules.losses import Divergence
from fla.ops import block_sparse_attention as sparse
from fla.ops import chunk_gated_delta_rule, dilated_attention, ttt
from fla.ops.engine.native import library
from fla.ops.registry import OPS
from tests.helpers import matrix

CPU = torch.device("cpu")
X = torch.randn(5, 8)


def public_calls():
    """A call of the public functions that reach the stages without a small problem of their own."""
    q = torch.randn(1, 6, 2, 4)
    pattern = sparse.local_window(6, 2, block_size=2)
    found = {
        "rms_norm": lambda: fla.modules.layernorm.rms_norm(X, None, None),
        "swiglu with gradients": lambda: activations.swiglu(X, X),
        "swiglu gradient": lambda: (
            activations.swiglu_linear(X.clone().requires_grad_(), X, torch.randn(3, 8))
            .sum()
            .backward()
        ),
        "dilated_attention": lambda: dilated_attention.dilated_attention(
            q, q, q, segment_lengths=[4], dilation_rates=[1]
        ),
        "block_sparse_attention": lambda: sparse.block_sparse_attention(q, q, q, pattern),
    }
    for op in OPS:
        for form in (op.chunk, op.token):
            inputs = op.inputs(1, 6, 2, 4, 4)
            name = {
                "chunk_titans_linear": "titans",
                "chunk_ttt_linear": "ttt",
                "deltaformer_attn": "deltaformer",
            }
            name |= {
                "fused_recurrent_mesa_net": "mesa_net.token",
                "chunk_log_linear_attn": "log_linear_attn",
            }
            key = name.get(getattr(form, "__name__", ""))
            if key:
                found[key] = lambda op=op, form=form, inputs=inputs: op.call(form, inputs)
    return found


def facts_of(name):
    return STAGES[name].example(CPU, torch.float32)


@pytest.fixture
def started(monkeypatch):
    """Counts the kernels that start, by language."""
    counts = {"native": 0, "triton": 0}
    call = library.call

    def native(*args):
        counts["native"] += 1
        return call(*args)

    monkeypatch.setattr(library, "call", native)
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return counts
    run = GridExecutor.__call__

    def triton(*args, **kwargs):
        counts["triton"] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", triton)
    return counts


def cases():
    public_calls()  # imports all pages
    return [(name, backend) for name, row in sorted(STAGES.items()) for backend in row.forms]


def skip_what_is_not_here(backend):
    if backend == "native" and library.MISSING:
        pytest.skip(library.MISSING)
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("counts starts in the interpreter")


def call_of(name, backend):
    row = STAGES[name]
    if row.problem is not None:
        arguments = row.problem(facts_of(name))
        return lambda: row("a test", backend, *arguments)

    def run():
        with (
            use_backend(*([backend] if backend in stage.BACKENDS else []))
            if backend != "flex"
            else watch()
        ):
            if backend == "flex":
                q = torch.randn(1, 6, 2, 4)
                row("a test", "flex", q, q, q, sparse.local_window(6, 2, block_size=2), 0.5)
            else:
                public_calls()[name]()

    return run


@pytest.mark.parametrize(("name", "backend"), cases())
def test_explain_says_what_ran(name, backend, started):
    skip_what_is_not_here(backend)
    with watch() as seen:
        call_of(name, backend)()
    mine = [d for d in seen if d.stage == name]
    assert mine and {d.backend for d in mine} == {backend}
    assert all(d.form == str(STAGES[name].forms[backend]) for d in mine)
    for language, count in started.items():
        assert (count > 0) == (language == backend), f"{name} on {backend}: {started}"


checked = [name for name, row in sorted(STAGES.items()) if "triton" in row.forms]


@pytest.mark.parametrize("name", checked)
def test_after_a_failed_check_the_truth_is_told(name, started, monkeypatch):
    """An explicit Triton raises and starts nothing; a preference warns once, and torch runs and is named."""
    skip_what_is_not_here("triton")
    monkeypatch.setenv("FLA_TRITON_CHECK", "1")
    monkeypatch.setattr(
        selfcheck, "difference", lambda *a: "are off by 1.0e+00 of the largest value"
    )
    stage.forget_choices()
    row, arguments = STAGES[name], STAGES[name].problem(facts_of(name))
    with pytest.raises(
        ValueError, match=r"'triton' was asked for by the call's .*are off by 1.0e\+00"
    ):
        row("a test", "triton", *arguments)
    with use_backend("triton", "torch"):
        with (
            pytest.warns(RuntimeWarning, match="runs another form than Triton's.*are off by"),
            watch() as seen,
        ):
            row("a test", None, *arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row("a test", None, *arguments)
    assert [d.backend for d in seen] == ["torch"]
    assert "are off by" in dict(seen[0].rejected)["triton"]
    assert started["triton"] == 0
    monkeypatch.undo()
    stage.forget_choices()


# the associative scans take the interpreter ten seconds
@pytest.mark.parametrize(
    "name", matrix([(n,) for n in checked], lambda name: not name.startswith("scan."))
)
def test_kernels_pass_their_own_check(name, monkeypatch):
    skip_what_is_not_here("triton")
    monkeypatch.setenv("FLA_TRITON_CHECK", "1")
    stage.forget_choices()
    with torch.inference_mode():  # as under generate()
        assert STAGES[name].unavailable("triton", facts_of(name)) is None
    assert len(stage._checks) == 1
    stage.forget_choices()


def test_a_check_finds_a_wrong_gradient():
    good = lambda x, y: x * y  # noqa: E731

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return grad * y, 1.01 * grad * x

    call = (torch.randn(3), torch.randn(3))
    assert selfcheck.difference(good, good, call, True) is None
    found = selfcheck.difference(lambda x, y: Wrong.apply(x, y), good, call, True)
    assert found.endswith("of the largest value in the gradient of y")
    assert selfcheck.difference(lambda x, y: Wrong.apply(x, y), good, call, False) is None


def test_a_stage_of_a_model_is_told_by_name():
    config = GatedDeltaNetConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=8
    )
    told = explain(GatedDeltaNetForCausalLM(config), torch.ones(1, 5, dtype=torch.long))
    names = [d.stage for d in told.decisions]
    assert {"recurrence.chunk", "convolution", "rms_norm", "rms_norm_gated"} <= set(names)
    assert "recurrence.chunk runs: " in str(told)


def test_names_are_an_order_of_preference(monkeypatch, no_interpreter):
    x = torch.randn(1, 4, 1, 8)
    with use_backend("triton", "torch"):
        told = explain(chunk_gated_delta_rule, x, x, x)
    assert told.backend == "torch" and "for GPU tensors" in told.rejected["triton"]
    monkeypatch.setenv("FLA_BACKEND", "triton,torch")
    assert explain(chunk_gated_delta_rule, x, x, x).backend == "torch"
    monkeypatch.setenv("FLA_BACKEND", "triton")
    with pytest.raises(ValueError, match="environment variable FLA_BACKEND"):
        chunk_gated_delta_rule(x, x, x)
    with pytest.raises(ValueError, match="backend is 'cpu'"), use_backend("torch", "cpu"):
        pass


def test_a_slower_choice_is_warned_of_once():
    missing = Form(lambda x: x, "fast", (lambda facts: Warned("it is not installed"),))
    row = Stage(
        "a test's",
        {"triton": missing, "torch": Form(lambda x: x, "slow")},
        lambda x: Facts(torch.device("cuda"), x.dtype),
    )
    try:
        with pytest.warns(RuntimeWarning, match="a test's runs another form.*it is not installed"):
            row("a test", None, X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row("a test", None, X)
    finally:
        del STAGES["a test's"]
        stage.forget_choices()


def test_a_divergence_without_a_kernel_says_so():
    row, kind = STAGES["linear_divergence"], Divergence("mse")
    reason = row.unavailable("triton", fused_linear_divergence._facts(kind, X, X, None))
    assert reason and ("no kernel for mse" in reason or "GPU" in reason)
    assert ttt.MINI_BATCHES.forms.keys() == {"torch"}
