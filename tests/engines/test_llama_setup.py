"""Setup of llama.cpp with fake tools: success, every failure, and cleanup of incomplete builds."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sollold import __version__
from sollold.cli.commands import add_commands
from sollold.engines.install import build, find, self_test, toolchain
from sollold.engines.install import setup as llama_setup
from sollold.engines.install.build_step import Cancelled, SetupFailed, Steps
from sollold.engines.install.setup import Progress, Setup, persist, set_up
from sollold.settings.schema import LlamaSettings
from tests.doubles import until

SERVER = """#!/bin/sh
case "$1" in
--version) echo "version: 0.5.0-dev (build ${BUILD:-11434}, commit 0c1e57098)";;
--help) echo "--port N --rpc SERVERS";;
esac
"""
WORKER = '#!/bin/sh\necho "-p, --port PORT"\n'
NINJA = """#!/bin/sh
while [ $# -gt 0 ]; do if [ "$1" = -C ]; then cd "$2"; fi; shift; done
echo "[1/2] Building a.cpp.o"
@MIDDLE@
mkdir -p bin
cp "@FOLDER@/made/llama-server" "@FOLDER@/made/ggml-rpc-server" bin/
cp "@FOLDER@/made/ggml-rpc-server" bin/llama-fit-params
echo "[2/2] Linking"
"""
CMAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "cmake version 3.28.1"; exit 0; fi
echo run >> "@FOLDER@/cmake-runs"
while [ $# -gt 0 ]; do if [ "$1" = -B ]; then mkdir -p "$2"; fi; shift; done
@MIDDLE@
"""
GIT = """#!/bin/sh
@MIDDLE@
for last; do :; done
case "$*" in
*rev-parse*) echo ${COMMIT:-0c1e57098bba43ac29e6e3b677cdceebdd22334f};;
*init*) mkdir -p "$last";;
esac
"""


class Workshop:
    """A PATH of fake build tools and a cache to build in.

    Attributes:
        progress_reports: the progress reported by the last setup.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.path = folder / "path"
        self.path.mkdir()
        (folder / "made").mkdir()
        self.program(folder / "made/llama-server", SERVER)
        self.program(folder / "made/ggml-rpc-server", WORKER)
        for name in ("c++", "cc"):
            self.tool(name, "#!/bin/sh\n")
        self.ninja()
        self.cmake()
        self.git()

    def program(self, file: Path, text: str, middle: str = "") -> None:
        file.write_text(text.replace("@FOLDER@", str(self.folder)).replace("@MIDDLE@", middle))
        file.chmod(0o755)

    def tool(self, name: str, text: str, middle: str = "") -> None:
        self.program(self.path / name, text, middle)

    def ninja(self, middle: str = "") -> None:
        self.tool("ninja", NINJA, middle)

    def cmake(self, middle: str = "") -> None:
        self.tool("cmake", CMAKE, middle)

    def git(self, middle: str = "") -> None:
        self.tool("git", GIT, middle)

    def setup(self, **more: Any) -> Setup:
        self.progress_reports: list[Progress] = []
        return Setup(LlamaSettings(**more), self.cache, self.progress_reports.append)

    def entries(self) -> list[str]:
        """The names in the cache's folder, without the log and the lock."""
        folder = self.cache / "llama.cpp"
        return sorted(entry.name for entry in folder.iterdir() if entry.name not in ("build.log", "lock"))

    def runs(self) -> int:
        """How often CMake has configured a build."""
        file = self.folder / "cmake-runs"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    workshop = Workshop(tmp_path)
    monkeypatch.setenv("PATH", f"{workshop.path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(find, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(llama_setup, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(llama_setup, "backends", lambda: [toolchain.CPU])
    monkeypatch.setattr(self_test, "self_test", lambda *arguments: None)
    return workshop


def install(folder: Path, server: str = SERVER, worker: str = "ggml-rpc-server") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("llama-server", server), (worker, WORKER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "llama-server"


def test_a_build_in_the_home_folder_is_used(workshop: Workshop) -> None:
    server = install(workshop.folder / "home/llama.cpp/build/bin", worker="rpc-server")
    found = workshop.setup().run()
    assert (found.server, found.worker.name, found.build) == (server, "rpc-server", "b11434")
    assert not workshop.cache.exists()


def test_a_build_of_a_shallow_clone_is_named_by_its_commit(workshop: Workshop) -> None:
    install(workshop.folder / "home/llama.cpp/build/bin", SERVER.replace("${BUILD:-11434}", "1"))
    assert workshop.setup().run().build == "b1-0c1e57098"


def test_the_order_of_the_search(workshop: Workshop) -> None:
    places = [
        workshop.cache / "llama.cpp/b11434-cpu/bin",
        workshop.folder / "packaged",
        workshop.folder / "home/llama.cpp/build/bin",
        workshop.path,
        workshop.cache / "llama.cpp/b11434-cuda/bin",
    ]
    for place in places:
        server = install(place)
        assert workshop.setup().run().server == server


def test_builds_without_rpc_or_worker_are_skipped(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    install(workshop.folder / "home/llama.cpp/build/bin", SERVER.replace("--rpc SERVERS", ""))
    install(workshop.cache / "llama.cpp/b1-cpu/bin", worker="another")
    caplog.set_level("INFO")
    assert workshop.setup().run().server == workshop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    assert "was built without RPC" in caplog.text


def test_programs_named_by_settings_are_used_or_refused(workshop: Workshop) -> None:
    server = install(workshop.folder / "mine")
    assert workshop.setup(server=str(server)).run().server == server
    assert workshop.setup(rpc_server=str(server.parent / "ggml-rpc-server")).run().server == server
    with pytest.raises(
        SetupFailed, match=r"nowhere/llama-server, but there is no ggml-rpc-server next to it"
    ):
        workshop.setup(server="/nowhere/llama-server").run()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -ILL $$", "instructions that this machine's processor does not have"),
        ("echo error while loading shared libraries: libcudart.so.12; exit 127", "install that library"),
    ],
)
def test_a_configured_program_that_does_not_run_is_refused_with_the_reason(
    workshop: Workshop, script: str, words: str
) -> None:
    server = install(workshop.folder / "mine", f"#!/bin/sh\n{script}\n")
    with pytest.raises(SetupFailed, match=f"mine/llama-server --version: .*{words}"):
        workshop.setup(server=str(server)).run()


@pytest.mark.parametrize("beside", [True, False])
def test_an_inaccessible_folder_is_skipped_or_named_in_the_error(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    closed = workshop.folder / "home"
    stat = os.stat

    def refuse(path: int | str | Path, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert workshop.setup().run().server == workshop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    more = {} if beside else {"rpc_server": str(closed / "ggml-rpc-server")}
    with pytest.raises(SetupFailed, match=r"home"):
        workshop.setup(server=str(closed / "llama-server"), **more).run()


def test_a_build_reports_progress_and_writes_a_log(workshop: Workshop) -> None:
    found = workshop.setup().run()
    assert found.server == workshop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    assert workshop.entries() == ["b11434-cpu"]
    stages = [progress.stage for progress in workshop.progress_reports]
    assert stages == ["finding", "fetching", "configuring", "building", "building", "checking", "ready"]
    fractions = [progress.fraction for progress in workshop.progress_reports]
    assert fractions == sorted(fractions)
    assert workshop.progress_reports[3].message == "building llama.cpp for cpu: 1 of 2"
    assert "[2/2] Linking" in (workshop.cache / "llama.cpp/build.log").read_text()
    assert workshop.setup().run() == found
    assert workshop.runs() == 1


def test_a_build_that_does_not_answer_in_time_is_not_built_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is busy, or reads it from a slow disk."""
    server = workshop.setup().run().server
    ask = find._ask

    def slow(program: Path, option: str) -> str:
        if workshop.cache in program.parents:
            raise find.LlamaSilent(program, "it took too long")
        return ask(program, option)

    monkeypatch.setattr(find, "_ask", slow)
    with pytest.raises(SetupFailed, match="it took too long; it is tried again every minute"):
        workshop.setup().run()
    other = install(workshop.folder / "home/llama.cpp/build/bin")
    assert workshop.setup().run().server == other
    monkeypatch.undo()
    assert workshop.runs() == 1
    assert server.exists()


def test_a_program_that_takes_too_long_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_ASK_SECONDS", 0.1)
    server = install(tmp_path, server="#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(find.LlamaSilent, match="llama-server does not run"):
        find.look_at(server, tmp_path / "ggml-rpc-server")


def test_a_compiler_error_is_named_and_the_build_removed(workshop: Workshop) -> None:
    workshop.ninja(
        'echo "FAILED: [code=1] b.o"; echo "c++ -c b.cpp"; echo "b.cpp:7:1: error: no such thing"; exit 1'
    )
    with pytest.raises(
        SetupFailed, match=r"building llama.cpp for cpu failed: b.cpp:7:1: error: no such thing"
    ):
        workshop.setup().run()
    assert workshop.entries() == []
    assert "no such thing" in (workshop.cache / "llama.cpp/build.log").read_text()


def test_a_backend_that_fails_to_build_is_replaced_by_the_cpu(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = toolchain.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    refuse = 'case "$*" in *CUDA=ON*) echo "CMake Error at x:1"; exit 1;; esac'
    workshop.tool("cmake", CMAKE.replace("while [", refuse + "\nwhile ["))
    assert workshop.setup().run().server.parent.parent.name == "b11434-cpu"
    # It is not tried again at the next start, and the reason is kept.
    runs = workshop.runs()
    assert workshop.setup().run().server.parent.parent.name == "b11434-cpu"
    assert workshop.runs() == runs
    assert "CMake Error at x:1" in (workshop.cache / "llama.cpp/b11434-cuda.failed").read_text()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_full_disk_does_not_count_as_a_failure_of_the_backend(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Otherwise the machine would not use its GPU until the next upgrade."""
    cuda = toolchain.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    error = "cc1plus: fatal error: error writing to /tmp/x.s: No space left on device"
    error = error if where == "elsewhere" else "collect2: error: ld returned 1 exit status"
    workshop.ninja(f'echo "{error}"; touch {workshop.folder}/full; exit 1')
    usage = shutil.disk_usage

    def disk_usage(path: Path) -> object:
        full = where == "here" and (workshop.folder / "full").exists()
        return SimpleNamespace(free=0) if full else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(SetupFailed, match=r"the disk became full while building llama\.cpp"):
        workshop.setup().run()
    assert workshop.entries() == [] and workshop.runs() == 1
    (workshop.folder / "full").unlink()
    workshop.ninja()
    assert workshop.setup().run().server.parent.parent.name == "b11434-cuda"


@pytest.mark.parametrize(
    "error",
    [
        "g++: fatal error: Killed signal terminated program cc1plus",
        "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        "cc1plus: out of memory allocating 65536 bytes after a total of 1216512 bytes",
        "virtual memory exhausted: Cannot allocate memory",
    ],
)
def test_running_out_of_memory_does_not_count_as_a_failure_of_the_backend(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    cuda = toolchain.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    workshop.ninja(f'echo "{error}"; exit 1')
    with pytest.raises(SetupFailed, match=r"memory ran out .* lower llama\.jobs"):
        workshop.setup().run()
    workshop.ninja()
    assert workshop.setup().run().server.parent.parent.name == "b11434-cuda"


def test_the_next_backend_is_built_if_a_toolkit_is_too_old(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Debian 13's ROCm, if Vulkan is installed as well."""
    names = ("hip", "vulkan")
    hip, vulkan = (toolchain.BuildBackend(name, (f"-DGGML_{name.upper()}=ON",)) for name in names)
    packaged = install(workshop.folder / "packaged")
    monkeypatch.setattr(llama_setup, "backends", lambda: [hip, vulkan, toolchain.CPU])
    error = "CMake Error at ggml-hip/CMakeLists.txt:57 (message):\n\n  At least ROCM/HIP V6.1 is required\n"
    workshop.tool(
        "cmake", CMAKE.replace("while [", f'case "$*" in *HIP=ON*) echo "{error}"; exit 1;; esac\nwhile [')
    )
    assert workshop.setup().run().server == packaged, "the first start tries the best backend"
    assert (
        "failed: At least ROCM/HIP V6.1 is required"
        in (workshop.cache / "llama.cpp/b11434-hip.failed").read_text()
    )
    assert workshop.setup().run().server.parent.parent.name == "b11434-vulkan"
    assert workshop.runs() == 2
    (workshop.folder / "packaged/llama-server").unlink()
    for path in (workshop.cache / "llama.cpp").glob("b11434-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert workshop.setup().run().server.parent.parent.name == "b11434-vulkan", (
        "without any build, the next backend is tried at once"
    )


def test_subprojects_find_the_ninja_in_use(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As llama.cpp's subproject for Vulkan's shaders, which searches PATH."""
    fetched = workshop.folder / "env/bin"
    fetched.mkdir(parents=True)
    check = f'[ "$(command -v ninja)" = {fetched}/ninja ] || {{ echo "CMake Error: no Ninja"; exit 1; }}'
    workshop.program(fetched / "cmake", CMAKE, check)
    workshop.program(fetched / "ninja", NINJA, check)
    monkeypatch.setattr(build, "generator", lambda: None)
    monkeypatch.setattr(build.Build, "_wheels", lambda self: (str(fetched / "cmake"), str(fetched / "ninja")))
    assert workshop.setup().run().server.parent.parent.name == "b11434-cpu"


def test_a_portable_build_has_loadable_backends_for_gpu_and_cpu(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupFailed, match="can't be built for cuda: its toolkit isn't installed here"):
        monkeypatch.setattr(toolchain, "_program", lambda *words, **named: "")
        workshop.setup().run_portable("cuda")
    monkeypatch.setattr(toolchain, "_program", lambda name, *words, **named: f"/bin/{name}")
    workshop.cmake(f'echo "$options" > {workshop.folder}/options')
    workshop.tool(
        "cmake", (workshop.path / "cmake").read_text().replace("echo run", 'options="$*"; echo run')
    )
    found = workshop.setup().run_portable("cuda", "86;89")
    assert found.server.parent.parent.name == "portable-cuda-b11434", "a name that the search does not find"
    options = (workshop.folder / "options").read_text()
    assert "-DGGML_BACKEND_DL=ON" in options and "-DGGML_NATIVE=OFF" in options
    assert "-DGGML_CUDA=ON" in options and "-DCMAKE_CUDA_ARCHITECTURES=86;89" in options
    assert workshop.setup().run_portable("cuda") == found and workshop.runs() == 1
    assert workshop.setup().run_portable().server.parent.parent.name == "portable-b11434"
    # CMake would detect ROCm's architecture from the GPU, and hosts that build images have none.
    assert workshop.setup().run_portable("hip") != found
    assert ";gfx1100;" in (workshop.folder / "options").read_text()


def test_the_build_has_no_amx_instructions(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CFLAGS", "-O3")
    workshop.cmake(f'echo "$CFLAGS,$CXXFLAGS" > {workshop.folder}/flags')
    workshop.ninja("mkdir -p bin; touch bin/libggml-cpu-sapphirerapids.so bin/libggml-cpu-icelake.so")
    found = workshop.setup().run()
    without = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert (workshop.folder / "flags").read_text() == f"-O3 {without},{without}\n"
    assert [file.name for file in found.server.parent.glob("*.so")] == ["libggml-cpu-icelake.so"]
    for name in ("cc", "c++"):
        workshop.tool(name, "#!/bin/sh\nexit 1\n")
    assert toolchain.compiler_environment() == {}, "an old compiler knows neither the flags nor AMX"


def test_the_command_offers_all_gpu_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    made: dict[str, argparse.ArgumentParser] = {}
    subparsers = parser.add_subparsers()

    def command(name: str, line: str, **more: object) -> argparse.ArgumentParser:
        return made.setdefault(name, subparsers.add_parser(name))

    add_commands(command)
    (gpu,) = (action for action in made["setup"]._actions if action.dest == "gpu")
    monkeypatch.setattr(toolchain, "_program", lambda name, *words, **named: name)
    monkeypatch.setenv("VULKAN_SDK", "/opt/vulkan")
    assert gpu.choices is not None
    assert [*gpu.choices, "cpu"] == [
        backend.name for backend in toolchain.backends() if backend.name != "metal"
    ]


def test_a_cpu_build_is_replaced_if_a_gpu_toolkit_is_installed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = install(workshop.folder / "packaged")
    mine = install(workshop.folder / "mine")
    cuda = toolchain.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    assert workshop.setup(build=False).run().server == packaged
    assert workshop.setup(server=str(mine)).run().server == mine
    assert workshop.setup().run().server.parent.parent.name == "b11434-cuda"
    assert workshop.runs() == 1


def test_a_build_of_an_earlier_release_is_replaced(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = workshop.cache / "llama.cpp"
    install(builds / "b9999-cpu/bin")
    old = install(builds / "b10000-cpu/bin")
    assert workshop.setup(build=False).run().server == old, "the highest build number"
    workshop.ninja('echo "b.cpp:7:1: error: no such thing"; exit 1')
    runs = workshop.runs()
    for _ in range(2):
        assert workshop.setup().run().server == old
    assert workshop.runs() == runs + 1, "a failed build is not tried at every start"
    workshop.ninja()
    note = builds / "b11434-cpu.failed"
    note.write_text(note.read_text().replace(f"sollold {__version__}", "sollold 0.0.1"))
    assert workshop.setup().run().server == builds / "b11434-cpu/bin/llama-server"
    assert workshop.setup().run().server == builds / "b11434-cpu/bin/llama-server"
    assert workshop.runs() == runs + 2


def test_an_earlier_gpu_build_is_replaced_only_by_a_gpu_build(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = install(workshop.cache / "llama.cpp/b10000-cuda/bin")
    assert workshop.setup().run().server == old, "its toolkit is not installed any more"
    cuda = toolchain.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    assert workshop.setup().run().server.parent.parent.name == "b11434-cuda"


def test_a_missing_compiler_is_reported_with_the_remedy(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(workshop.path))
    for name in ("c++", "cc"):
        (workshop.path / name).unlink()
    with pytest.raises(SetupFailed, match=r"without a C\+\+ compiler \(on Debian: sudo apt install g\+\+\)"):
        workshop.setup().run()


def test_a_missing_source_is_reported_with_both_reasons(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.git('echo "fatal: could not resolve host"; exit 128')
    with pytest.raises(SetupFailed, match=r"could not resolve host.*with pip failed.*llama.server"):
        workshop.setup().run()
    assert workshop.entries() == []


def test_a_failed_download_names_the_proxy(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.git('echo "fatal: proxy is $HTTPS_PROXY"; exit 128')
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:secret@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "example.com")
    with pytest.raises(SetupFailed, match=r"The proxy is http://proxy\.example:3128 \(HTTPS_PROXY\)"):
        workshop.setup().run()


def test_a_step_that_times_out_is_reported(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as out:
        steps = Steps(out, tmp_path / "log")
        with pytest.raises(SetupFailed, match=r"^git could not fetch it: timed out after 0 s \(full log: "):
            steps.run("git could not fetch it", ["/bin/sleep", "600"], timeout=0.2)
        assert steps.run("echo", ["/bin/echo", "well"], timeout=30) == "well"


def test_output_without_a_line_break_is_not_collected_as_one_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as out:
        steps = Steps(out, tmp_path / "log")
        lines: list[str] = []
        steps.run("zeros", ["/usr/bin/head", "-c", "1000000", "/dev/zero"], timeout=30, on_line=lines.append)
    assert sum(map(len, lines)) == 1_000_000
    assert max(map(len, lines)) <= 16 * 1024


def test_a_wrong_commit_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "badbadbad")
    monkeypatch.setattr(
        build.Build, "_unpack", lambda self: (_ for _ in ()).throw(SetupFailed("no pip here"))
    )
    with pytest.raises(SetupFailed, match=r"returned commit badbadbad instead of 0c1e57098bba"):
        workshop.setup().run()


def test_downloads_of_a_build_are_pinned_by_hashes() -> None:
    assert re.fullmatch("[0-9a-f]{40}", build.COMMIT) and re.fullmatch("[0-9a-f]{64}", build.SDIST[2])
    text = build.TOOLS.read_text().replace("\\\n", "")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert {"cmake", "ninja"} <= {words[0].partition("==")[0] for words in lines}
    for words in lines:
        assert "==" in words[0] and any(word.startswith("--hash=sha256:") for word in words), words


def test_a_build_that_does_not_run_is_not_installed(workshop: Workshop) -> None:
    workshop.program(workshop.folder / "made/llama-server", "#!/bin/sh\nexit 1\n")
    with pytest.raises(SetupFailed, match="does not run"):
        workshop.setup().run()
    assert workshop.entries() == []


def test_building_can_be_turned_off(workshop: Workshop) -> None:
    with pytest.raises(SetupFailed, match=r"llama.build is off"):
        workshop.setup(build=False).run()


def test_too_little_disk_space_is_reported_before_the_build(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_setup, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(SetupFailed, match=r"free some space or set node\.cache_dir"):
        workshop.setup().run()


def test_leftovers_of_an_interrupted_build_are_removed(workshop: Workshop) -> None:
    stale = workshop.cache / "llama.cpp/tmp-dead"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    workshop.setup().run()
    assert workshop.entries() == ["b11434-cpu"]


def test_cancelling_ends_the_compiler_and_removes_the_build(workshop: Workshop) -> None:
    workshop.ninja(f'echo $$ > "{workshop.folder}/ninja.pid"; sleep 600')
    setup = workshop.setup()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            setup.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pid = wait_for_pid(workshop.folder / "ninja.pid")
    setup.cancel()
    thread.join(10)
    assert isinstance(raised[0], Cancelled)
    assert workshop.entries() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_cancelling_the_task_ends_the_build(workshop: Workshop) -> None:
    workshop.ninja(f'echo $$ > "{workshop.folder}/ninja.pid"; sleep 600')
    task = asyncio.create_task(set_up(LlamaSettings(), workshop.cache, lambda progress: None))
    await asyncio.to_thread(wait_for_pid, workshop.folder / "ninja.pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert workshop.entries() == []


async def test_a_failed_setup_is_repeated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_setup, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(llama_setup, "BUILD_AFTER", 2)
    workshop.ninja("exit 1")
    failures: list[str] = []
    work = asyncio.create_task(
        persist(
            LlamaSettings(), workshop.cache, lambda progress: None, lambda error: failures.append(str(error))
        )
    )
    await until(lambda: len(failures) == 2, 30.0)
    assert workshop.runs() >= 2
    # llama.cpp is installed meanwhile.
    server = await asyncio.to_thread(install, workshop.folder / "packaged")
    assert (await asyncio.wait_for(work, 30)).server == server


async def test_an_unforeseen_error_does_not_end_the_setup(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find.Llama(Path("/l/llama-server"), Path("/l/ggml-rpc-server"), "b1", frozenset())
    results = iter((RuntimeError("can't start new thread"), RuntimeError("can't start new thread"), found))

    async def attempt(*arguments: object) -> find.Llama:
        if isinstance(result := next(results), Exception):
            raise result
        return result

    monkeypatch.setattr(llama_setup, "set_up", attempt)
    monkeypatch.setattr(llama_setup, "LOOK_SECONDS", 0.0)
    failures: list[str] = []
    work = persist(LlamaSettings(), folder, lambda progress: None, lambda error: failures.append(str(error)))
    assert await asyncio.wait_for(work, 5.0) is found
    assert failures == ["internal error: can't start new thread"]


def test_two_simultaneous_setups_build_once(workshop: Workshop) -> None:
    gate = workshop.folder / "gate"
    workshop.ninja(f'while [ ! -e "{gate}" ]; do sleep 0.05; done')
    code = (
        "import sys; from pathlib import Path;"
        "from sollold.engines.install import find, self_test, setup, toolchain;"
        "find.PACKAGED = Path('/nowhere'); setup.backends = lambda: [toolchain.CPU];"
        "self_test.self_test = lambda *arguments: None;"
        "from sollold.settings.schema import LlamaSettings;"
        f"cache = Path({str(workshop.cache)!r});"
        "s = setup.Setup(LlamaSettings(), cache, lambda p: print(p.stage, flush=True));"
        "print(s.run().build)"
    )
    root = str(Path(llama_setup.__file__).parents[3])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        for _ in range(2)
    ]
    outputs: list[list[str]] = [[], []]

    def read(number: int) -> None:
        for line in processes[number].stdout or ():
            outputs[number].append(line.strip())

    readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(2)]
    try:
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + 20
        while not (workshop.runs() and any("waiting" in lines for lines in outputs)):
            assert time.monotonic() < deadline, outputs
            time.sleep(0.02)
        gate.touch()
        for reader in readers:
            reader.join(20)
        assert [process.wait(20) for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert [lines[-1] for lines in outputs] == ["b11434", "b11434"]
    assert workshop.runs() == 1
    assert sorted("waiting" in lines for lines in outputs) == [False, True]


def test_a_build_that_ended_after_the_search_is_not_repeated(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = workshop.setup().run()
    found = iter([None, built])
    monkeypatch.setattr(Setup, "_find", lambda self: next(found))
    assert workshop.setup().run() == built
    assert workshop.runs() == 1


def wait_for_pid(file: Path) -> int:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(file.read_text())
