# SPDX-License-Identifier: MIT
"""Where the Triton kernels run, and whether their first use is checked; needs no Triton."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from fla.core.stage import Warned

OLDEST = "3.7"  # before, loops of matrix products could overwrite what they still read


def _missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        there = find_spec("triton") is not None
    except ImportError:  # something that hooks into imports keeps it out
        there = False
    if not there:
        return f"Triton is not installed; pip install 'triton>={OLDEST}'"
    found = version("triton")
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
        return f"Triton {found} is too old; pip install 'triton>={OLDEST}'"
    return None


MISSING = _missing()  # a constant, which torch.compile takes as one


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs(facts: Any) -> str | None:
    """Why no Triton kernel runs a call, or None."""
    kind = facts.device.type
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        return f"the Triton kernels are for GPU tensors, not for {kind}"
    if MISSING is not None:
        return Warned(MISSING)
    return "fp64 is computed by torch" if facts.dtype == torch.float64 else None


def checked() -> bool:
    """Whether the first use of a kernel is compared with torch."""
    return os.environ.get("FLA_TRITON_CHECK", "0" if interpreted() else "1") != "0"
