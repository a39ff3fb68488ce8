# SPDX-License-Identifier: MIT
"""What transformers' own models take from this package, and how they get the rest.

transformers' modelling files look up functions of three packages when they are imported, on any
device. `fla` is this package: installing it is all it takes. `causal_conv1d` and `mamba_ssm` belong
to others and compute on GPUs only; `provide()` offers our functions under those names where the
packages are not installed, and beside them where they are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla.models.provided import causal_conv1d, mamba_ssm

_GDN = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
_KDA = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_ZAMBA = (*_CONV, "mamba_selective_scan", "mamba_selective_state_update")
_S6 = (*_ZAMBA, "mamba_inner_fn")
_SSD = (
    *_CONV,
    "mamba2_chunk_scan",
    "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update",
)

# modelling module -> its functions that are looked up in a package
CONSUMERS = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid"), (*_GDN, *_CONV)
    ),
    **dict.fromkeys(("kimi_linear", "glm5_next", "bailing_hybrid"), (*_KDA, *_CONV)),
    **dict.fromkeys(
        ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), _SSD
    ),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _S6),
    "zamba": _ZAMBA,
    **dict.fromkeys(("inkling", "inkling2", "lfm2", "lfm2_moe"), _CONV),
}

# function of a modelling module -> the package and the name that it is looked up by
LOOKED_UP = {
    "torch_chunk_gated_delta_rule": ("fla", "chunk_gated_delta_rule"),
    "torch_recurrent_gated_delta_rule": ("fla", "fused_recurrent_gated_delta_rule"),
    "chunk_kimi_delta_attention": ("fla", "chunk_kda"),
    "recurrent_kimi_delta_attention": ("fla", "fused_recurrent_kda"),
    "causal_conv1d_fn": ("causal_conv1d", "causal_conv1d_fn"),
    "causal_conv1d_update": ("causal_conv1d", "causal_conv1d_update"),
    "mamba_inner_fn": ("mamba_ssm", "mamba_inner_fn"),
    "mamba_selective_scan": ("mamba_ssm", "selective_scan_fn"),
    "mamba_selective_state_update": ("mamba_ssm", "selective_state_update"),
    "mamba2_selective_state_update": ("mamba_ssm", "selective_state_update"),
    "mamba2_chunk_scan": ("mamba_ssm", "mamba_chunk_scan_combined"),
    "mamba2_split_conv1d_scan_combined": ("mamba_ssm", "mamba_split_conv1d_scan_combined"),
}

_SSD_COMBINED = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
_MAMBA = ("selective_scan_fn", "mamba_inner_fn")


@dataclass(frozen=True)
class _Package:
    """A package of others: our functions, the modules that hold them, the version they follow."""

    ours: ModuleType
    version: str
    modules: dict[str, tuple[str, ...]]


PACKAGES = {
    "causal_conv1d": _Package(
        causal_conv1d,
        "1.5.4",
        {"causal_conv1d": _CONV, "causal_conv1d.causal_conv1d_interface": _CONV},
    ),
    "mamba_ssm": _Package(
        mamba_ssm,
        "2.2.6",
        {
            "mamba_ssm": (*_MAMBA, "selective_state_update", *_SSD_COMBINED),
            "mamba_ssm.ops": (),
            "mamba_ssm.ops.selective_scan_interface": _MAMBA,
            "mamba_ssm.ops.triton": (),
            "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
            "mamba_ssm.ops.triton.ssd_combined": _SSD_COMBINED,
        },
    ),
}


@dataclass(frozen=True)
class Use:
    """What one function of one transformers model runs."""

    model: str
    function: str
    runs: str
    why: str


def _module(model: str) -> ModuleType | None:
    name = f"transformers.models.{model}.modeling_{model}"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return None if found is None else importlib.import_module(name)


def report() -> list[Use]:
    """List, for each transformers model that looks up functions of `fla`, `causal_conv1d` or
    `mamba_ssm`, what these run, and why.

    Example:
        >>> {use.runs for use in report() if use.function == "torch_chunk_gated_delta_rule"}
        {'fla'}
    """
    uses = []
    for model, functions in CONSUMERS.items():
        module = _module(model)
        if module is None:
            uses.append(Use(model, "-", "-", "this transformers version has no such model"))
            continue
        for name in functions:
            function = getattr(module, name, None)
            if function is None:
                uses.append(Use(model, name, "-", "this transformers version has no such function"))
                continue
            uses.append(Use(model, name, *_runs(function, name)))
    return uses


def _runs(function: Any, name: str) -> tuple[str, str]:
    package, wanted = LOOKED_UP[name]
    found = implementation(function)
    home = getattr(found, "__module__", "") or ""
    if home.startswith("fla."):
        why = f"{home}.{found.__name__}"
        return "fla", f"{why}; on CUDA {package}" if hasattr(found, "theirs") else why
    if package == "fla":
        return "transformers", f"fla has no {wanted} yet"
    if found is not None and not home.startswith("transformers."):
        return package, f"{home}.{wanted}, on CUDA only; fla.provide() adds ours elsewhere"
    return "transformers", f"{package} was not found; fla.provide() gives ours"


def implementation(function: Any) -> Any:
    """What the function of a modelling module calls, or None if it was resolved by nothing."""
    found = inspect.unwrap(function, stop=_is_wrapper)
    return inspect.getclosurevars(found).nonlocals.get("implementation")


def _is_wrapper(function: Any) -> bool:
    return "implementation" in inspect.getclosurevars(function).nonlocals


def stand_in(theirs: Any, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` for the function `theirs` of a modelling module: of the keyword arguments it takes
    those that it names, as transformers hands on all that a layer got. `torch.export` gets
    `theirs`.
    """
    implementation, names = ours, tuple(inspect.signature(ours).parameters)

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return theirs(*args, **kwargs)
        return implementation(*args, **{k: v for k, v in kwargs.items() if k in names})

    return call


