# SPDX-License-Identifier: MIT
"""The native kernels: every operator against fp64, every instruction set, any layout in memory, any boundaries,
several threads and processes, and what happens where they cannot run."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla._explain import explain
from fla.core.stage import use_backend
from fla.modules.convolution import causal_conv1d
from fla.ops.engine.native import library
from fla.ops.engine.native import recurrence as ops
from fla.ops.engine.native.scan import selective_scan as native_scan
from fla.ops.engine.scan import selective
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gsa import chunk_gsa
from fla.ops.mamba import chunk_mamba
from fla.ops.registry import OPS
from tests.helpers import gradients
from tests.ops import properties as P
from tests.ops.family import COLUMNS, ERASES, FAMILY, call, compare, plain, problem, run, runs_on

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))
NATIVE = [op for op in OPS if runs_on(op, "native")]
every_op = pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.title)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_the_family_is_the_torch_form(decay, erase, before):
    """Values, states and every gradient, with resets and decays of -1e4 among them."""
    x = problem(decay, erase, extreme=True)
    if before and decay == "columns":
        pytest.skip("torch's form of it has no such read either")
    options = dict(state=torch.randn(2, 4, 24, 40), l2norm=erase == "delta", read_before=before)
    want = run(plain, x, torch.float64, **options)
    compare(run(ops.chunk, x, **options), want, f"{decay} {erase}")
    with torch.no_grad():
        options["initial_state"] = options.pop("state")
        o, final = call(ops.recurrent, x, scale=0.3, **options)
    compare({"o": o, "final": final}, {n: want[n] for n in ("o", "final")}, f"{decay} {erase}")


def test_a_wrong_kernel_would_be_noticed():
    x = problem("scalar", "delta")
    want = run(plain, x, torch.float64)
    x["g"] = x["g"] * 1.0001
    with pytest.raises(AssertionError, match="is off by"):
        compare(run(ops.chunk, x), want, "scalar delta")


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budgets(op, dtype):
    with use_backend("native"):
        P.check_error_budget(op, dtype)
        if dtype == torch.float32:
            P.check_gradient_budget(op, dtype)
            P.check_batch_mates_do_not_matter(op)


@every_op
@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 63, 64, 65, 130])
def test_packed_split_and_token_by_token(op, T):
    """Any length, in one call or two, alone or packed, chunk by chunk or token by token."""
    inputs, states = op.inputs(1, T, 2, 12, 20), op.states(1, 2, 12, 20, dtype=torch.float32)
    with use_backend("native"), torch.no_grad():
        whole = op.call(op.chunk, inputs, states)
        cut = T // 3
        first, *middle = op.call(op.chunk, op.tokens(inputs, 0, cut), states)
        second, *final = op.call(op.token, op.tokens(inputs, cut, T), middle)
        split = [torch.cat([first, second], 1), *final]
        bounds = torch.tensor([0, cut, cut, T])
        packed, *_ = op.call(op.chunk, inputs, cu_seqlens=bounds)
        parts = [op.call(op.chunk, op.tokens(inputs, a, b))[0] for a, b in ((0, cut), (cut, T))]
    for a, b in [*zip(split, whole, strict=True), (packed, torch.cat(parts, 1))]:
        assert (
            (a - b).abs().max() <= 2e-5 * max(1, b.abs().max()) if b.numel() else a.shape == b.shape
        )


@pytest.mark.parametrize("isa", library.instruction_sets() if not library.MISSING else [])
def test_every_instruction_set(isa, monkeypatch):
    lib = library.library()
    number = next(i for i in range(lib.fla_isa_count()) if lib.fla_isa_name(i).decode() == isa)
    monkeypatch.setattr(library, "instruction_set", lambda: number)
    for decay, erase in FAMILY:
        x = problem(decay, erase, K=33, V=37, extreme=True)
        want = run(plain, x, torch.float64)
        compare(run(ops.chunk, x), want, f"{isa} {decay} {erase}")
        o, _ = call(ops.recurrent, x, scale=0.3)
        compare({"o": o}, {"o": want["o"]}, f"{isa} {decay} {erase} tokens")


@pytest.mark.parametrize(("decay", "erase"), [("vector", "delta"), COLUMNS])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(heads, decay, erase):
    x = problem(decay, erase, B=1, T=200, H=heads, HV=heads, K=64, V=160)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(ops.chunk, x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, y in results[0].items():
            assert torch.equal(other[name], y), name


@given(
    B=st.integers(1, 3), T=st.integers(0, 70), H=st.integers(1, 3), groups=st.integers(1, 3),
    K=st.integers(1, 40), V=st.integers(1, 70), member=st.sampled_from(FAMILY), layout=st.sampled_from(["head first", "sliced", "offset", "expanded"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_and_layout_in_memory(B, T, H, groups, K, V, member, layout):
    x = problem(*member, B, T, H, H * groups, K, V)
    want = run(plain, x, torch.float64)

    def lay(y):
        if layout == "head first":
            return y.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":  # every second channel, or head
            return torch.stack([y, torch.full_like(y, torch.nan)], -1).flatten(-2)[..., ::2]
        wide = torch.full((y.numel() + 1,), torch.nan)  # 4 bytes off every boundary
        wide[1:] = y.flatten()
        return wide[1:].view(y.shape)

    if layout == "expanded" and "beta" in x:
        x["beta"] = x["beta"][:, :1].expand_as(x["beta"])
        want = run(plain, x, torch.float64)
        o, _ = call(ops.chunk, x, scale=0.3)
        compare({"o": o}, {"o": want["o"]}, layout, 1e-5)
        return
    laid = {n: lay(y).detach() for n, y in x.items()}
    leaves = {n: y.requires_grad_() for n, y in laid.items()}
    o, final = call(ops.chunk, leaves, scale=0.3)
    compare({"o": o, "final": final} | gradients([o, final], leaves), want, layout, 1e-5)


members = st.sampled_from([*(("vector", erase) for erase in ERASES), COLUMNS])


@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6), member=members)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_boundaries(lengths, member):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x = problem(*member, B=1, T=int(bounds[-1]), K=12, V=20)
    state = torch.randn(len(lengths), 4, 12, 20)
    want = run(plain, x, torch.float64, cu_seqlens=bounds, state=state)
    compare(run(ops.chunk, x, cu_seqlens=bounds, state=state), want, f"{lengths}", 1e-5)


def scan_problem(B=2, T=130, D=40, K=5, seed=0):
    """Arguments of the engine's selective scan in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, dt, A = normal(B, T, D), normal(B, T, D).sigmoid(), -normal(D, K).exp()
    return dict(x=x, dt=dt, A=A, B=normal(B, T, K), C=normal(B, T, K))


