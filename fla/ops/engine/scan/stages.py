# SPDX-License-Identifier: MIT
"""The stages of the scans: which forms compute them, and within what limits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla.core.stage import Facts, Form, Stage, first_tensor
from fla.ops.engine.kernels import operators as triton
from fla.ops.engine.kernels import support
from fla.ops.engine.native import library
from fla.ops.engine.native.scan import selective_scan as native_selective
from fla.ops.engine.scan import sharded
from fla.ops.engine.scan.selective import selective_scan
from fla.ops.engine.scan.vector import scan

CHANNELS = 20  # in the self-check's problems
TOKENS, SELECTIVE_TOKENS = 70, 20  # there, a little more than a chunk


class SelectiveFacts(NamedTuple):
    """`N` is the number of states per channel."""

    device: torch.device
    dtype: torch.dtype
    N: int


def _vector_problem(facts: Facts) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1, TOKENS, CHANNELS, generator=generator)
    return tuple(y.to(facts.device, facts.dtype) for y in (x, -g.abs()))


def _selective_facts(x: Tensor, dt: Tensor, A: Tensor, *_: Any) -> SelectiveFacts:
    return SelectiveFacts(x.device, x.dtype, A.shape[1])


def _selective_problem(facts: SelectiveFacts) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 1, SELECTIVE_TOKENS, CHANNELS, generator=generator)
    B, C = torch.randn(2, 1, SELECTIVE_TOKENS, facts.N, generator=generator)
    A = -torch.rand(CHANNELS, facts.N, generator=generator)
    x, dt, B, C = (y.to(facts.device, facts.dtype) for y in (x, dt.abs(), B, C))
    return x, dt, A.to(facts.device), B, C


VECTOR_SCAN = Stage(
    "scan.vector",
    {
        "triton": Form(
            triton.scan, "vector scan in Triton, 64 tokens at once; backward by hand",
            (support.runs,), support.checked,
        ),
        "torch": Form(
            scan, "vector scan, chunk_size tokens per chunk, chunks side by side; backward by hand"
        ),
    },
    first_tensor,
    sharded.scan,
    _vector_problem,
)  # fmt: skip
SELECTIVE_SCAN = Stage(
    "scan.selective",
    {
        "triton": Form(
            triton.selective_scan, "selective scan in Triton, 16 tokens at once; backward by hand",
            (support.runs,), support.checked,
        ),
        "native": Form(
            native_selective,
            library.in_cpp("channels side by side, token by token, in {}; backward by hand"),
            (library.runs,),
        ),
        "torch": Form(
            selective_scan,
            "selective scan, the states of a chunk of chunk_size tokens formed at once; backward "
            "by hand",
        ),
    },
    _selective_facts,
    sharded.selective,
    _selective_problem,
    lambda device, dtype: SelectiveFacts(device, dtype, 16),
)  # fmt: skip
