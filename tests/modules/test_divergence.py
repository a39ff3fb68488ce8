# SPDX-License-Identifier: MIT
"""The chunked linear divergence against its formulas under plain autograd in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fla.core.stage import use_backend
from fla.modules import FusedKLDivLoss
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import DIVERGENCES, Divergence, Head, TopK
from tests.helpers import assert_same, gradients, matrix
from tests.ops.family import compare

M, D, V = 11, 6, 17


def make(V_teacher=V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(x=(M, D), weight=(V, D), bias=(V,), hidden=(M, 4), other=(V_teacher, 4))
    x = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in sizes.items()}
    return x, torch.randint(min(V, V_teacher), (M,), generator=generator)


def literal(x, labels, mask, o):
    """The module's equations, whole matrices at once."""
    z = F.linear(x["x"], x["weight"], x["bias"]) * o.logit_scale
    zt = F.linear(x["hidden"], x["other"])
    if o.logit_softcapping:
        z = o.logit_softcapping * torch.tanh(z / o.logit_softcapping)
    width = min(z.shape[1], zt.shape[1])
    z, zt = z[:, :width], zt[:, :width]
    lq, lp = (z / o.temperature).log_softmax(-1), (zt / o.temperature).log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    lm = (o.beta * lp.exp() + (1 - o.beta) * lq.exp()).log()
    rows = (
        dict(
            forward_kl=lambda: kl(lp, lq),
            reverse_kl=lambda: kl(lq, lp),
            jsd=lambda: o.beta * kl(lp, lm) + (1 - o.beta) * kl(lq, lm),
            mse=lambda: (z - zt).square().mean(-1) / o.temperature**2,
        )[o.kind]()
        * o.temperature**2
    )
    kept = mask & (labels != -100)
    ce = F.cross_entropy(z, labels, ignore_index=-100, reduction="none")
    total = o.weight * rows + o.ce_weight * ce
    entropies = [(-(y.exp() * y).sum(-1)) for y in (lp, lq)]
    agree = (z.argmax(-1) == zt.argmax(-1)).double()
    return total[kept].mean(), [y[kept].mean() for y in (rows, ce, *entropies, agree)]


