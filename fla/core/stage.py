# SPDX-License-Identifier: MIT
"""What computes a stage, and why: the one table that chooses, explains and checks.

A `Stage` is one computation, such as the chunk form of the recurrence. Its row holds a `Form` per
backend (the function, its limits, what it says of itself), the form for a sequence that lies on
several ranks, and a small problem on which compiled kernels are compared with torch. A call is
`STAGE(op, backend, *args)`; `explain`, `fla doctor` and the self-check read the same row.

The rule: an explicit choice (`backend=` on the call, then `use_backend(...)`, then FLA_BACKEND)
runs or raises. Several names are an order of preference: the first that can run does. Without a
choice the first of triton, native and torch runs that can: Triton on GPUs, the native kernels for
CPU tensors below fp64, torch for everything else.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from fla.core import selfcheck
from fla.core.parallel import current, refuse_sharded

BACKENDS = ("triton", "native", "torch")
LANGUAGES = {"triton": "Triton kernel", "native": "native kernel", "torch": "torch form"}


class Facts(NamedTuple):
    """The facts that a choice looks at. Stages whose forms have more limits use a longer record."""

    device: torch.device
    dtype: torch.dtype


def first_tensor(x: Any, *_: Any) -> Facts:
    """The facts of a stage whose forms ask no more of a call than its first tensor."""
    return Facts(x.device, x.dtype)


def not_compiled(facts: Any) -> str | None:
    """A limit: `torch.compile` does better without these kernels."""
    compiling = torch.compiler.is_compiling()
    return "torch.compile fuses torch's form into what stands around it" if compiling else None


class Warned(str):
    """A reason that the user is told once without asking: the automatic choice is slower here than
    it should be.
    """


@dataclass(frozen=True)
class Form:
    """One way to compute a stage.

    Fields:
        run: takes the arguments of the stage.
        says: what it does, for `explain`.
        limits: each returns why it cannot run a call with these facts, or None.
        checked: tells whether the first use is to be compared with torch; None for never.
    """

    run: Callable[..., Any]
    says: str | Callable[[], str]
    limits: tuple[Callable[[Any], str | None], ...] = ()
    checked: Callable[[], bool] | None = None

    def __str__(self) -> str:
        return self.says if isinstance(self.says, str) else self.says()


@dataclass(frozen=True)
class Decision:
    """Which form ran a stage, why, and why the others did not."""

    stage: str
    backend: str
    form: str
    facts: Any
    why: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        others = (f"\n  not {name}: {reason}" for name, reason in self.rejected)
        return f"  {self.stage} runs: {self.backend}, {self.form}\n  because: {self.why}" + "".join(
            others
        )


STAGES: dict[str, "Stage"] = {}  # all there are, by name
# what lies under os.environ, whose `get` takes longer than all else that a stage decides
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = "FLA_BACKEND"
if _ENVIRONMENT is not os.environ:
    _KEY = os.environ.encodekey(_KEY)
_watching: list[list[Decision]] = []
_chosen: tuple[str, ...] | None = None
_warned: set[str] = set()
_checks: dict[tuple[str, Any], str | None] = {}  # (stage, kind): what its first use was off by


def tokenwise(op: str, parallel: Any, local: Callable[..., Any], *args: Any) -> Any:
    """The sharded form of a stage that looks at each token alone."""
    return local(*args)


@dataclass(frozen=True, eq=False)
class Stage:
    """One computation and the forms that compute it.

    Fields:
        forms: by backend; torch's is always there. One under another name, as in "flex", runs only
            where it is asked for.
        facts: makes the record that limits look at, from the arguments of a call.
        sharded: `(op, parallel, local, *args)` inside `sequence_parallel`, where `local(*args)` is
            the stage on this rank alone; None where there is no such form.
        problem: the arguments of a small call with given facts, for the self-check.
        example: the facts of an ordinary call, for `fla doctor`.
        kind: what kernels are compiled for, of facts: one check per kind.
        differentiable: whether the self-check compares gradients too.
    """

    name: str
    forms: dict[str, Form]
    facts: Callable[..., Any]
    sharded: Callable[..., Any] | None = None
    problem: Callable[[Any], tuple[Any, ...]] | None = None
    example: Callable[[torch.device, torch.dtype], Any] = Facts
    kind: Callable[[Any], Any] = lambda facts: facts
    differentiable: bool = True
    _decided: dict[Any, Form] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        STAGES[self.name] = self

    def __call__(self, op: str, backend: str | None, *args: Any, facts: Any = None) -> Any:
        """Run the stage for the public function `op`; `facts` where the caller has them already."""
        parallel = current()
        if parallel is None:
            return self.local(op, backend, *args, facts=facts)
        if self.sharded is None:
            refuse_sharded(op)
        return self.sharded(op, parallel, partial(self.local, op, backend), *args)  # type: ignore[misc]

    def local(self, op: str, backend: str | None, *args: Any, facts: Any = None) -> Any:
        """Run the stage on this process alone."""
        if facts is None:
            facts = self.facts(*args)
        form = None
        if not torch.compiler.is_compiling():  # decided before, as at every step but the first
            unset = backend is None and _chosen is None and _ENVIRONMENT.get(_KEY) is None
            form = self._decided.get((facts, None if unset else requested(backend)[0]))
        if form is None:
            form = self.forms[self.choose(op, backend, facts)]
        if _watching:
            decision = self.decision(op, backend, facts)
            for seen in _watching:
                if decision not in seen:
                    seen.append(decision)
        return form.run(*args)

    def choose(self, op: str, backend: str | None, facts: Any) -> str:
        """The backend that runs a call, or `ValueError` where an explicit choice cannot."""
        names, origin = requested(backend)
        if torch.compiler.is_compiling():
            return self._first(op, names, origin, facts)[0]
        found, lasting = self._first(op, names, origin, facts)
        if lasting:
            self._decided[facts, names] = self.forms[found]
        return found

    def order(self, names: tuple[str, ...] | None, facts: Any) -> tuple[str, ...]:
        """The backends to try. Triton's interpreter is never chosen on a CPU unless asked for."""
        if names is not None:
            return names
        return BACKENDS[1:] if facts.device.type == "cpu" else BACKENDS

    def _first(
        self, op: str, names: tuple[str, ...] | None, origin: str, facts: Any
    ) -> tuple[str, bool]:
        """The first backend that can run, and whether that will stay so."""
        reason, quiet = None, torch.compiler.is_compiling()
        for name in self.order(names, facts):
            reason = self.unavailable(name, facts)
            if reason is None:
                return name, quiet or not self._untried(self.forms[name])
            # one explicit name raises below; where another form follows, the user hears of it
            if isinstance(reason, Warned) and not quiet and (names is None or len(names) > 1):
                _warn_once(f"fla: {self.name} runs another form than Triton's: {reason}")
        wanted = " or ".join(repr(name) for name in names or ())
        raise ValueError(
            f"{op}: backend {wanted} was asked for by {origin} but cannot run on {facts.device}: "
            f"{reason}; use backend='torch', name several in order of preference as in "
            "use_backend('triton', 'torch'), or unset it and let fla choose"
        )

    def unavailable(self, backend: str, facts: Any) -> str | None:
        """Why a backend cannot run a call with these facts, or None where it can."""
        form = self.forms.get(backend)
        if form is None and backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        if form is None:
            return f"the stage {self.name} has no {LANGUAGES[backend]}"
        for limit in form.limits:
            reason = limit(facts)
            if reason is not None:
                return reason
        return None if form.checked is None else self._failed(form, facts)

    @staticmethod
    def _untried(form: Form) -> bool:
        """Whether a form is to be checked but could not be now, while a graph is captured."""
        return form.checked is not None and form.checked() and _cannot_check()

    def _failed(self, form: Form, facts: Any) -> str | None:
        """What the first use of kernels of this kind was off by; they are compared with torch here
        if they have not been.
        """
        assert form.checked is not None and self.problem is not None
        if not form.checked():
            return None
        kind = self.kind(facts)
        key = (self.name, kind)
        if key not in _checks:
            if _cannot_check():
                return None
            # gradients are compared wherever the call comes from, on numbers drawn on the host
            with torch.inference_mode(False), torch.device("cpu"):
                plain, call = self.forms["torch"].run, self.problem(kind)
                _checks[key] = selfcheck.difference(form.run, plain, call, self.differentiable)
        found = _checks[key]
        if found is None:
            return None
        return Warned(
            f"the Triton kernels for {_words(kind)} {found}, on their first use. Another version "
            "of Triton may fix it; FLA_TRITON_CHECK=0 runs them regardless"
        )

    def decision(self, op: str, backend: str | None, facts: Any) -> Decision:
        """The form that runs a call with these facts, and why."""
        names, origin = requested(backend)
        chosen = self.choose(op, backend, facts)
        first = self.order(names, facts).index(chosen) == 0
        why = f"it was asked for by {origin}" if names else "it is the first available backend"
        rejected = {b: self.unavailable(b, facts) for b in BACKENDS if b != chosen}
        other = "another was asked for" if names and first else "an earlier one is available"
        return Decision(
            self.name, chosen, str(self.forms[chosen]), facts, why,
            tuple((b, reason or other) for b, reason in rejected.items()),
        )  # fmt: skip