def run_scan(function, x, dtype=torch.float32, state=None, **options):
    leaves = x if state is None else x | {"initial_state": state}
    leaves = {n: y.to(dtype).detach().requires_grad_() for n, y in leaves.items()}
    y, final = function(**leaves, **options)
    return {"y": y, "final": final} | gradients([y, final], leaves)


@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4), D=st.integers(1, 300),
    K=st.integers(1, 20), packed=st.booleans(), state=st.booleans(), sliced=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_selective_scan(lengths, D, K, packed, state, sliced):
    N, bounds = len(lengths), torch.tensor([0, *lengths]).cumsum(0)
    x = scan_problem(1, sum(lengths), D, K) if packed else scan_problem(N, lengths[0], D, K)
    options = dict(cu_seqlens=bounds) if packed else {}
    options |= dict(state=torch.randn(N, D, K)) if state else {}
    want = run_scan(selective.selective_scan, x, torch.float64, **options)
    if sliced:  # every second channel, the others NaN
        wide = {n: torch.stack([y, torch.full_like(y, torch.nan)], -1) for n, y in x.items()}
        x = {n: y.flatten(-2)[..., ::2] for n, y in wide.items()}
    compare(run_scan(native_scan, x, **options), want, "scan", 1e-5)


@pytest.mark.parametrize("isa", library.instruction_sets() if not library.MISSING else [])
def test_selective_scan_of_every_instruction_set_and_number_of_threads(isa, monkeypatch):
    number = [n.decode() for n in map(library.library().fla_isa_name, range(3))].index(isa)
    monkeypatch.setattr(library, "instruction_set", lambda: number)
    x, before = scan_problem(D=300), torch.get_num_threads()
    first = run_scan(native_scan, x)
    compare(first, run_scan(selective.selective_scan, x, torch.float64), isa)
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            assert all(torch.equal(y, first[n]) for n, y in run_scan(native_scan, x).items())
    finally:
        torch.set_num_threads(before)


