# SPDX-License-Identifier: MIT
"""The Triton kernels against the torch form, values and gradients: on a GPU where there is one, else in Triton's
interpreter, which `tests/conftest.py` turns on."""

import warnings
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from fla._explain import explain
from fla.core import stage
from fla.core.stage import use_backend
from fla.layers import GatedDeltaNet
from fla.modules.convolution import causal_conv1d
from fla.ops.engine.kernels import convolution, launch, selective, support
from fla.ops.engine.kernels import operators as ops
from fla.ops.engine.kernels import scan as vector
from fla.ops.engine.recurrence import token
from fla.ops.engine.recurrence.chunk import chunk
from fla.ops.engine.recurrence.recurrence import overwrite_states
from fla.ops.engine.recurrence.stages import CHUNK
from fla.ops.engine.recurrence.terms import Point, Switches, Terms
from fla.ops.engine.scan.selective import selective_scan as plain_selective
from fla.ops.engine.scan.vector import scan as plain_scan
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gsa import chunk_gsa
from fla.ops.registry import OPS
from tests.helpers import gradients, matrix
from tests.ops import properties as P
from tests.ops.family import DECAYS, ERASES, call, compare, problem, run, runs_on

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = [op for op in OPS if runs_on(op, "triton")]
SMALL = dict(B=1, T=70, H=1, HV=2, K=20, V=24)
FEW = {
    "Gated delta rule",
    "Gated DeltaProduct",
}  # the short matrix: a plain member, several steps per token


def members(odd):
    """Every member, reading after and before the decay; the short matrix has each decay and each erase."""
    cases = product(DECAYS, ERASES, (False, True))
    turn = lambda decay, erase, before: (  # noqa: E731
        (ERASES.index(erase) + odd) % 3 == DECAYS.index(decay) and ERASES.index(erase) % 2 == before
    )
    return pytest.mark.parametrize(("decay", "erase", "before"), matrix(cases, turn))


def on_device(x):
    return {n: y.to(DEVICE) for n, y in x.items()}


@members(odd=0)
def test_the_family_is_the_torch_form(decay, erase, before):
    x = on_device(problem(decay, erase, **SMALL))
    state = torch.randn(1, 2, 20, 24).to(DEVICE)
    options = dict(state=state, l2norm=erase == "delta", read_before=before)
    want = run(chunk, x, torch.float64, **options)
    compare(run(ops.chunk, x, **options), want, f"{decay} {erase}", 1e-5)


@pytest.mark.parametrize(
    ("decay", "erase"),
    matrix(
        product(("scalar", "vector"), ERASES),
        lambda *case: case == ("vector", "delta"),
    ),
)
def test_extreme_decays(decay, erase):
    """Resets and decays of -1e4 among ordinary ones."""
    x = on_device(problem(decay, erase, **SMALL | dict(HV=1), extreme=True))
    want = run(chunk, x, torch.float64)
    compare(run(ops.chunk, x), want, f"{decay} {erase}", 1e-5)


@members(odd=1)
def test_token_by_token(decay, erase, before):
    x = on_device(problem(decay, erase, **SMALL | dict(T=14), extreme=True))
    state = torch.randn(1, 2, 20, 24).to(DEVICE)
    options = dict(scale=0.3, initial_state=state, l2norm=True, read_before=before)
    want = dict(zip(("o", "final"), call(chunk, wide(x), **options), strict=True))
    got = dict(zip(("o", "final"), call(ops.recurrent, x, **options), strict=True))
    compare(got, want, f"{decay} {erase}", 1e-5)
    o, final = call(ops.recurrent, x, **options, overwrite=True)
    assert final is state and torch.equal(state, got["final"]) and torch.equal(o, got["o"])


def wide(x):
    return {n: y.double() for n, y in x.items()}


def test_tokens_with_a_decay_of_columns_and_a_rate_per_channel():
    x = on_device(problem("vector", "delta", **SMALL | dict(T=14)))
    x["gv"], x["beta"] = -torch.rand_like(x["v"]), torch.rand_like(x["v"])
    want = call(token.recurrent, wide(x))
    got = call(ops.recurrent, x, scale=0.3)
    compare(dict(o=got[0], final=got[1]), dict(o=want[0], final=want[1]), "columns", 1e-5)


