"""Builds the pinned llama.cpp: fetches the source, configures and compiles it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from sollold.engines.install.build_step import SetupFailed, Steps
from sollold.engines.install.toolchain import AMX_LIBRARY, BuildBackend, compiler_environment, generator
from sollold.settings.schema import GIB
from sollold.web_proxy import BadProxy, proxy_for

TAG = "b11434"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""Full hash of the commit to build, so that git verifies the content. `TAG` is only its name."""
UPSTREAM = "https://github.com/ggml-org/llama.cpp"
SDIST = ("llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
"""Python package (name, version, sha256) whose source distribution contains the same commit in
``vendor/llama.cpp``. pip downloads it from whatever index the user has configured."""
TOOLS = Path(__file__).with_name("build_tools.lock")
"""Lock file of the build tools from the package index, with hashes; `make lock` updates it."""
TARGETS = ("llama-server", "ggml-rpc-server", "llama-fit-params")
NEEDED_BYTES = 3 * GIB
"""Disk space needed during the build, in bytes."""
_COMPILER_BYTES = 3 * GIB // 2
"""Peak memory of one compiler process, in bytes."""
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_RPC=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    f"-DLLAMA_BUILD_NUMBER={TAG[1:]}",
    f"-DLLAMA_BUILD_COMMIT={COMMIT[:9]}",
)
_COUNT = re.compile(r"^\[(\d+)/(\d+)\]")

Tell = Callable[[str, float, str], None]
"""Progress callback: (stage, fraction of the whole, message for users)."""


