# SPDX-License-Identifier: MIT
"""Boundaries of packed sequences (`cu_seqlens`) on the host."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in x `[B, T, ...]`: its rows, or those packed in its one row."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


_on_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _waits(x: Tensor) -> bool:
    """Whether reading x on the host waits for its device."""
    return x.device.type != "cpu"


def _to_host(x: Tensor) -> list[int]:
    """x.tolist(), once per tensor of a device: every layer of a model asks for the same one, and
    each answer would wait for the device.
    """
    if torch.compiler.is_compiling() or not _waits(x) or x.is_inference():
        return x.tolist()
    version, values = _on_host.get(x, (None, []))
    if version != x._version:
        values = x.tolist()
        _on_host[x] = (x._version, values)
    return values


def boundaries_to_list(cu_seqlens: Tensor, total: int, op: str = "SequenceLayout") -> list[int]:
    """The values of `cu_seqlens` on the host: from 0, never decreasing, up to `total`."""
    bounds = _to_host(cu_seqlens)
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens starts at {bounds[0]}; the first boundary must be 0")
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(
                f"{op}: cu_seqlens decreases from {a} to {b} at position {i + 1}; boundaries must "
                "be sorted"
            )
    if bounds[-1] != total:
        raise ValueError(
            f"{op}: cu_seqlens ends at {bounds[-1]} but there are T={total} tokens; "
            "the last boundary must equal T"
        )
    return bounds