def _words(kind: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in kind._asdict().items())


def _cannot_check() -> bool:
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=6)


def requested(backend: str | None = None) -> tuple[tuple[str, ...] | None, str]:
    """The explicit choice that applies, in order of preference, and where it came from; (None, ...)
    where there is none.
    """
    if backend is not None:
        return (backend,), "the call's backend argument"
    if _chosen is not None:
        return _chosen, "use_backend()"
    from_environment = os.environ.get("FLA_BACKEND")
    names = tuple(from_environment.split(",")) if from_environment else None
    return names, "the environment variable FLA_BACKEND"


def forget_choices() -> None:
    """Forget choices and checks, so that the next call makes them again: for a process that changes
    its environment (FLA_TRITON_CHECK) after its first call.
    """
    for stage in STAGES.values():
        stage._decided.clear()
    _checks.clear()
    _warned.clear()


@contextmanager
def use_backend(*backends: str) -> Iterator[None]:
    """Run every stage inside the block on one backend, or raise where it cannot. Several names are
    an order of preference: the first that can run does.

    Example:
        >>> from fla import explain
        >>> from fla.ops import chunk_linear_attn
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> with use_backend("torch"):
        ...     explain(chunk_linear_attn, x, x, x).backend
        'torch'
    """
    global _chosen
    for name in backends or ("",):
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    previous, _chosen = _chosen, backends
    try:
        yield
    finally:
        _chosen = previous


@contextmanager
def watch() -> Iterator[list[Decision]]:
    """The decisions of all stages that run inside the block, each once, in order.

    Example:
        >>> from fla.ops import chunk_linear_attn
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> with watch() as seen:
        ...     _ = chunk_linear_attn(x, x, x, normalize=False)
        >>> [decision.stage for decision in seen]
        ['recurrence.chunk']
    """
    seen: list[Decision] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
