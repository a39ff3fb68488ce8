# SPDX-License-Identifier: MIT
"""Device facts and numeric checks under the names users know. Facts are computed when asked for,
never at import.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def get_abs_err(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference."""
    return (x.detach().double() - y.detach().double()).abs().max().item() if x.numel() else 0.0


def get_err_ratio(x: Tensor, y: Tensor) -> float:
    """Root mean square of x - y, divided by the root mean square of x."""
    x, y = x.detach().double().flatten(), y.detach().double().flatten()
    return ((x - y).square().mean().sqrt() / (x.square().mean().sqrt() + 1e-8)).item()


def assert_close(
    prefix: str,
    ref: Tensor,
    tri: Tensor,
    ratio: float,
    warning: bool = False,
    err_atol: float = 1e-6,
) -> None:
    """Raise `AssertionError` unless `get_err_ratio(ref, tri) < ratio` or the tensors differ by at
    most `err_atol`.

    `warning=True` is refused: a miss is never turned into a warning here.
    """
    if warning:
        raise ValueError(
            "assert_close: warning=True would hide a miss; compare with a ratio you can defend"
        )
    if ref.shape != tri.shape:
        raise AssertionError(f"{prefix}: shapes {list(ref.shape)} and {list(tri.shape)} differ")
    for name, x in (("ref", ref), ("tri", tri)):
        if x.isnan().any():
            raise AssertionError(f"{prefix}: {name} holds NaN")
    absolute, relative = get_abs_err(ref, tri), get_err_ratio(ref, tri)
    if absolute > err_atol and not relative < ratio:
        raise AssertionError(
            f"{prefix}: error ratio {relative:.3e} >= {ratio:.3e} (largest difference "
            f"{absolute:.3e})"
        )


def input_guard(
    fn: Callable | None = None, *, no_guard_contiguous: bool | Sequence[str] = False
) -> Callable:
    """Decorator: tensor arguments are made contiguous (none with True, all but the named with
    names), and the call runs on the device of the first tensor.

    Raises `TypeError` for one string, whose letters would be taken for names.
    """
    if isinstance(no_guard_contiguous, str):
        raise TypeError(
            f"input_guard: no_guard_contiguous is {no_guard_contiguous!r}; expected a bool or a "
            f"sequence of names; pass ({no_guard_contiguous!r},)"
        )
    if fn is None:
        return functools.partial(input_guard, no_guard_contiguous=no_guard_contiguous)
    skipped = () if isinstance(no_guard_contiguous, bool) else tuple(no_guard_contiguous)
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]

    def guard(name: str, x: Any) -> Any:
        keep = no_guard_contiguous is True or name in skipped or not isinstance(x, Tensor)
        return x if keep else x.contiguous()

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        named = zip([*names, *[""] * len(args)], args, strict=False)
        args = tuple(guard(name, x) for name, x in named)
        kwargs = {name: guard(name, x) for name, x in kwargs.items()}
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is not None and first.is_cuda:
            with torch.cuda.device(first.device):
                return fn(*args, **kwargs)
        return fn(*args, **kwargs)

    return wrapped


contiguous = input_guard


def tensor_cache(fn: Callable) -> Callable:
    """Decorator kept for its name: calls are not remembered, since a memo keyed by identity goes
    stale when a tensor is changed in place.
    """
    return fn


def autocast_custom_fwd(fn: Callable | None = None, **options: Any) -> Callable:
    """`torch.amp.custom_fwd` for the accelerator that torch sees, or for the CPU."""
    return torch.amp.custom_fwd(fn, device_type=get_available_device(), **options)


def autocast_custom_bwd(fn: Callable) -> Callable:
    """`torch.amp.custom_bwd` for the accelerator that torch sees, or for the CPU."""
    return torch.amp.custom_bwd(fn, device_type=get_available_device())


def custom_device_ctx(index: int) -> AbstractContextManager:
    """Makes accelerator `index` the current one; without an accelerator it does nothing."""
    module = getattr(torch, get_available_device())
    return module.device(index) if hasattr(module, "device") else nullcontext()


def checkpoint(fn: Callable) -> Callable:
    """Decorator: the backward pass computes the function again instead of keeping what it stored
    (`torch.utils.checkpoint`, not reentrant).

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> checkpoint(torch.exp)(x).sum().backward()
        >>> bool((x.grad == torch.e).all())
        True
    """
    from torch.utils.checkpoint import checkpoint as call

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(fn, *args, use_reentrant=False, **kwargs)

    return wrapped


