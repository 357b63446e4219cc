"""Build prerequisites of llama.cpp, and the backends that can be built on this machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sollold.facts import dataclass
from sollold.machine.program import run_program

_ASK_SECONDS = 20.0
_MIN_CMAKE = (3, 18)
_VULKAN_HEADERS = (Path("/usr/include/vulkan/vulkan.h"), Path("/usr/local/include/vulkan/vulkan.h"))


@dataclass(frozen=True, slots=True)
class BuildBackend:
    """A compute backend: ``name`` is part of the folder's name, ``options`` go to CMake."""

    name: str
    options: tuple[str, ...] = ()


CPU = BuildBackend("cpu")
PORTABLE = "portable"
"""Prefix of the names of backends returned by `portable`."""
_HIP_ARCHITECTURES = "gfx803;gfx900;gfx906;gfx908;gfx90a;gfx1010;gfx1030;gfx1100;gfx1101;gfx1102"
"""Architectures of Debian's rocBLAS. Without a GPU present neither CMake nor llama.cpp picks any."""
_VARIANTS_NEED_GCC = 14
"""First GCC version that supports all 64-bit ARM instruction sets for which llama.cpp has a variant."""
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
"""Compiler flags against Intel's matrix instructions, with which llama.cpp crashes at its first batch: older
releases of GCC, such as Debian 12's, leave most of the tile configuration unset (GCC bug 114098), and on
newer processors only the main thread gets permission to use them (llama.cpp pull request 26954)."""
AMX_LIBRARY = "libggml-cpu-sapphirerapids.so"
"""The library of a portable build with these instructions."""


def backends() -> list[BuildBackend]:
    """Return the backends that can be built here, best first; the CPU backend is always last."""
    return [*_gpus(), CPU]


def for_gpu(name: str) -> BuildBackend | None:
    """Return the backend of this name; None if its toolkit is not installed."""
    return next((backend for backend in _gpus() if backend.name == name), None)


def portable(gpu: BuildBackend | None, architectures: str) -> BuildBackend:
    """Return a backend for any processor of this architecture: one library per instruction set, chosen at run
    time. With an older compiler on ARM it is a single one for the baseline instruction set.

    Args:
        gpu: GPU backend to build as well, as a library that is ignored where its driver is missing.
        architectures: that GPU's architectures, as a CMake list (``86;89``); empty: the usual ones.
    """
    options = ["-DGGML_NATIVE=OFF", "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    options.append("-DCMAKE_BUILD_RPATH=$ORIGIN")
    if platform.machine() in ("aarch64", "arm64") and _gcc() < _VARIANTS_NEED_GCC:
        options.append("-DGGML_CPU_ARM_ARCH=armv8-a")
    else:
        options += ["-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"]
    if gpu is None:
        return BuildBackend(PORTABLE, tuple(options))
    if chosen := architectures or {"hip": _HIP_ARCHITECTURES}.get(gpu.name, ""):
        options.append(f"-DCMAKE_{gpu.name.upper()}_ARCHITECTURES={chosen}")
    return BuildBackend(f"{PORTABLE}-{gpu.name}", (*options, *gpu.options))


def compiler_environment() -> dict[str, str]:
    """Return environment variables with flags for the C and C++ compilers, see `WITHOUT_AMX`."""
    if platform.machine() not in ("x86_64", "amd64"):
        return {}
    compilers = {"CFLAGS": os.environ.get("CC") or "cc", "CXXFLAGS": os.environ.get("CXX") or "c++"}
    return {
        variable: " ".join((os.environ.get(variable, ""), *WITHOUT_AMX)).strip()
        for variable, compiler in compilers.items()
        if _accepts(compiler, WITHOUT_AMX)
    }


def _accepts(compiler: str, flags: Sequence[str]) -> bool:
    """Return whether a compiler knows these flags. One that does not can't use the instructions either."""
    command = [*compiler.split(), *flags, "-E", "-x", "c", os.devnull]
    try:
        return run_program(command, _ASK_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _gpus() -> Iterator[BuildBackend]:
    """Yield the GPU backends whose toolkit is installed, best first."""
    if nvcc := _program("nvcc", "/usr/local/cuda/bin/nvcc", variable="CUDACXX"):
        yield BuildBackend("cuda", ("-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"))
    if _program("hipcc", "/opt/rocm/bin/hipcc"):
        yield BuildBackend("hip", ("-DGGML_HIP=ON",))
    if sys.platform == "darwin":
        yield BuildBackend("metal", ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"))
    if _program("glslc") and (os.environ.get("VULKAN_SDK") or any(map(Path.is_file, _VULKAN_HEADERS))):
        yield BuildBackend("vulkan", ("-DGGML_VULKAN=ON",))


def _gcc() -> int:
    """Return the compiler's major version; 0 if unknown."""
    compiler = os.environ.get("CXX") or "c++"
    try:
        output = run_program([compiler, "-dumpversion"], _ASK_SECONDS, with_errors=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    major = output.decode("utf-8", "replace").strip().partition(".")[0]
    return int(major) if major.isdigit() else 0


def missing() -> list[str]:
    """Return the missing prerequisites, each with the command that installs it."""
    wanted = []
    if not any(_program(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        wanted.append("a C++ compiler (on Debian: sudo apt install g++)")
    if not any(_program(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        wanted.append("a C compiler (on Debian: sudo apt install gcc)")
    return wanted


def generator() -> tuple[str, str] | None:
    """Return the paths of a recent enough CMake and of Ninja if both are installed."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        return None
    try:
        output = run_program([cmake, "--version"], _ASK_SECONDS, with_errors=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"version (\d+)\.(\d+)", output)
    if match is None or (int(match[1]), int(match[2])) < _MIN_CMAKE:
        return None
    return cmake, ninja


def _program(name: str, *places: str, variable: str = "") -> str:
    if variable and (named := os.environ.get(variable)) and shutil.which(named):
        return named
    found = shutil.which(name)
    if found:
        return found
    return next((place for place in places if os.access(place, os.X_OK)), "")
