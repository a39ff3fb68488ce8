# SPDX-License-Identifier: MIT
"""Hashes of what every operator, module and model computes, to show that a change moves no bit.

    python -m scripts.bit_equality write before.json            # at one revision
    python -m scripts.bit_equality write after.json             # at the other, on the same machine
    python -m scripts.bit_equality compare before.json after.json

Operators: outputs, final states and all gradients of the chunk, token and literal forms, dense and
packed, on every backend that runs here (`--triton` adds Triton's interpreter, which is slow).
Models: logits, loss and all gradients of every architecture of the tests, and generated tokens.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fla
from fla.modules import activations, convolution, fused_norm_gate, layernorm
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.ops.block_sparse_attention import block_sparse_attention, local_window
from fla.ops.dilated_attention import dilated_attention
from fla.ops.registry import OPS, OpCase
from tests.models.common import MODELS, ids, make

Results = Iterator[tuple[str, list[Tensor]]]
DTYPES = {"torch": ("float32", "bfloat16", "float64"), "native": ("float32", "bfloat16")}
DTYPES["triton"] = ("float32",)


def digest(tensors: list[Tensor]) -> str:
    """One hash of dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(f"{x.dtype} {list(x.shape)}".encode())
        sha.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def with_gradients(
    function: Callable[..., list[Tensor]], inputs: dict[str, Tensor]
) -> list[Tensor]:
    """The results, and the gradients of their sum of squares."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    out = function(leaves)
    moving = [x for x in out if x.requires_grad]
    if not moving:
        return out
    total = sum((x.double() ** 2).sum() for x in moving)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [*out, *(g for g in grads if g is not None)]


def operator(op: OpCase, backend: str, dtype: torch.dtype) -> Results:
    """Every form of one operator."""
    tokens = 37 if backend == "triton" else 70
    for name in ("chunk", "token") if backend != "torch" else ("chunk", "token", "naive"):
        form = getattr(op, name)
        wide = name == "naive" or dtype == torch.float64
        state = torch.float64 if dtype == torch.float64 else torch.float32
        for packed in (False, True) if name != "naive" else (False,):
            if name == "naive" and dtype == torch.bfloat16:
                continue
            inputs = op.inputs(1 if packed else 2, tokens, 2, 12, 20, dtype=dtype)
            states = op.states(2, 2, 12, 20, dtype=dtype if wide else state)
            cut = 32 if op.grain > 1 else 21
            extra: dict[str, Any] = {}
            if packed:
                extra["cu_seqlens"] = torch.tensor([0, cut, tokens])
            found = with_gradients(
                lambda x, form=form, states=states, extra=extra: op.call(form, x, states, **extra),
                inputs,
            )
            yield f"{name}{' packed' if packed else ''}", found
            with torch.no_grad():
                yield (
                    f"{name}{' packed' if packed else ''}, no gradients",
                    op.call(form, inputs, states, **extra),
                )


def operators(triton: bool) -> Results:
    for op in OPS:
        for backend in ("torch", "native", *(["triton"] if triton else [])):
            for dtype in DTYPES[backend]:
                with fla.use_backend(backend):
                    results = operator(op, backend, getattr(torch, dtype))
                    while True:
                        try:
                            form, found = next(results)
                        except StopIteration:
                            break
                        except ValueError as error:  # the backend does not have it
                            if "asked for" not in str(error):
                                raise
                            break
                        yield f"op {op.title} {backend} {dtype} {form}", found


def modules() -> Results:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, g, w = normal(2, 9, 24).to(dtype), normal(2, 9, 24).to(dtype), normal(24).to(dtype)
        rows = dict(x=x, g=g, w=w)
        taps = dict(x=x, w=normal(24, 4).to(dtype), b=normal(24).to(dtype))
        for bounds in (None, torch.tensor([0, 4, 9])):
            inputs = {n: y[:1] if n == "x" and bounds is not None else y for n, y in taps.items()}
            yield (
                f"convolution {dtype} {bounds is not None}",
                with_gradients(
                    lambda x, bounds=bounds: list(
                        convolution.causal_conv1d(
                            x["x"], x["w"], x["b"], output_final_state=True, activation="silu",
                            cu_seqlens=bounds,
                        )
                    ),
                    inputs,
                ),
            )  # fmt: skip
        calls: dict[str, Callable[[dict[str, Tensor]], Any]] = {
            "rms_norm": lambda x: layernorm.rms_norm(x["x"], x["w"], None, x["g"]),
            "layer_norm": lambda x: layernorm.layer_norm(x["x"], x["w"], None, x["g"]),
            "rms_norm_gated": lambda x: fused_norm_gate.rms_norm_gated(
                x["x"], x["g"], x["w"], None
            ),
            "swiglu": lambda x: activations.swiglu(x["x"], x["g"]) * x["w"],
            "swiglu_linear": lambda x: activations.swiglu_linear(
                x["x"], x["g"], x["w"].expand(5, 24).contiguous()
            ),
        }
        for name, call in calls.items():
            yield f"{name} {dtype}", with_gradients(lambda x, call=call: [call(x)], rows)
            with torch.no_grad():
                yield f"{name} {dtype}, no gradients", [call(rows)]
        loss = dict(x=normal(7, 24).to(dtype), head=normal(31, 24).to(dtype))
        target = torch.arange(7)
        yield (
            f"cross entropy {dtype}",
            with_gradients(
                lambda x, target=target: list(
                    cross_entropy_loss(x["x"] @ x["head"].mT, target, 0.1)
                ),
                loss,
            ),
        )
        yield (
            f"linear cross entropy {dtype}",
            with_gradients(
                lambda x, target=target: [
                    fused_linear_cross_entropy_loss(x["x"], target, x["head"], use_l2warp=True)
                ],
                loss,
            ),
        )


def attention() -> Results:
    generator = torch.Generator().manual_seed(6)
    for dtype in (torch.float32, torch.float64):
        names = ("q", "k", "v")
        x = {n: torch.randn(2, 40, 4, 16, generator=generator).to(dtype) for n in names}
        yield (
            f"dilated {dtype}",
            with_gradients(
                lambda x: [dilated_attention(**x, segment_lengths=[8, 16], dilation_rates=[1, 2])],
                x,
            ),
        )
        yield (
            f"block sparse {dtype}",
            with_gradients(
                lambda x: [
                    block_sparse_attention(
                        **x, pattern=local_window(40, 16, block_size=8, causal=True)
                    )
                ],
                x,
            ),
        )


def models() -> Results:
    tokens = ids(2, 21)
    for name in MODELS:
        model = make(name)
        out = model(tokens, labels=tokens)
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        yield f"model {name}", [out.logits, out.loss, *grads]
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            mask[0, :5] = 0
            yield f"model {name} padded", [model(tokens, attention_mask=mask).logits]
            made = model.generate(
                tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            yield f"model {name} generated", [made]


def write(path: Path, triton: bool) -> int:
    torch.set_num_threads(1)
    found = {}
    for results in (operators(triton), modules(), attention(), models()):
        for name, tensors in results:
            found[name] = digest(tensors)
    path.write_text(json.dumps(found, indent=0))
    print(f"{len(found)} results hashed into {path}")
    return 0


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differ = [name for name in old if name in new and old[name] != new[name]]
    for name in differ:
        print(f"differs: {name}")
    for name in sorted(old.keys() ^ new.keys()):
        print(f"only {'before' if name in old else 'after'}: {name}")
    print(f"{len(old.keys() & new.keys())} results compared, {len(differ)} differ")
    return 1 if differ or old.keys() - new.keys() else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bit_equality")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--triton", action="store_true", help="also Triton's interpreter")
    options = parser.parse_args()
    if options.action == "compare":
        return compare(*options.files)
    return write(options.files[0], options.triton)


if __name__ == "__main__":
    sys.exit(main())