def require_version(version: str, hint: str | None = None) -> Callable[[Callable], Callable]:
    """Decorator: a call raises `ImportError` unless an installed package is as `version` asks, such
    as "torch>=2.13".
    """

    def decorate(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            from transformers.utils.versions import require_version as check

            check(version, hint)
            return fn(*args, **kwargs)

        return wrapped

    return decorate


find_spec_cached = functools.cache(find_spec)


def has_usable_nvcc() -> bool:
    """Whether a CUDA compiler is on the path or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return bool(shutil.which("nvcc") or (home and Path(home, "bin", "nvcc").is_file()))


def check_environments() -> None:
    """Warn where Triton is older than this package supports. `fla doctor` says more."""
    if find_spec_cached("triton") and not _triton_at_least("3.5"):
        warnings.warn(f"Triton {version('triton')} is older than 3.5", stacklevel=2)


def _triton_at_least(wanted: str) -> bool:
    return find_spec_cached("triton") is not None and _at_least("triton", wanted)


def _at_least(package: str, wanted: str) -> bool:
    from packaging.version import parse

    return parse(parse(version(package)).base_version) >= parse(wanted)


def _supports_autotune_cache() -> bool:
    if find_spec_cached("triton") is None:
        return False
    autotune = importlib.import_module("triton").autotune
    return "cache_results" in inspect.signature(autotune).parameters


def get_available_device() -> str:
    """`"cuda"`, `"xpu"`, `"mps"`, ... where torch sees an accelerator, else `"cpu"`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


map_triton_backend_to_torch_device = get_available_device


def check_pytorch_version(version: str = "2.4") -> bool:
    """Whether torch is at least `version`."""
    from packaging.version import parse

    return parse(torch.__version__) >= parse(version)


def check_transformers_version(version: str) -> bool:
    """Whether transformers is at least `version`."""
    return _at_least("transformers", version)


def get_device_capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device, or None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def get_multiprocessor_count(tensor_idx: int = 0, *, use_aicore: bool = False) -> int:
    """Multiprocessors of a CUDA device, or the CPU's cores without one. `use_aicore` chooses
    between two counts of Ascend devices, which this package does not run on.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(tensor_idx).multi_processor_count
    return os.cpu_count() or 1


def get_all_max_shared_mem() -> list[int]:
    """Shared memory per block in bytes, for each CUDA device."""
    devices = range(torch.cuda.device_count())
    properties: list[Any] = [torch.cuda.get_device_properties(i) for i in devices]
    return [p.shared_memory_per_block_optin for p in properties]


def get_device_smem_optin(tensor_idx: int = 0) -> int:
    """Shared memory per block in bytes of one CUDA device, 0 without one."""
    sizes = get_all_max_shared_mem()
    return sizes[tensor_idx] if tensor_idx < len(sizes) else 0


def check_shared_mem(arch: str = "none", tensor_idx: int = 0) -> bool:
    """Whether a CUDA device has the shared memory per block of the named architecture."""
    needed = {"ada": 101376, "ampere": 166912, "hopper": 232448}.get(arch, 102400)
    sizes = get_all_max_shared_mem()
    return tensor_idx < len(sizes) and sizes[tensor_idx] >= needed


def _capability_at_least(major: int, minor: int = 0) -> bool:
    return (get_device_capability() or (0, 0)) >= (major, minor)


def _is_nvidia() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None


_FACTS: dict[str, Callable[[], Any]] = {
    "device": get_available_device,
    "device_name": get_available_device,
    "device_platform": get_available_device,
    "device_torch_lib": lambda: getattr(torch, get_available_device()),
    "IS_AMD": lambda: torch.cuda.is_available() and torch.version.hip is not None,
    "IS_ARM": lambda: os.uname().machine in ("arm64", "aarch64"),
    "IS_INTEL": lambda: get_available_device() == "xpu",
    "IS_NPU": lambda: get_available_device() == "npu",
    "IS_NVIDIA": _is_nvidia,
    "IS_NVIDIA_HOPPER": lambda: _is_nvidia() and (get_device_capability() or (0,))[0] == 9,
    "IS_NVIDIA_BLACKWELL": lambda: (
        _is_nvidia() and (get_device_capability() or (0,))[0] in (10, 12)
    ),
    "IS_NVIDIA_SM100": lambda: _is_nvidia() and (get_device_capability() or (0,))[0] == 10,
    "IS_NVIDIA_SM120": lambda: _is_nvidia() and (get_device_capability() or (0,))[0] == 12,
    "IS_TF32_SUPPORTED": lambda: _is_nvidia() and _capability_at_least(8),
    "IS_TMA_SUPPORTED": lambda: _is_nvidia() and _capability_at_least(9),
    "IS_INTEL_ALCHEMIST": lambda: (
        get_available_device() == "xpu" and "Intel(R) Arc(TM) A" in torch.xpu.get_device_name(0)
    ),
    "IS_GATHER_SUPPORTED": lambda: find_spec_cached("triton") is not None,
    "FLA_CI_ENV": lambda: os.environ.get("FLA_CI_ENV") == "1",
    "FLA_CACHE_RESULTS": lambda: os.environ.get("FLA_CACHE_RESULTS", "1") == "1",
    "FLA_DISABLE_TENSOR_CACHE": lambda: True,  # `tensor_cache` remembers nothing
    "FLA_TENSOR_CACHE_SIZE": lambda: 0,
    "SUPPORTS_AUTOTUNE_CACHE": _supports_autotune_cache,
    "autotune_cache_kwargs": lambda: (
        {"cache_results": os.environ.get("FLA_CACHE_RESULTS", "1") == "1"}
        if _supports_autotune_cache()
        else {}
    ),
    "deprecate_kwarg": lambda: _deprecation().deprecate_kwarg,
    "Action": lambda: _deprecation().Action,
}


for _version in ("3_4_0", "3_5_1", "3_6_0", "3_7_1", "3_8_0"):
    _FACTS[f"TRITON_ABOVE_{_version}"] = functools.partial(
        _triton_at_least, _version.replace("_", ".")
    )


def _deprecation() -> ModuleType:
    return importlib.import_module("transformers.utils.deprecation")


def __getattr__(name: str) -> Any:
    fact = _FACTS.get(name) or _FACTS.get(name.upper() if name.startswith("is_") else name)
    if fact is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fact()


def __dir__() -> list[str]:
    return sorted({*vars(sys.modules[__name__]), *_FACTS})


def machine() -> dict[str, str]:
    """Processor, threads, versions and date: what a measured figure comes from."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = rows[0].partition(":")[2].strip() if rows else cpu
    return {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
    }
