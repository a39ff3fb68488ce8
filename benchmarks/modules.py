# SPDX-License-Identifier: MIT
"""The modules between the operators: `python -m benchmarks.modules [--device cuda]`.

Each runs forward and backward in bf16 (fp32 on a CPU, whose bf16 is slow) on 4,096 tokens, as it is
here, written out in torch, and that by `torch.compile`, in turn. Kept: bytes that autograd holds
for the backward, inputs included, for every element of the first input, always measured in bf16.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.common import alternate, machine
from benchmarks.family import write_table
from fla.modules.activations import swiglu, swiglu_linear
from fla.modules.convolution import causal_conv1d
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.fused_kl_div import fused_kl_div_loss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.l2norm import l2norm
from fla.modules.layernorm import layer_norm, rms_norm
from fla.modules.rotary import rotary_embedding
from fla.modules.token_shift import token_shift

TOKENS, WIDTH, VOCABULARY = 4096, 1024, 8192
Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A module here and written out in torch, of inputs by shape; `given` are inputs without a
    gradient.
    """

    here: Form
    plain: Form
    shapes: tuple[tuple[int, ...], ...]
    given: Callable[[torch.device], tuple[Tensor, ...]] = lambda device: ()


def plain_gated(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * w.float()
    return (y * F.silu(g.float())).to(x.dtype)


def plain_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * w.float()).to(x.dtype)


def plain_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return (y * w.float() + b.float()).to(x.dtype)


def plain_shift(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x


def plain_l2norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def plain_conv(x: Tensor, w: Tensor) -> Tensor:
    row = F.pad(x.mT, (w.shape[1] - 1, 0))
    return F.silu(F.conv1d(row, w.unsqueeze(1), groups=len(w)).mT)


def plain_loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), t)


def plain_kl(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    log_q, log_p = (F.linear(h, w).float().log_softmax(-1) for h in (x, y))
    return F.kl_div(log_q, log_p.detach(), reduction="batchmean", log_target=True)


def targets(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.randint(VOCABULARY, (TOKENS,), device=device),)


def angles(device: torch.device) -> tuple[Tensor, ...]:
    turn = torch.rand(1, TOKENS, 64, device=device)
    return turn.cos(), turn.sin()


HEADS, HEAD = (TOKENS, WIDTH // 128, 128), (VOCABULARY, WIDTH)
CASES = {
    "gated RMSNorm": Case(
        lambda x, g, w: rms_norm_gated(x, g, w, None),  # type: ignore[arg-type,return-value]
        plain_gated,
        (HEADS, HEADS, (128,)),
    ),
    "RMSNorm": Case(
        lambda x, w: rms_norm(x, w, None),  # type: ignore[arg-type,return-value]
        plain_norm,
        ((TOKENS, WIDTH), (WIDTH,)),
    ),
    "LayerNorm": Case(
        lambda x, w, b: layer_norm(x, w, b),  # type: ignore[arg-type,return-value]
        plain_layer_norm,
        ((TOKENS, WIDTH), (WIDTH,), (WIDTH,)),
    ),
    "token shift": Case(token_shift, plain_shift, ((1, TOKENS, WIDTH),)),
    "SwiGLU": Case(swiglu, lambda x, y: F.silu(x) * y, ((TOKENS, 2 * WIDTH),) * 2),
    "SwiGLU and linear": Case(
        swiglu_linear,
        lambda x, y, w: F.linear(F.silu(x) * y, w),
        ((TOKENS, 2 * WIDTH), (TOKENS, 2 * WIDTH), (WIDTH, 2 * WIDTH)),
    ),
    "l2norm": Case(l2norm, plain_l2norm, (HEADS,)),
    "rotary embedding": Case(
        lambda x, cos, sin: rotary_embedding(x, cos, sin, False),
        plain_rotary,
        ((1, *HEADS),),
        angles,
    ),
    "short convolution": Case(
        lambda x, w: causal_conv1d(x, w, activation="silu")[0],
        plain_conv,
        ((1, TOKENS, WIDTH), (WIDTH, 4)),
    ),
    "cross entropy": Case(
        lambda z, t: cross_entropy_loss(z, t)[0].mean(),
        lambda z, t: F.cross_entropy(z.float(), t),
        ((TOKENS, VOCABULARY),),
        targets,
    ),
    "linear and cross entropy": Case(
        lambda x, w, t: fused_linear_cross_entropy_loss(x, t, w),
        plain_loss,
        ((TOKENS, WIDTH), HEAD),
        targets,
    ),
    "linear and KL": Case(
        lambda x, w, y: fused_kl_div_loss(x, y, w, w.detach()),
        plain_kl,
        ((TOKENS, WIDTH), HEAD),
        lambda device: (torch.randn(TOKENS, WIDTH, device=device),),
    ),
}


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    leaves = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in case.shapes]
    given = [x.to(dtype) if x.dtype.is_floating_point else x for x in case.given(device)]
    return leaves, leaves + given


def kept(form: Form, leaves: list[Tensor], arguments: list[Tensor]) -> float:
    """Bytes autograd holds per element of the first input, weights left out."""
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        form(*arguments)
    for weight in (x for x in leaves[1:] if x.shape != leaves[0].shape):
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(sizes.values()) / leaves[0].numel()


def measure(device: torch.device, repeats: int, console: Console) -> dict[str, Any]:
    rows = {}
    for name, case in CASES.items():
        console.print(f"measuring {name}")
        compiled = torch.compile(case.plain)
        forms = {"here": case.here, "torch": case.plain, "compiled": compiled}
        leaves, arguments = inputs(case, device, torch.bfloat16)
        row = {f"{n} kept": kept(f, leaves, arguments) for n, f in forms.items()}
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        leaves, arguments = inputs(case, device, dtype)

        def both(form: Form, leaves=leaves, arguments=arguments) -> Callable[[], object]:
            grad = torch.randn_like(form(*arguments))
            return lambda: torch.autograd.grad(form(*arguments), leaves, grad)

        rows[name] = row | alternate({n: both(f) for n, f in forms.items()}, repeats)
    return {"machine": machine(), "tokens": TOKENS, "width": WIDTH, "rows": rows}


HEADER = ("module", "here", "torch", "compiled", "kept here", "torch", "compiled")


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    names = ("here", "torch", "compiled")
    return [
        (
            module,
            *(f"{row[n] * 1e3:.2f} ms" for n in names),
            *(f"{row[f'{n} kept']:.1f} B" for n in names),
        )
        for module, row in result["rows"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")
    args = parser.parse_args()
    console, device = Console(), torch.device(args.device)
    result = measure(device, args.repeats, console)
    out = Path(args.out) if args.out else None
    name = "modules-cpu" if args.device == "cpu" else f"gpu-modules-{result['machine']['date']}"
    write_table(HEADER, table(result), result, out, console, name, __doc__ or "")


if __name__ == "__main__":
    main()