@pytest.mark.parametrize(
    ("decay", "erase", "lengths"),
    matrix(
        [
            (*member, lengths)
            for member in (("scalar", "delta"), ("vector", "low rank"))
            for lengths in ([0, 5, 0, 66], [1], [0], [64])
        ],
        lambda decay, erase, n: n == [0] or (n == [0, 5, 0, 66] and decay == "scalar"),
    ),
    ids=str,
)
def test_boundaries(decay, erase, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    x = on_device(problem(decay, erase, **SMALL | dict(T=sum(lengths))))
    options = dict(cu_seqlens=bounds, state=torch.randn(len(lengths), 2, 20, 24).to(DEVICE))
    want = run(chunk, x, torch.float64, **options)
    compare(run(ops.chunk, x, **options), want, f"{lengths} {decay}", 1e-5)


def test_a_wrong_kernel_would_be_noticed():
    x = on_device(problem("scalar", "delta", **SMALL))
    want = run(chunk, x, torch.float64)
    x["g"] = x["g"] * 1.0001
    with pytest.raises(AssertionError, match="is off by"):
        compare(run(ops.chunk, x), want, "scalar delta", 1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the problems are a CPU's")
@pytest.mark.parametrize(
    "op", matrix([(op,) for op in TRITON], lambda op: op.title in FEW), ids=lambda op: op.title
)
def test_every_operator(op):
    """Forward and gradients of the public functions, in fp32; fp16, which the interpreter has too, forward. An
    exponential in fp32 is good to 2.5 units here as on GPUs, so 4 are given."""
    with use_backend("triton"):
        P.check_error_budget(op, torch.float32, T=40, units=4)
        P.check_gradient_budget(op, torch.float32, T=40, units=4)
        P.check_error_budget(op, torch.float16, T=40)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the problems are a CPU's")
@pytest.mark.parametrize(
    "name",
    matrix(
        [("gated_delta_rule",), ("kda",), ("dplr_delta_rule",), ("gla",)],
        lambda name: name == "gla",
    ),
)
def test_gradients_in_fp16(name):
    op = next(op for op in TRITON if op.chunk.__name__ == f"chunk_{name}")
    with use_backend("triton"):
        P.check_gradient_budget(op, torch.float16, T=40, units=4)


@pytest.mark.parametrize(
    ("K", "V"), matrix([(16, 128), (33, 100), (130, 8), (256, 40)], lambda K, V: K in (33, 130))
)
def test_other_widths(K, V):
    x = on_device(problem("scalar", "delta", **SMALL | dict(K=K, V=V, T=65)))
    compare(run(ops.chunk, x), run(chunk, x, torch.float64), f"{K} {V}", 1e-5)


def test_key_channels_without_an_erase_come_in_tiles():
    x = on_device(problem("scalar", "none", **SMALL | dict(K=300, T=20)))
    state = torch.randn(1, 2, 300, 24).to(DEVICE)
    want = run(chunk, x, torch.float64, state=state)
    compare(run(ops.chunk, x, state=state), want, "300 channels", 1e-5)


@pytest.fixture
def checked(monkeypatch):
    """First uses are checked, and forgotten afterwards."""
    monkeypatch.setenv("FLA_TRITON_CHECK", "1")
    stage.forget_choices()
    yield
    monkeypatch.undo()
    stage.forget_choices()


def test_a_first_use_that_goes_wrong_is_noticed_and_replaced(monkeypatch, checked):
    x = on_device(problem("scalar", "delta", **SMALL | dict(T=20)))
    want, _ = chunk_gated_delta_rule(**x, backend="torch")
    with warnings.catch_warnings(), use_backend("triton"):
        warnings.simplefilter("error")
        o, _ = chunk_gated_delta_rule(**x)
        fused_recurrent_gated_delta_rule(**x)
    compare(dict(o=o), dict(o=want.double()), "sound", 1e-5)
    assert list(stage._checks.values()) == [None, None]

    for name, broken, said in (
        ("gradients", lambda *a: 1 / 0, r"do not run \(ZeroDivisionError"),
        ("output", lambda call, *a: torch.zeros(call.shape), "are off by 1.0e.00 .* in result 0"),
    ):
        stage.forget_choices()
        with monkeypatch.context() as patch:
            patch.setattr(launch.Call, name, broken)
            with use_backend("triton", "torch"):
                with pytest.warns(RuntimeWarning, match=said):
                    o, _ = chunk_gated_delta_rule(**x)
                assert torch.equal(o, want)
                with warnings.catch_warnings():  # it says so once
                    warnings.simplefilter("error")
                    told = explain(chunk_gated_delta_rule, **x)
            assert told.backend == "torch" and "off by" in told.rejected["triton"] + "off by"
            with pytest.raises(ValueError, match="'triton' was asked for by the call.*" + said):
                chunk_gated_delta_rule(**x, backend="triton")
            monkeypatch.setenv("FLA_TRITON_CHECK", "0")
            stage.forget_choices()
            if name == "output":
                assert not chunk_gated_delta_rule(**x, backend="triton")[0].any()
            monkeypatch.setenv("FLA_TRITON_CHECK", "1")


def test_a_first_use_under_any_default_device_and_in_inference(checked):
    x = on_device(problem("scalar", "delta", **SMALL | dict(T=20)))
    with torch.device("meta"), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        o, _ = chunk_gated_delta_rule(**x, backend="triton")
    assert o.device == x["v"].device and o.isfinite().all()


def test_a_gate_that_is_no_number_is_seen():
    x = on_device(problem("scalar", "delta", **SMALL | dict(T=20)))
    x["g"][0, 3] = float("nan")
    o, _ = chunk_gated_delta_rule(**x, backend="triton")
    assert o[0, 3:].isnan().all()  # and its chunk, whose products hold it


def test_what_captured_graphs_read_stays(monkeypatch):
    """A graph reads the places of its chunks on every replay."""
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(launch, "_captured", set())
    x = torch.zeros(1, 9, 1, 1)
    monkeypatch.setattr(launch, "_capturing", lambda x: True)
    captured = launch.cuts(x, None)
    monkeypatch.setattr(launch, "_capturing", lambda x: False)
    for T in range(10, 10 + 2 * launch.KEPT):
        launch.cuts(torch.zeros(1, T, 1, 1), None)
    assert launch.cuts(x, None) is captured and len(launch._kept) <= launch.KEPT + 1


@pytest.mark.parametrize(("amd", "precision"), [(False, "tf32"), (True, "ieee")])
def test_matrix_products_of_half_precision(monkeypatch, amd, precision):
    monkeypatch.setattr(launch, "on_amd", lambda: amd)
    q, k, v = torch.zeros(3, 1, 9, 2, 16, dtype=torch.bfloat16)
    terms, switches = Terms(q, k, v), Switches(1.0)
    assert launch.Call(terms, switches, None).kind["PRECISION"] == precision
    wide = Terms(*(x.float() for x in (q, k, v)))
    assert launch.Call(wide, switches, None).kind["PRECISION"] == "ieee"


@pytest.mark.parametrize(
    ("lengths", "W", "extras"),
    matrix(
        product([[70], [0, 2, 0, 66, 64, 1], [0]], [1, 3, 4], [(), ("bias", "history")]),
        lambda lengths, W, extras: W == 4 or (len(lengths) > 1 and extras),
    ),
    ids=str,
)
def test_short_convolution(lengths, W, extras):
    generator = torch.Generator().manual_seed(0)
    N, D = len(lengths), 70
    tensors = dict(
        x=torch.randn(1, sum(lengths), D, generator=generator),
        weight=torch.randn(D, W, generator=generator),
    )
    if extras:
        tensors["bias"] = torch.randn(D, generator=generator)
        tensors["initial_state"] = torch.randn(N, D, W, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE) if N > 1 else None
    results = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = {n: y.to(DEVICE, dtype).requires_grad_() for n, y in tensors.items()}
        activation = "silu" if W != 3 else None
        options = dict(output_final_state=True, cu_seqlens=bounds, activation=activation)
        y, final = causal_conv1d(**leaves, **options, backend=backend)
        results.append({"y": y, "final": final} | gradients([y, final], leaves))
    compare(results[1], results[0], f"convolution {lengths} {W}", 1e-5)


def test_short_convolution_of_batches_and_its_operator():
    x, weight = torch.randn(2, 66, 20, device=DEVICE), torch.randn(20, 4, device=DEVICE)
    want, _ = causal_conv1d(x.double(), weight.double(), activation="silu", backend="torch")
    got, _ = causal_conv1d(x, weight, activation="silu", backend="triton")
    compare({"y": got}, {"y": want}, "a batch", 1e-5)
    state = torch.randn(2, 20, 4, device=DEVICE)
    leaves = (x[:, :9].contiguous().requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(torch.ops.fla.triton_conv, (*leaves, None, state, None, True))


def test_a_convolution_that_goes_wrong_is_noticed_and_replaced(monkeypatch, checked):
    x, weight = torch.randn(1, 9, 20, device=DEVICE), torch.randn(20, 4, device=DEVICE)
    want, _ = causal_conv1d(x, weight, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, _ = causal_conv1d(x, weight, backend="triton")
    compare({"y": got}, {"y": want.double()}, "sound", 1e-5)
    stage.forget_choices()
    backward = convolution.Convolution.backward
    wrong = lambda *a: [2 * y for y in backward(*a)]  # noqa: E731
    monkeypatch.setattr(convolution.Convolution, "backward", wrong)
    said = "W 4, silu False are off by .* the gradient of x"
    with use_backend("triton", "torch"), pytest.warns(RuntimeWarning, match=said):
        got, _ = causal_conv1d(x, weight)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=said):
        causal_conv1d(x, weight, backend="triton")


@pytest.mark.parametrize(
    ("lengths", "D"),
    matrix(
        [([70], 70), ([0, 2, 0, 66], 70), ([0, 2, 0, 66], 6), ([0], 70)],
        lambda lengths, D: D == 6 or lengths == [0],
    ),
    ids=str,
)
def test_vector_scan(lengths, D, monkeypatch):
    """The inputs hold resets, a first and a last state; few channels come in smaller tiles, in several all the same."""
    if D < 70:
        monkeypatch.setattr(vector, "CHANNELS", 4)
    N, T = len(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1, T, D, generator=generator)
    g = -g.abs()
    g[:, 3::7] = -torch.inf
    tensors = dict(x=x, g=g, initial_state=torch.randn(N, D, generator=generator))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE) if N > 1 else None
    results = []
    for form, dtype in ((plain_scan, torch.float64), (ops.scan, torch.float32)):
        leaves = {n: y.to(DEVICE, dtype).requires_grad_() for n, y in tensors.items()}
        h, final = form(**leaves, cu_seqlens=bounds)
        results.append({"h": h, "final": final} | gradients([h, final], leaves))
    compare(results[1], results[0], f"scan {lengths}", 1e-5)
    if T == 70:
        leaves = (tensors["x"][:, :3], tensors["g"][:, :3], tensors["initial_state"])
        leaves = tuple(y.to(DEVICE).requires_grad_() for y in leaves)
        torch.library.opcheck(torch.ops.fla.triton_scan, (*leaves, None))


@pytest.mark.parametrize(
    ("lengths", "D", "K"),
    matrix(
        [([18], 70, 12), ([0, 2, 0, 17], 70, 12), ([0, 2, 0, 17], 6, 3), ([0], 70, 12)],
        lambda lengths, D, K: K == 3 or lengths == [0],
    ),
    ids=str,
)
def test_selective_scan(lengths, D, K, monkeypatch):
    """The inputs hold resets, a first and a last state; few channels come in smaller tiles, in several all the same."""
    if D < 70:
        monkeypatch.setattr(selective, "STATES", 8)
    N, T = len(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 1, T, D, generator=generator)
    B, C = torch.randn(2, 1, T, K, generator=generator)
    A = -torch.rand(D, K, generator=generator)
    A[::3] = -1e4
    tensors = dict(x=x, dt=dt.abs() + 0.1, A=A, B=B, C=C)
    tensors["initial_state"] = torch.randn(N, D, K, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE) if N > 1 else None
    results = []
    for form, dtype in ((plain_selective, torch.float64), (ops.selective_scan, torch.float32)):
        leaves = {n: y.to(DEVICE, dtype).requires_grad_() for n, y in tensors.items()}
        y, final = form(**leaves, cu_seqlens=bounds)
        results.append({"y": y, "final": final} | gradients([y, final], leaves))
    compare(results[1], results[0], f"selective scan {lengths}", 1e-5)
    if N == 1 and T:
        few = (x[:, :2, :2], tensors["dt"][:, :2, :2], A[:2], B[:, :2], C[:, :2])
        leaves = (*few, tensors["initial_state"][:, :2])
        leaves = tuple(y.to(DEVICE).requires_grad_() for y in leaves)
        torch.library.opcheck(torch.ops.fla.triton_selective, (*leaves, None))


@pytest.mark.parametrize("found", ["absent", "3.4.1"])
def test_without_a_triton_that_runs_the_fix_is_named(found, monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda name: None if found == "absent" else name)
    monkeypatch.setattr(support, "version", lambda name: found)
    said = "Triton is not installed" if found == "absent" else "Triton 3.4.1 is too old"
    monkeypatch.setattr(support, "MISSING", support._missing())
    stage.forget_choices()
    facts = problem_of(torch.device("cuda", 0))
    assert CHUNK.unavailable("triton", facts) == f"{said}; pip install 'triton>=3.7'"
    with pytest.warns(RuntimeWarning, match=said):
        assert CHUNK.choose("chunk_gated_delta_rule", None, facts) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CHUNK.choose("chunk_kda", None, facts) == "torch"  # once
    stage.forget_choices()


def problem_of(device):
    """A point of the family on a device that need not be there."""
    return Point(device, torch.float32, "scalar", "beta", False, False, False, 64, 64)


def test_registered_operators():
    x = on_device(problem("scalar", "delta", **SMALL | dict(T=3, HV=1)))
    tensors = [x[n].requires_grad_() for n in ("q", "k", "v", "g", "beta")]
    state = torch.randn(1, 1, 20, 24).to(DEVICE)
    arguments = (*tensors, None, None, state, None, 0.3, True, False)
    torch.library.opcheck(torch.ops.fla.triton_chunk, arguments)
    detached = [y.detach() for y in tensors]
    arguments = (*detached, None, None, None, None, None, 0.3, True, False)
    torch.library.opcheck(torch.ops.fla.triton_tokens, arguments)
    arguments = (*detached, None, None, None, state, None, 0.3, True, False)
    torch.library.opcheck(torch.ops.fla.triton_tokens_, arguments)


def test_compiles_without_a_break():
    x = on_device(problem("scalar", "delta", **SMALL | dict(T=20)))

    def step(x):
        return chunk_gated_delta_rule(**x, backend="triton")[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {n: y.detach().requires_grad_() for n, y in x.items()}
        o = function(leaves)
        results.append({"o": o.detach()} | gradients([o], leaves))
    assert all(torch.equal(y, results[1][n]) for n, y in results[0].items())


on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


@on_a_gpu
def test_a_decode_step_is_captured_in_a_graph():
    x = on_device(problem("scalar", "delta", B=4, T=1, H=2, HV=4, K=128, V=128))
    state = torch.randn(4, 4, 128, 128, device=DEVICE)

    def step():
        options = dict(initial_state=state, output_final_state=True)
        return fused_recurrent_gated_delta_rule(**x, **options)

    with torch.no_grad():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for y in (*x.values(), state):
            y.mul_(0.5)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
        # an overwritten state carries over from replay to replay
        kept = state.clone()
        graph = torch.cuda.CUDAGraph()
        with overwrite_states(), torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        graph.replay()
        state = kept.clone()
        for _ in range(2):
            o, state = step()
        assert torch.equal(captured[0], o) and torch.equal(captured[1], state)


@on_a_gpu
def test_a_layer_compiles_without_a_break_for_the_device():
    layer = GatedDeltaNet(hidden_size=128, num_heads=2, head_dim=64).to(DEVICE)
    x = torch.randn(2, 100, 128, device=DEVICE, requires_grad=True)
    results = []
    for form in (layer, torch.compile(layer, fullgraph=True)):
        o = form(x)[0]
        results.append({"o": o.detach()} | gradients([o], {"x": x}))
    compare(results[1], {n: y.double() for n, y in results[0].items()}, "compiled", 1e-4)


def test_what_they_cannot_do_is_said():
    x = torch.randn(1, 4, 1, 8, device=DEVICE)
    y = x.double()
    why = explain(chunk_gated_delta_rule, y, y, y).rejected
    assert why["triton"] == "fp64 is computed by torch"
    broad = torch.randn(1, 4, 1, 300, device=DEVICE)
    told = explain(chunk_gated_delta_rule, broad, broad, broad, beta=broad[..., 0])
    assert "at most 256 key" in told.rejected["triton"]
    with use_backend("triton"), pytest.raises(ValueError, match="at most 256 key channels"):
        chunk_gated_delta_rule(broad, broad, broad, beta=broad[..., 0])
    with use_backend("triton"), pytest.raises(ValueError, match="columns has no Triton kernel"):
        chunk_gsa(x, x, x, s=x, g=-x.abs())
    assert explain(chunk_gated_delta_rule, x, x, x, backend="triton").backend == "triton"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="is about machines without a GPU")
def test_a_cpu_tensor_never_meets_the_interpreter_by_itself():
    x = torch.randn(1, 4, 1, 8)
    assert explain(chunk_gated_delta_rule, x, x, x).backend != "triton"


def test_a_cpu_tensor_is_refused(no_interpreter):
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="for GPU tensors, not for cpu"):
        chunk_gated_delta_rule(x, x, x, beta=x[..., 0], backend="triton")
