# SPDX-License-Identifier: MIT
"""How far a student's next-token distribution is from a teacher's, from the inputs of their last
linear layers, in chunks of tokens: no `[tokens, vocabulary]` matrix ever exists whole.

With z the logits in fp32, T the temperature, p = softmax(z_teacher / T), q = softmax(z_student / T)

    forward_kl    T^2 sum p (log p - log q)                      dz = T (q - p)
    reverse_kl    T^2 sum q (log q - log p)                      dz = T q (log q - log p - KL)
    jsd           T^2 (beta KL(p|m) + (1 - beta) KL(q|m))        dz = T (1 - beta) q (log q
                  with m = beta p + (1 - beta) q                       - log m - KL(q|m))
    mse           mean (z_student - z_teacher)^2                 dz = 2 (z_student - z_teacher) / V
    loss          mean over tokens of  weight * the above + ce_weight * cross entropy of the labels

Logits are formed in fp32 whatever the input dtype: of logits rounded to bf16 a divergence of 4e-4
comes out 11 % too large, and its gradient 36 % off. A chunk's logits are turned into gradients at
once and forgotten, so memory is `chunk_bytes`. Vocabularies may differ: tokens that only one model
has count for neither.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.stage import Form, Stage, not_compiled, tokenwise
from fla.modules.fused_cross_entropy import shape_logits
from fla.modules.fused_linear_cross_entropy import add_product
from fla.modules.losses import METRICS, Divergence, Head, TopK
from fla.ops.engine.kernels import support
from fla.ops.engine.kernels.tensors import on_device

IGNORE = -100


class _Rows:
    """One chunk: z of the student, and what the teacher says, against one another."""

    def __init__(self, options: Divergence, z: Tensor, teacher: Tensor | TopK):
        self.options, self.z, self.teacher = options, z, teacher
        T = options.temperature
        z = z if T == 1 else z / T
        self.log_q, self.q = z.log_softmax(-1), z.softmax(-1)
        if isinstance(teacher, TopK):
            self.log_p = teacher.log_probs.to(z.dtype)
            self.p = self.log_p.exp()
        else:
            teacher = teacher if T == 1 else teacher / T
            self.log_p, self.p = teacher.log_softmax(-1), teacher.softmax(-1)

    def forward_kl(self) -> tuple[Tensor, Tensor]:
        return _expect(self.p, self.log_p - self.log_q), self.q - self.p

    def reverse_kl(self) -> tuple[Tensor, Tensor]:
        return self._against(self.log_p)

    def _against(self, log_m: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q | m) and its gradient with m held."""
        difference = self.log_q - log_m
        kl = _expect(self.q, difference)
        return kl, difference.sub_(kl.unsqueeze(-1)).mul_(self.q)

    def jsd(self) -> tuple[Tensor, Tensor]:
        beta = self.options.beta
        log_m = torch.logaddexp(self.log_p + math.log(beta), self.log_q + math.log1p(-beta))
        kl, grad = self._against(log_m)
        return beta * _expect(self.p, self.log_p - log_m) + (1 - beta) * kl, (1 - beta) * grad

    def top_k(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Forward KL with all other tokens as one: their mass of q is summed, not 1 minus the
        rest.
        """
        others = self.log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        rest = (1 - self.p.sum(-1, keepdim=True)).clamp(min=0)
        rest = torch.where(others.isfinite(), rest, 0.0)  # rounding, where no other token is left
        known = _expect(self.p, self.log_p - self.log_q.gather(-1, ids))
        unknown = torch.where(rest > 0, rest * (rest.log() - others), 0.0).squeeze(-1)
        ratio = torch.where(rest > 0, rest / others.exp(), 0.0)
        grad = (self.q * (1 - ratio)).scatter(-1, ids, self.q.gather(-1, ids) - self.p)
        return known + unknown, grad

    def mse(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.teacher, Tensor)
        difference = self.z - self.teacher
        return difference.square().mean(-1), 2 * difference / difference.shape[-1]

    def run(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Summed metrics in the order of `METRICS`, and the gradient of z of the summed loss."""
        o, likeliest = self.options, self.log_p.argmax(-1)
        if isinstance(self.teacher, TopK):
            ids = self.teacher.ids.long()
            likeliest = ids.gather(-1, likeliest.unsqueeze(-1)).squeeze(-1)
            loss, grad = self.top_k(ids)
        else:
            loss, grad = getattr(self, o.kind)()
        T = 1.0 if o.kind == "mse" else o.temperature
        loss, grad = loss * T**2, grad.mul_(o.weight * T)
        ce = loss.new_zeros(())
        if labels is not None:
            log_q = self.log_q if o.temperature == 1 else self.z.log_softmax(-1)
            at = labels.unsqueeze(-1)
            ce = -log_q.gather(-1, at).sum()
            if o.ce_weight:
                own = self.q if o.temperature == 1 else self.z.softmax(-1)
                grad.add_(own, alpha=o.ce_weight)
                grad.scatter_add_(-1, at, torch.full_like(at, -o.ce_weight, dtype=grad.dtype))
        pairs = ((self.p, self.log_p), (self.q, self.log_q))
        entropies = (-_expect(*pair).sum() for pair in pairs)
        agree = (likeliest == self.z.argmax(-1)).sum().to(ce.dtype)
        return torch.stack([loss.sum(), ce, *entropies, agree]), grad


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """`sum p x` over the last axis."""
    return torch.linalg.vecdot(p, x)


def _project(x: Tensor, head: Head, wide: torch.dtype) -> Tensor:
    """Logits in fp32 or wider."""
    if x.is_cuda and x.dtype != wide:
        z = torch.mm(x, head.weight.to(x.dtype).mT, out_dtype=wide)
        return z if head.bias is None else z + head.bias
    bias = None if head.bias is None else head.bias.to(wide)
    return F.linear(x.to(wide), head.weight.to(wide), bias)


def _torch_rows(
    options: Divergence, z: Tensor, teacher: Tensor | TopK, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed metrics of logits, and the gradient of their summed loss."""
    if isinstance(teacher, TopK):
        return _Rows(options, z, teacher).run(labels)
    width = z.shape[-1]
    rows = _Rows(options, z[:, : teacher.shape[-1]], teacher[:, :width])
    found, grad = rows.run(labels)
    return found, F.pad(grad, (0, width - grad.shape[-1]))


def _triton_rows(
    options: Divergence, z: Tensor, teacher: Tensor | TopK, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.modules.kernels import divergence

    with on_device(z.device):
        capped = options.logit_softcapping is not None
        grad = z.clone() if capped else z.contiguous()
        return divergence.rows(grad, teacher, labels, options), grad  # type: ignore[arg-type]


class DivergenceFacts(NamedTuple):
    """`kind` is the kind of divergence, or "top-k" if the teacher gives its likeliest tokens."""

    device: torch.device
    dtype: torch.dtype
    kind: str


def _facts(
    options: Divergence, z: Tensor, teacher: Tensor | TopK, labels: Tensor | None
) -> DivergenceFacts:
    kind = "top-k" if isinstance(teacher, TopK) else options.kind
    return DivergenceFacts(z.device, z.dtype, kind)


def _whole(facts: DivergenceFacts) -> str | None:
    return f"there is no kernel for {facts.kind}" if facts.kind in ("top-k", "mse") else None


def _problem(facts: DivergenceFacts) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 5, 5000, generator=generator).to(facts.device, facts.dtype)
    labels = torch.arange(5, device=facts.device)
    return Divergence(facts.kind, 2.0, 0.3, 0.7, 0.5), z, teacher, labels


DIVERGENCE_ROWS = Stage(
    "linear_divergence",
    {
        "triton": Form(
            _triton_rows,
            "logits of a chunk of tokens at a time, turned into gradients at once in Triton",
            (not_compiled, support.runs, _whole),
            support.checked,
        ),
        "torch": Form(
            _torch_rows, "logits of a chunk of tokens at a time, turned into gradients at once"
        ),
    },
    _facts,
    tokenwise,
    _problem,
    lambda device, dtype: DivergenceFacts(device, dtype, "forward_kl"),
    differentiable=False,
)


class _Chunks:
    """Runs chunk by chunk and sums what comes of each."""

    def __init__(self, options: Divergence, x: Tensor, head: Head, needs: tuple[bool, ...]):
        self.options, self.x, self.head = options, x, head
        self.wide = torch.promote_types(x.dtype, torch.float32)
        need_x, need_weight, need_bias = needs
        self.dx = torch.empty_like(x) if need_x else None
        new = x.new_zeros
        self.dweight = new(head.weight.shape, dtype=self.wide) if need_weight else None
        self.dbias = new(len(head.weight), dtype=self.wide) if need_bias else None
        self.metrics = new(len(METRICS), dtype=self.wide)

    def add(self, rows: slice, teacher: Tensor | TopK, labels: Tensor | None, share: float) -> None:
        o, x = self.options, self.x[rows]
        z = _project(x, self.head, self.wide)
        z = shape_logits(z, o.logit_scale, o.logit_softcapping)
        found, grad = DIVERGENCE_ROWS("fused_linear_divergence", None, o, z, teacher, labels)
        self.metrics += found * share
        if self.dx is None and self.dweight is None and self.dbias is None:
            return
        if o.logit_softcapping:
            grad = grad * (1 - (z / o.logit_softcapping).square())
        grad.mul_(o.logit_scale * share)
        if self.dbias is not None:
            self.dbias += grad.sum(0)
        narrow = grad.to(x.dtype) if x.is_cuda else grad
        if self.dx is not None:
            self.dx[rows] = (narrow @ self.head.weight.to(narrow.dtype)).to(x.dtype)
        if self.dweight is not None:
            add_product(self.dweight, narrow.mT, x.to(narrow.dtype))


# from rows to their logits in fp32, or to their likeliest tokens
Teacher = Callable[[slice], "Tensor | TopK"]


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher,
        labels: Tensor | None,
        options: Divergence,
        rows: int,
    ):
        chunks = _Chunks(options, x, Head(weight, bias), ctx.needs_input_grad[:3])
        count = len(x)
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            chunks.add(part, teacher(part), None if labels is None else labels[part], 1 / count)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(chunks.dx, chunks.dweight, chunks.dbias)
        loss = options.weight * chunks.metrics[0] + options.ce_weight * chunks.metrics[1]
        ctx.mark_non_differentiable(chunks.metrics)
        return loss, chunks.metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _unused: Tensor):
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else (d * scale).to(t) for d, t in grads), *[None] * 4


@checked
def fused_linear_divergence(
    x: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | TopK,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    options: Divergence | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above of a student's hidden states x `[..., D]` under its `head`, and its metrics:
    means over the tokens of the divergence (times T^2), the cross entropy of the labels, both
    entropies at T, and how often the likeliest tokens agree.

    `teacher` is its hidden states `[..., D']` and its head, which get no gradient, or its
    `TopK` (forward_kl at temperature 1). `labels` `[...]` are the tokens to come (-100 counts for
    nothing), `mask` `[...]` is True where a token counts. x, head weight and bias get gradients.

    Raises ValueError where a teacher's tensor needs a gradient, shapes differ, or an option has
    nothing to act on.

    Example:
        >>> x, head = torch.randn(5, 8, requires_grad=True), Head(torch.randn(16, 8))
        >>> loss, metrics = fused_linear_divergence(x, head, (x.detach(), head))
        >>> round(loss.item(), 4), metrics["agreement"].item()
        (0.0, 1.0)
    """
    options = options or Divergence()
    _check(x, head, teacher, labels, mask, options)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    kept = _kept(labels, mask)
    x, labels = _pick(x, kept, 1), None if labels is None else _pick(labels, kept)
    V = len(head.weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(teacher, TopK):
        ids, log_probs = (_pick(y, kept, 1) for y in teacher)

        def of(rows: slice) -> Tensor | TopK:
            return TopK(ids[rows], log_probs[rows])
    else:
        hidden, other = _pick(teacher[0], kept, 1), teacher[1]
        V = max(V, len(other.weight))

        def of(rows: slice) -> Tensor | TopK:
            z = _project(hidden[rows], other, wide)
            return shape_logits(z, options.teacher_scale, options.teacher_softcapping)

    rows = max(1, options.chunk_bytes // (6 * wide.itemsize * V))
    with torch.autocast(x.device.type, enabled=False):
        loss, metrics = _LinearDivergence.apply(x, *head, of, labels, options, rows)
    return loss, dict(zip(METRICS, metrics, strict=True))


def _kept(labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which tokens count, flat; None where all do."""
    kept = None if mask is None else mask.flatten().bool()
    if labels is not None:
        labelled = labels.flatten() != IGNORE
        kept = labelled if kept is None else kept & labelled
    return kept


def _pick(x: Tensor, kept: Tensor | None, inner: int = 0) -> Tensor:
    """Tokens that count, as rows with the last `inner` axes kept."""
    x = x.reshape(-1, *x.shape[x.dim() - inner :])
    return x if kept is None else x[kept]


def _check(
    x: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | TopK,
    labels: Tensor | None,
    mask: Tensor | None,
    options: Divergence,
) -> None:
    op, tokens = "fused_linear_divergence", x.shape[:-1]
    if x.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{op}: x has width {x.shape[-1]} but the head's weight is "
            f"{list(head.weight.shape)}; expected [V, {x.shape[-1]}]"
        )
    if isinstance(teacher, TopK):
        if options.kind != "forward_kl" or options.temperature != 1:
            raise ValueError(
                f"{op}: a TopK teacher has forward_kl at temperature 1 alone (got {options.kind} "
                f"at {options.temperature}); pass the teacher's hidden states and head instead"
            )
        given = dict(teacher_ids=teacher.ids[..., 0], teacher_log_probs=teacher.log_probs[..., 0])
    else:
        given = dict(teacher=teacher[0][..., 0])
        if any(y is not None and y.requires_grad for y in (teacher[0], *teacher[1])):
            raise ValueError(
                f"{op}: the teacher gets no gradient, but one of its tensors requires one; run it "
                "under torch.no_grad() and detach its head"
            )
    if options.ce_weight and labels is None:
        raise ValueError(f"{op}: ce_weight is {options.ce_weight} but there are no labels")
    for name, y in (given | dict(labels=labels, mask=mask)).items():
        if y is not None and y.shape != tokens:
            raise ValueError(
                f"{op}: {name} is for tokens {list(y.shape)}, but x has {list(tokens)}"
            )
