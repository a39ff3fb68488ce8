# SPDX-License-Identifier: MIT
"""What one call of the recurrence is made of: `Terms`, its tensors, and `Switches`, its options.

    S_t = diag(exp(g_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T        o_t = scale S_t^T q_t

torch, C++ and Triton say the same of where the decay stands between two reads of the state:

    read_before     o_t reads S_{t-1}, the state before its token, instead of S_t
    erase_before    b is given, and reads S_{t-1} before the decay; without b the erase key is k,
                    and reads the decayed state
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_SIZE = 64
L2_EPS = 1e-6
# where a row of a chunk reads the state
AFTER_WRITE, AFTER_DECAY, BEFORE_DECAY = "after the write", "after the decay", "before the decay"
# the gates' axes; beta may be per value channel too
AXES = dict(g="B T HV", beta="B T HV", gk="B T HV K", gv="B T HV V", a="B T HV K", b="B T HV K")
DECAYS = ("g", "gk", "gv")  # natural logs, at most 0
NONE, DELTA, LOW_RANK = "none", "delta", "low rank"  # kinds of erase


class Terms(NamedTuple):
    """The tensors of one call.

    Fields:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H.
        g: log decay per head `[B, T, HV]`; once `merged`, also per key channel `[B, T, HV, K]`.
        gk: log decay per key channel `[B, T, HV, K]`.
        gv: log decay per value channel `[B, T, HV, V]`.
        beta: rate of a delta erase `[B, T, HV]`, in the token form also `[B, T, HV, V]`.
        a, b: low-rank erase `[B, T, HV, K]`; b alone is the erase key of a delta.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    gk: Tensor | None = None
    gv: Tensor | None = None
    beta: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def merged(self) -> "Terms":
        """The same with one log decay for the rows of the state, g."""
        if self.gk is None:
            return self
        g = self.gk if self.g is None else self.g.unsqueeze(-1) + self.gk
        return self._replace(g=g, gk=None)

    def named(self, names: tuple[str, ...]) -> list[Any]:
        """The merged terms in the order in which an operator takes them."""
        merged = self.merged()
        return [getattr(merged, name) for name in names]

    def state_shape(self, sequences: int) -> tuple[int, int, int, int]:
        """The states of that many sequences, `[N, HV, K, V]`."""
        return sequences, self.v.shape[2], self.q.shape[3], self.v.shape[3]

    @property
    def erase(self) -> str:
        return LOW_RANK if self.a is not None else NONE if self.beta is None else DELTA


class Switches(NamedTuple):
    """The options of one call.

    Fields:
        l2norm: q and k are divided by their norms first.
        chunk_size: tokens of a chunk of torch's form; kernels have their own.
        keep_final: whether the caller takes the final state, which ranks then send to each other.
    """

    scale: float
    l2norm: bool = False
    read_before: bool = False
    chunk_size: int = CHUNK_SIZE
    keep_final: bool = True


class Point(NamedTuple):
    """A call's point in the family: all that a choice of backend looks at.

    Fields:
        decay: "none", "scalar" (per head) or "vector" (per key channel).
        erase: the terms that the erase is made of, as in "beta b"; "none" without one.
        columns: whether value channels decay.
        rates: whether beta is per value channel.
    """

    device: torch.device
    dtype: torch.dtype
    decay: str
    erase: str
    columns: bool
    rates: bool
    read_before: bool
    K: int
    V: int

    def rounded(self) -> "Point":
        """Widths by the powers of two that hold them, as kernels are compiled."""
        K, V = (1 << (n - 1).bit_length() for n in (self.K, self.V))
        return self._replace(K=K, V=V)


class ReadsState(Protocol):
    """Anything with a `read_before`: `Switches`, or the options of a public function."""

    @property
    def read_before(self) -> bool: ...


def point(terms: Terms, switches: ReadsState, *_: Any) -> Point:
    """The call's point in the family."""
    q, beta, g = terms.q, terms.beta, terms.g
    vector = terms.gk is not None or (g is not None and g.dim() == 4)
    given = [n for n in ("beta", "a", "b") if getattr(terms, n) is not None]
    return Point(
        q.device,
        q.dtype,
        "vector" if vector else "none" if g is None else "scalar",
        " ".join(given) or "none",
        terms.gv is not None,
        beta is not None and beta.dim() == 4,
        switches.read_before,
        q.shape[3],
        terms.v.shape[3],
    )