class Build:
    """One build in ``work``, a temporary folder that the caller removes.

    Args:
        jobs: parallel compilers; 0: as many as cores and memory allow.
        tell: called with the progress.
    """

    def __init__(self, work: Path, steps: Steps, jobs: int, tell: Tell) -> None:
        self._work = work
        self._steps = steps
        self._jobs = jobs or _fitting_jobs()
        self._tell = tell
        self._env: Path | None = None

    def fetch(self) -> Path:
        """Fetch the source from upstream with git, or else from the source distribution.

        Raises:
            SetupFailed: neither is available.
        """
        self._tell("fetching", 0.01, f"fetching llama.cpp {TAG}")
        failures = []
        for fetch_source in (self._clone, self._unpack):
            try:
                return fetch_source()
            except SetupFailed as error:
                failures.append(str(error))
        raise SetupFailed(
            f"the source of llama.cpp {TAG} is not available. {'; '.join(failures)}. {_proxy_note()}"
            "Give this machine access to one of them, or build llama.cpp elsewhere and set llama.server"
        )

    def compile(self, source: Path, backend: BuildBackend) -> Path:
        """Configure and compile; return the folder with the programs.

        Raises:
            SetupFailed: a step failed; the message quotes the line that tells why.
        """
        cmake, ninja = generator() or self._wheels()
        target = self._work / f"build-{backend.name}"
        # The Vulkan shaders are a nested CMake project, which looks for Ninja on PATH.
        path = {"PATH": f"{Path(ninja).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        self._tell("configuring", 0.06, f"configuring llama.cpp for {backend.name}")
        self._steps.run(
            f"configuring llama.cpp for {backend.name}",
            [
                *(cmake, "-S", str(source), "-B", str(target), "-G", "Ninja"),
                *(f"-DCMAKE_MAKE_PROGRAM={ninja}", *_OPTIONS, *backend.options),
            ],
            env={**path, **compiler_environment()},
        )

        def line(text: str) -> None:
            if match := _COUNT.match(text):
                done, total = int(match[1]), max(int(match[2]), 1)
                self._tell(
                    "building",
                    0.1 + 0.88 * done / total,
                    f"building llama.cpp for {backend.name}: {done} of {total}",
                )

        self._steps.run(
            f"building llama.cpp for {backend.name}",
            [ninja, "-C", str(target), "-j", str(self._jobs), *TARGETS],
            env={**path, "NINJA_STATUS": "[%f/%t] "},
            on_line=line,
        )
        folder = self._work / f"out-{backend.name}" / "bin"
        folder.mkdir(parents=True)
        programs = [target / "bin" / name for name in TARGETS]
        for file in [*programs, *(f for f in (target / "bin").glob("*.so*") if f.name != AMX_LIBRARY)]:
            shutil.copy2(file, folder / file.name, follow_symlinks=False)
        shutil.rmtree(target, ignore_errors=True)
        return folder

    def _clone(self) -> Path:
        if shutil.which("git") is None:
            raise SetupFailed("git is not installed (on Debian: sudo apt install git)")
        source = self._work / "git"
        # An unreachable host must not block the build, and git must not prompt for a password.
        env = {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
            "GIT_HTTP_LOW_SPEED_TIME": "20",
        }
        step = f"fetching {UPSTREAM} with git"
        git = ["git", "-C", str(source)]
        self._steps.run(step, ["git", "ls-remote", "--exit-code", UPSTREAM, "HEAD"], env=env, timeout=20)
        self._steps.run(step, ["git", "init", "--quiet", str(source)], env=env)
        # By its hash: a tag can be moved.
        fetch = [*git, "fetch", "--quiet", "--depth", "1", UPSTREAM, COMMIT]
        self._steps.run(step, fetch, env=env, timeout=900)
        self._steps.run(step, [*git, "checkout", "--quiet", "FETCH_HEAD"], env=env)
        head = self._steps.run("git rev-parse", [*git, "rev-parse", "HEAD"]).strip()
        if head != COMMIT:
            raise SetupFailed(f"{UPSTREAM} returned commit {head[:40]} instead of {COMMIT}; not used")
        return source

    def _unpack(self) -> Path:
        name, version, digest = SDIST
        wanted = self._work / "source.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        # pip runs the package's build backend for its metadata, and would fetch that without checking hashes.
        step = f"fetching the source of {name} {version} with pip"
        self._install_tools(step)
        self._steps.run(
            step,
            [
                *self._pip("download", "--no-build-isolation", "--no-deps", "--no-binary", name),
                "--require-hashes",
                *("-r", str(wanted), "-d", str(self._work)),
            ],
            timeout=1800,
        )
        archive = next(self._work.glob("llama_cpp_python-*.tar.gz"), None)
        if archive is None:
            raise SetupFailed(f"pip fetched {name} {version}, but there is no archive")
        self._tell("fetching", 0.04, "unpacking llama.cpp")
        prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
        import tarfile  # rarely needed; keeps an idle daemon small

        with tarfile.open(archive) as packed:
            members = [member for member in packed.getmembers() if member.name.startswith(prefix)]
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later; the digest was checked anyway.
                packed.extraction_filter = tarfile.data_filter
            packed.extractall(self._work, members)
        archive.unlink()
        return self._work / prefix

    def _wheels(self) -> tuple[str, str]:
        """Install CMake and Ninja into an environment of this build; return their paths."""
        self._tell("fetching", 0.05, "fetching CMake and Ninja")
        self._install_tools("installing CMake and Ninja with pip")
        scripts = Path(self._python()).parent
        return str(scripts / "cmake"), str(scripts / "ninja")

    def _install_tools(self, step: str) -> None:
        wheels = ("--only-binary", ":all:", "--require-hashes", "-r", str(TOOLS))
        self._steps.run(step, self._pip("install", *wheels), timeout=900)

    def _pip(self, command: str, *arguments: str) -> list[str]:
        options = ("--disable-pip-version-check", "--no-input", "--quiet")
        return [self._python(), "-m", "pip", *options, command, *arguments]

    def _python(self) -> str:
        if self._env is None:
            folder = self._work / "env"
            self._steps.run(
                "creating a Python environment (on Debian: sudo apt install python3-venv)",
                [sys.executable, "-m", "venv", str(folder)],
                timeout=300,
            )
            self._env = folder
        return str(self._env / "bin" / "python")


def _proxy_note() -> str:
    """Return a sentence naming the proxy that git and pip use, which they read from the environment."""
    try:
        proxy = proxy_for(UPSTREAM)
    except BadProxy as error:
        return f"{error}. "
    return f"The proxy is {proxy}. " if proxy else ""


def _fitting_jobs() -> int:
    fitting = psutil.virtual_memory().available // _COMPILER_BYTES
    return max(1, min(os.cpu_count() or 1, int(fitting)))