OPTIONS = [
    dict(),
    dict(temperature=2.0, weight=0.7),
    dict(ce_weight=0.4, temperature=1.5),
    dict(logit_softcapping=3.0, logit_scale=0.8, beta=0.2),
]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("V_teacher", [V, 13, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_divergence(kind, options, V_teacher):
    """Chunks hold one to all rows, vocabularies may differ, and a mask and labels leave rows out."""
    x, labels = make(V_teacher)
    labels[2], mask = -100, torch.arange(M) != 5
    leaves = {n: x[n].requires_grad_() for n in ("x", "weight", "bias")}
    want, metrics = literal(x, labels, mask, Divergence(kind, **options))
    expected = gradients([want], leaves)
    for budget in (1, 6 * 8 * 20 * 4, 1 << 28):
        got, found = fused_linear_divergence(
            x["x"], Head(x["weight"], x["bias"]), (x["hidden"], Head(x["other"])), labels, mask,
            Divergence(kind, **options, chunk_bytes=budget),
        )  # fmt: skip
        assert_same(got, want, "loss")
        for name, grad in gradients([got], leaves).items():
            assert_same(grad, expected[name], f"d{name}", rtol=1e-10)
        for (name, y), w in zip(found.items(), metrics, strict=True):
            assert_same(y, w, name)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V_teacher", matrix([(V,), (13,), (20,)], lambda words: words == 13))
def test_its_kernels(kind, options, V_teacher):
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        x, labels = make(V_teacher)
        x = {n: y.to(device, dtype).requires_grad_(n in ("x", "weight")) for n, y in x.items()}
        with use_backend(backend):
            loss, metrics = fused_linear_divergence(
                x["x"], Head(x["weight"], x["bias"]), (x["hidden"], Head(x["other"])),
                labels.to(device), None, Divergence(kind, **options),
            )  # fmt: skip
        leaves = {n: x[n] for n in ("x", "weight")}
        found.append({"loss": loss} | metrics | gradients([loss], leaves))
    compare(found[1], found[0], f"{kind} {options}", 1e-5)


def test_kernels_that_go_wrong_are_noticed_and_replaced(monkeypatch):
    pytest.importorskip("triton")
    from fla.core import stage
    from fla.modules.kernels import divergence

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("FLA_TRITON_CHECK", "1")
    stage.forget_choices()
    x = {n: y.float().to(device) for n, y in make()[0].items()}

    def run():
        heads = Head(x["weight"]), (x["hidden"], Head(x["other"]))
        return fused_linear_divergence(x["x"], *heads)[0]

    with use_backend("torch"):
        want = run()
    with use_backend("triton"):
        compare({"loss": run()}, {"loss": want.double()}, "sound", 1e-5)
    assert list(stage._checks.values()) == [None]
    stage.forget_choices()
    rows = divergence.rows
    monkeypatch.setattr(divergence, "rows", lambda *a: 2 * rows(*a))
    with (
        use_backend("triton", "torch"),
        pytest.warns(RuntimeWarning, match="kind forward_kl are off by .* in result 0"),
    ):
        assert torch.equal(run(), want)
    with use_backend("triton"), pytest.raises(ValueError, match=r"'triton' was asked for.*off by"):
        run()
    monkeypatch.undo()
    stage.forget_choices()


@pytest.mark.parametrize("k", [1, 4, V])
def test_the_likeliest_tokens_and_the_mass_of_the_others(k):
    x, _ = make()
    log_p = F.linear(x["hidden"], x["other"]).log_softmax(-1)
    top, ids = log_p.topk(k)
    leaves = {n: x[n].requires_grad_() for n in ("x", "weight")}
    log_q = F.linear(x["x"], x["weight"]).log_softmax(-1)
    known = (top.exp() * (top - log_q.gather(-1, ids))).sum(-1)
    rest_p, rest_q = (1 - y.exp().gather(-1, ids).sum(-1) for y in (log_p, log_q))
    others = (rest_p * (rest_p / rest_q).log()) if k < V else 0.0
    want = (known + others).mean()
    got, metrics = fused_linear_divergence(x["x"], Head(x["weight"]), TopK(ids, top))
    assert_same(got, want, "loss", rtol=1e-9)
    expected = gradients([want], leaves)
    for name, grad in gradients([got], leaves).items():
        assert_same(grad, expected[name], f"d{name}", rtol=1e-9)
    if k == V:
        full, _ = fused_linear_divergence(
            x["x"], Head(x["weight"]), (x["hidden"], Head(x["other"]))
        )
        assert_same(got, full, "all tokens", rtol=1e-9)
    agree = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()
    assert metrics["agreement"] == agree


def test_gradcheck_and_a_frozen_head():
    x, labels = make()
    heads = Head(x["weight"]), (x["hidden"], Head(x["other"]))
    options = Divergence("jsd", 1.3, 0.3, 1.0, 0.5)
    leaf = x["x"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: fused_linear_divergence(y, *heads, labels, None, options)[0], leaf
    )
    loss, _ = fused_linear_divergence(leaf, *heads)
    loss.backward()
    assert heads[0].weight.grad is None and leaf.grad.any()
    with torch.no_grad():
        assert not fused_linear_divergence(leaf, *heads)[0].requires_grad


def test_logits_are_not_rounded():
    """A divergence of 4e-4 between nearly equal models in bf16 is found to 1 %."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(4096, 64, generator=generator).bfloat16() * 0.3
    x = torch.randn(64, 64, generator=generator).bfloat16()
    y = (x.float() + 0.012 * torch.randn(64, 64, generator=generator)).bfloat16()
    z, zt = (F.linear(h.double(), head.double()).log_softmax(-1) for h in (y, x))
    want = (zt.exp() * (zt - z)).sum(-1).mean()
    got, _ = fused_linear_divergence(y, Head(head), (x, Head(head)))
    assert 1e-5 < want < 2e-3 and abs(got - want) < 0.01 * want


def test_kl_div_loss_as_users_know_it():
    x, _ = make()
    module = FusedKLDivLoss()
    z, zt = F.linear(x["x"], x["weight"]), F.linear(x["hidden"], x["other"])
    want = F.kl_div(z.log_softmax(-1), zt.softmax(-1), reduction="batchmean")
    assert_same(module(x["x"], x["hidden"], x["weight"], x["other"]), want, "loss")
    with pytest.raises(ValueError, match="reduction is 'sum'"):
        FusedKLDivLoss("sum")(x["x"], x["hidden"], x["weight"], x["other"])
    with pytest.raises(ValueError, match="accumulate_grad_in_fp32=False has no effect"):
        FusedKLDivLoss(accumulate_grad_in_fp32=False)(x["x"], x["hidden"], x["weight"], x["other"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(teacher="grad"), "the teacher gets no gradient"),
        (dict(options=Divergence(ce_weight=1.0)), "ce_weight is 1.0 but there are no labels"),
        (
            dict(labels=torch.zeros(3, dtype=torch.long)),
            r"labels is for tokens \[3\], but x has \[11\]",
        ),
        (dict(x=torch.randn(M, 5)), r"x has width 5 .* expected \[V, 5\]"),
        (
            dict(
                teacher=TopK(torch.zeros(M, 1).long(), torch.zeros(M, 1)), options=Divergence("jsd")
            ),
            "a TopK teacher has forward_kl",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    x, _ = make(dtype=torch.float32)
    hidden = x["hidden"].clone().requires_grad_(change.get("teacher") == "grad")
    call = dict(x=x["x"], head=Head(x["weight"]), teacher=(hidden, Head(x["other"])))
    change = (
        {n: y for n, y in change.items() if y != "grad"}
        if isinstance(change.get("teacher"), str)
        else change
    )
    with pytest.raises(ValueError, match=said):
        fused_linear_divergence(**(call | change))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(kind="kl"), "kind is 'kl'"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(kind="jsd", beta=1.0), "beta is 1.0"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Divergence(**options)
