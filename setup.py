# SPDX-License-Identifier: MIT
"""Builds the native kernels: one shared library, its kernels compiled once per instruction set.

It links neither Python nor torch, so one wheel serves every version of both. Without a compiler the
installation succeeds, and `fla doctor` says what is missing. A library that an earlier build left
in this tree is taken where it is newer than its sources; `build_ext --force` compiles in any case.
"""

import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "fla/ops/engine/native/src"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
ISAS = {"baseline": []} | (X86 if platform.machine() in ("x86_64", "AMD64") else {})


class BuildNative(build_ext):
    """`build_ext` for the one library of this package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so.0"  # not to be taken for a Python module

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        built = Path(self.get_ext_filename(extension.name))  # by an earlier build, in this tree
        if not self.force and newer(built, extension.depends):
            if not target.exists() or not target.samefile(built):
                shutil.copy2(built, target)
            return
        units = [("kernels", isa, flags) for isa, flags in ISAS.items()] + [("api", "any CPU", [])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self.compile_unit, units))
        self.compiler.link_shared_object(
            [name for names in objects for name in names],
            str(target),
            libraries=["pthread", "dl"] if sys.platform == "linux" else [],
            target_lang="c++",
            extra_postargs=["-Wl,-s"] if sys.platform == "linux" else [],
        )

    def compile_unit(self, unit: tuple[str, str, list[str]]) -> list[str]:
        """A source file for one instruction set; says so when it begins and ends."""
        source, isa, flags = unit
        print(f"compiling the native {source} for {isa} ...", flush=True)
        begun = time.monotonic()
        objects = self.compiler.compile(
            [f"{SOURCES}/{source}.cpp"],
            str(Path(self.build_temp) / isa.replace(" ", "-")),
            macros=[("FLA_ISA", isa)] if source == "kernels" else [],
            extra_postargs=FLAGS + flags,
        )
        print(
            f"compiled the native {source} for {isa}: {time.monotonic() - begun:.0f} s", flush=True
        )
        return objects


def newer(file: Path, sources: list[str]) -> bool:
    return file.exists() and file.stat().st_mtime > max(map(os.path.getmtime, sources))


class AnyPython(bdist_wheel):
    """The library does not link Python: the wheel is for every version of it on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


depends = ["setup.py", *(str(path) for path in Path(SOURCES).glob("*"))]
# optional: a missing compiler must not fail the installation
native = Extension(
    "fla.ops.engine.native.libfla_engine", [f"{SOURCES}/api.cpp"], depends=depends, optional=True
)
setup(
    ext_modules=[] if sys.platform == "win32" else [native],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