_registered: dict[str, ModuleType] = {}  # our modules in sys.modules
_shared: list[tuple[ModuleType, str, Any]] = []  # functions of real packages that share with ours


@dataclass
class Provided:
    """What `provide` did; at the end of a `with` block it is undone, unless it was so before.

    Fields:
        packages: for each package a line on whose functions run.
    """

    packages: dict[str, str] = field(default_factory=dict)
    _before: bool = False

    def __enter__(self) -> Provided:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            provide(False)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {line}" for name, line in self.packages.items())


def provide(on: bool = True) -> Provided:
    """Offer our functions under the names of the packages `causal_conv1d` and `mamba_ssm`, to
    transformers' models and to whoever imports them, on every device and with gradients.

    A package that is not installed becomes a module of ours in `sys.modules` of this process, so
    one that is installed later is found in the next process. In one that is installed, its
    functions keep the tensors on CUDA and ours get all others. Models that were imported before are
    reached too. A second call changes nothing; `provide(False)`, or the end of a `with` block,
    undoes all. Print the result to see what runs.

    Example:
        >>> with provide() as provided:
        ...     from causal_conv1d import causal_conv1d_fn
        >>> sorted(provided.packages)
        ['causal_conv1d', 'mamba_ssm']
    """
    before = bool(_registered or _shared)
    if on:
        for name in PACKAGES:
            if name not in _registered and _installed(name):
                _share(name)
            elif name not in _registered and not _hidden(name):
                _register(name)
    else:
        for name, module in _registered.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        for module, name, theirs in _shared:
            setattr(module, name, theirs)
        _registered.clear()
        _shared.clear()
    _look_up_again()
    return Provided(describe_packages(), before)


def describe_packages() -> dict[str, str]:
    """For each package that transformers looks up beside `fla`, whose functions run.

    Example:
        >>> sorted(describe_packages())
        ['causal_conv1d', 'mamba_ssm']
    """
    lines = {}
    for name in PACKAGES:
        if name in _registered:
            lines[name] = f"fla's, as version {_registered[name].__version__}"
        elif any(module.__name__.partition(".")[0] == name for module, _, _ in _shared):
            lines[name] = f"{_version(name)} for tensors on CUDA, fla's for all others"
        elif _hidden(name):
            lines[name] = "hidden (None in sys.modules), so that nothing is provided"
        elif _installed(name):
            why = _broken(name)
            lines[name] = f"{_version(name)}, on CUDA only; fla.provide() adds ours elsewhere"
            lines[name] = lines[name] if why is None else f"installed, but fails to import: {why}"
        else:
            lines[name] = "not installed; fla.provide() gives fla's"
    return lines


def _hidden(name: str) -> bool:
    return name in sys.modules and sys.modules[name] is None


def _installed(name: str) -> bool:
    """Whether the package of others is there."""
    if name in _registered or _hidden(name):
        return False
    return importlib.util.find_spec(name) is not None


def _broken(name: str) -> str | None:
    """Why the package of others cannot be imported, or None."""
    try:
        for module in PACKAGES[name].modules:
            importlib.import_module(module)
    except Exception as error:  # whatever a compiled package raises, it is of no use here
        return f"{type(error).__name__}: {error}"
    return None


def _version(name: str) -> str:
    return str(getattr(sys.modules.get(name), "__version__", "installed"))


def _register(package: str) -> None:
    ours, version = PACKAGES[package].ours, PACKAGES[package].version
    for name, functions in PACKAGES[package].modules.items():
        module = ModuleType(name, f"{ours.__doc__} Provided by fla.provide().")
        module.__spec__ = ModuleSpec(name, None, origin="fla.provide()", is_package=True)
        module.__path__ = []
        module.__version__ = f"{version}+fla"  # type: ignore[attr-defined]
        for function in functions:
            setattr(module, function, getattr(ours, function))
        _registered[name] = sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(_registered[parent], leaf, module)


def _share(package: str) -> None:
    if _broken(package) is not None:
        return
    for name, functions in PACKAGES[package].modules.items():
        module = sys.modules[name]
        for function in functions:
            theirs = getattr(module, function, None)
            if callable(theirs) and not hasattr(theirs, "theirs"):
                _shared.append((module, function, theirs))
                setattr(
                    module, function, _by_device(theirs, getattr(PACKAGES[package].ours, function))
                )


def _by_device(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`theirs` for tensors on CUDA, `ours` for all others."""
    names = inspect.signature(theirs).parameters

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not first.is_cuda:
            return ours(*args, **kwargs)
        extra = [name for name in kwargs if name not in names]
        if kwargs.get("seq_idx") is None and any(kwargs[name] is not None for name in extra):
            raise ValueError(
                f"{ours.__name__}: the installed package takes no {', '.join(extra)}; pass "
                "seq_idx, the number of each token's sequence"
            )
        for name in extra:
            del kwargs[name]
        return theirs(*args, **kwargs)

    call.theirs = theirs  # type: ignore[attr-defined]
    return call


def _look_up_again() -> None:
    """Let transformers resolve the functions of modelling files that are imported already."""
    hub = sys.modules.get("transformers.integrations.hub_kernels")
    for model, functions in CONSUMERS.items():
        module = sys.modules.get(f"transformers.models.{model}.modeling_{model}")
        if module is None or hub is None:
            continue
        for name in functions:
            package, wanted = LOOKED_UP[name]
            function: Any = getattr(module, name, None)
            if package in PACKAGES and hasattr(function, "__wrapped__"):
                decorate = hub.use_kernel_func_from_hub_with_fallback(wanted, package)
                setattr(module, name, decorate(function.__wrapped__))