def test_selective_scan_dtypes_and_operator():
    x = scan_problem(T=20)
    half = {n: y.bfloat16() for n, y in x.items()} | {"A": x["A"], "dt": x["dt"].double()}
    y, final = native_scan(**half)
    want, state = native_scan(**{n: y.float() for n, y in half.items()})
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())
    assert torch.equal(final, state)
    results = run_scan(native_scan, half, torch.bfloat16)
    assert {y.dtype for n, y in results.items() if n != "final"} == {torch.bfloat16}
    leaves = [y.requires_grad_() for y in x.values()]
    torch.library.opcheck(torch.ops.fla.native_scan, (*leaves, torch.randn(2, 40, 5), None, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_dtypes_are_read_and_rounded_to_nearest(dtype):
    x = {n: y.to(dtype) for n, y in problem("scalar", "delta").items()}
    x["g"] = x["g"].double()  # gates may be wider than q
    wide = {n: y.float() for n, y in x.items()}
    o, final = call(ops.chunk, x, scale=0.3)
    want, state = call(ops.chunk, wide, scale=0.3)
    assert o.dtype == dtype and torch.equal(o, want.to(dtype)) and torch.equal(final, state)
    special = torch.tensor(
        [0.0, -0.0, 1e-7, -3e-8, 65519.0, 65520.0, torch.inf, -torch.inf, torch.nan]
    )
    v = special.view(1, 1, 1, -1).to(dtype)  # o is v itself, in and out
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    o, _ = call(ops.chunk, dict(q=one, k=one, v=v), scale=1.0)
    torch.testing.assert_close(o, v, rtol=0, atol=0, equal_nan=True)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4), D=st.integers(1, 300),
    W=st.integers(1, 6), packed=st.booleans(), bias=st.booleans(), history=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_short_convolution(lengths, D, W, packed, bias, history, activation):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    N = len(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    x = normal(1, sum(lengths), D) if packed else normal(N, lengths[0], D)
    tensors = dict(x=x, weight=normal(D, W))
    tensors |= dict(bias=normal(D)) if bias else {}
    tensors |= dict(initial_state=normal(N, D, W)) if history else {}
    options = dict(output_final_state=True, cu_seqlens=bounds, activation=activation)
    results = {}
    for backend, dtype in (("torch", torch.float64), ("native", torch.float32)):
        leaves = {n: y.to(dtype).requires_grad_() for n, y in tensors.items()}
        y, final = causal_conv1d(**leaves, **options, backend=backend)
        results[backend] = {"y": y, "final": final} | gradients([y, final], leaves)
    compare(results["native"], results["torch"], "convolution", 1e-5)


def test_short_convolution_layouts_dtypes_and_operators():
    x, weight = torch.randn(2, 9, 40)[..., ::2], torch.randn(20, 4)
    want, _ = causal_conv1d(x.double(), weight.double(), activation="silu")
    heads = x.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (x, heads, x.contiguous()):
        y, _ = causal_conv1d(layout, weight, activation="silu", backend="native")
        compare({"y": y}, {"y": want}, "layout")
    half = x.bfloat16()
    y, state = causal_conv1d(half, weight.bfloat16(), output_final_state=True, backend="native")
    want, _ = causal_conv1d(half.float(), weight.bfloat16().float(), backend="native")
    assert torch.equal(y, want.bfloat16()) and state.dtype == torch.bfloat16
    assert torch.equal(state, half[:, -4:].mT)
    arguments = (
        x.requires_grad_(),
        weight.requires_grad_(),
        None,
        torch.randn(2, 20, 4),
        None,
        True,
    )
    torch.library.opcheck(torch.ops.fla.native_conv, arguments)


def test_registered_operators():
    x = problem("scalar", "delta", T=20)
    tensors = [x[n].requires_grad_() for n in ("q", "k", "v", "g", "beta")]
    arguments = (
        *tensors,
        None,
        None,
        None,
        torch.randn(2, 4, 24, 40),
        None,
        0.3,
        True,
        False,
        True,
    )
    torch.library.opcheck(torch.ops.fla.native_chunk, arguments)
    detached = [y.detach() for y in tensors]
    arguments = (*detached, None, None, None, None, None, 0.3, True, False)
    torch.library.opcheck(torch.ops.fla.native_tokens, arguments)
    arguments = (*detached, None, None, None, torch.randn(2, 4, 24, 40), None, 0.3, True, False)
    torch.library.opcheck(torch.ops.fla.native_tokens_, arguments)


def test_wrong_boundaries_are_refused_before_anything_is_read():
    x = problem("none", "none", B=1)
    for bad in ([0, 71], [0, 40, 30, 70], [-1, 70]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            call(ops.chunk, x, scale=1.0, cu_seqlens=torch.tensor(bad))


def _in_a_child(queue):
    x = problem("scalar", "delta")
    queue.put(call(ops.chunk, x, scale=0.3)[0].sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use():
    x = problem("scalar", "delta")
    want = call(ops.chunk, x, scale=0.3)[0].sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == want
    child.join()


def test_several_python_threads_at_once():
    problems = [problem("vector", "low rank", T=150, seed=i) for i in range(4)]
    want = [run(ops.chunk, x) for x in problems]
    got = [None] * 4

    def work(i):
        got[i] = run(ops.chunk, problems[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in b)


def test_explain_says_what_runs():
    x = torch.randn(1, 9, 8)
    assert "channels side by side" in explain(causal_conv1d, x, torch.randn(8, 4)).form
    B = torch.randn(1, 9, 4)
    assert "channels side by side" in explain(chunk_mamba, x, x.abs(), -torch.rand(8, 4), B, B).form
    q = x.view(1, 9, 2, 4)
    told = explain(chunk_gsa, q, q, q, s=q, g=-q.abs())
    assert [d.stage for d in told.decisions] == ["recurrence.columns", "recurrence.chunk"]
    assert all("chunks of 16 tokens" in d.form for d in told.decisions)
    asked = explain(chunk_gated_delta_rule, q, q, q, backend="torch")
    assert asked.rejected["native"] == "another was asked for"


def test_the_state_given_is_not_touched():
    x, state = problem("scalar", "delta", T=1), torch.randn(2, 4, 24, 40)
    kept = state.clone()
    call(ops.recurrent, x, scale=0.3, initial_state=state)
    call(ops.chunk, x, scale=0.3, initial_state=state)
    assert torch.equal(state, kept)


def test_decoding_with_and_without_gradients_agrees():
    x = problem("scalar", "delta", T=40)
    with torch.no_grad():
        want, _ = fused_recurrent_gated_delta_rule(**x, backend="native")
    x["q"].requires_grad_()
    got, _ = fused_recurrent_gated_delta_rule(**x, backend="native")
    assert got.requires_grad
    compare({"o": got.detach()}, {"o": want.double()}, "token form")


SCRIPT = """
import torch
from fla.ops import chunk_gated_delta_rule
from fla import explain
x = torch.randn(1, 20, 2, 8)
call = dict(q=x, k=x, v=x, g=-x[..., 0].abs(), beta=x[..., 0].sigmoid())
print(explain(chunk_gated_delta_rule, **call))
try:
    chunk_gated_delta_rule(**call, backend="native")
except ValueError as error:
    print("refused:", error)
print(chunk_gated_delta_rule(**call)[0].isfinite().all().item())
"""


def python(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("library_is", ["absent", "no library", "of other sources"])
def test_without_a_library_the_torch_form_runs_and_says_so(library_is, tmp_path):
    path = tmp_path / "library.so"
    if library_is == "no library":
        path.write_bytes(b"not a library")
    if library_is == "of other sources":
        (tmp_path / "other.c").write_text(
            "long fla_problem_size() { return 8; } char* fla_isa_name(int i) { return 0; }"
        )
        command = ["cc", "-shared", "-fPIC", tmp_path / "other.c", "-o", path]
        subprocess.run(command, check=True)
    text = python(SCRIPT, FLA_NATIVE_LIBRARY=str(path))
    assert "runs: torch" in text and "True" in text
    assert "not native: the native kernels are not there" in text
    assert "refused: chunk_gated_delta_rule: backend 'native' was asked for" in text
    assert "install a C++ compiler" in text


def test_an_instruction_set_this_machine_lacks_is_refused():
    text = python(SCRIPT, FLA_NATIVE_ISA="avx1024")
    assert "FLA_NATIVE_ISA is 'avx1024'; this machine runs" in text and "baseline" in text
    lib, p = library.library(), library.Problem()
    assert lib.fla_forward(ctypes.byref(p), 99, 1) == 2
    best = library.instruction_sets()[-1]
    assert f"in C++ ({best})" in python(SCRIPT, FLA_NATIVE_ISA=best)


def test_out_of_memory_is_an_error_and_nothing_else():
    """A workspace of a thread that the system cannot give."""
    script = (
        "import resource, torch\n"
        "from fla.ops.engine.native import recurrence as ops\n"
        "q, v = torch.ones(1, 1, 1, 1).expand(1, 1, 1, 60000), torch.ones(1, 1, 1, 60000)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "o = torch.empty(1)\n"
        "p, alive = ops._problem(ops.Terms(q, q, v), None, 1, ops.Switches(1.0))\n"
        "p.o, p.final_state = ops.view(v), o.data_ptr()\n"
        "ops.library.call('fla_forward', p)\n"
    )
    assert "MemoryError: fla_forward: no memory" in python(script)


def test_backward_is_native_too():
    x = {n: y.requires_grad_() for n, y in problem("scalar", "delta").items()}
    o, _ = chunk_gated_delta_rule(**x)
    names = set()
    node = [o.grad_fn]
    while node:
        now = node.pop()
        names.add(type(now).__name__)
        node += [n for n, _ in now.next_functions if n is not None]
    assert any("native_chunk" in name for name in names)


def test_a_native_backward_that_is_not_there_is_refused_where_it_was_asked_for():
    x = problem("scalar", "delta", T=5)
    x["beta"] = torch.rand(2, 5, 4, 40)  # per value channel
    want, _ = fused_recurrent_gated_delta_rule(**x, backend="torch")
    got, _ = fused_recurrent_gated_delta_rule(**x, backend="native")
    compare({"o": got}, {"o": want.double()}, "beta per channel")
    x["q"].requires_grad_()
    assert fused_recurrent_gated_delta_rule(**x)[0].requires_grad
    with pytest.raises(ValueError, match="gradients through a beta per value channel"):
        fused_recurrent_gated_delta_rule(**x, backend="native")
