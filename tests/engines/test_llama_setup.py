"""The set-up against programs that only pretend: every way it can fail, and nothing left half-done."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sollold import __version__
from sollold.cli.commands import add_commands
from sollold.engines.install import build, find, toolchain
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


class Shop:
    """A PATH of pretended tools and a cache to build in."""

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

    def setup(self, **more: object) -> Setup:
        self.told: list[Progress] = []
        return Setup(LlamaSettings(**more), self.cache, self.told.append)  # type: ignore[arg-type]

    def left(self) -> list[str]:
        """What lies in the cache besides the log and the lock."""
        folder = self.cache / "llama.cpp"
        return sorted(one.name for one in folder.iterdir() if one.name not in ("build.log", "lock"))

    def runs(self) -> int:
        file = self.folder / "cmake-runs"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path)
    monkeypatch.setenv("PATH", f"{shop.path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(find, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(llama_setup, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(llama_setup, "backends", lambda: [toolchain.CPU])
    return shop


def install(folder: Path, server: str = SERVER, worker: str = "ggml-rpc-server") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("llama-server", server), (worker, WORKER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "llama-server"


def test_one_in_the_home_is_used_and_nothing_is_built(shop: Shop):
    server = install(shop.folder / "home/llama.cpp/build/bin", worker="rpc-server")
    found = shop.setup().run()
    assert (found.server, found.worker.name, found.build) == (server, "rpc-server", "b11434")
    assert found.commit == "0c1e57098"
    assert not shop.cache.exists()


def test_the_order_in_which_they_are_taken(shop: Shop):
    places = [
        shop.cache / "llama.cpp/b11434-cpu/bin",
        shop.folder / "packaged",
        shop.folder / "home/llama.cpp/build/bin",
        shop.path,
        shop.cache / "llama.cpp/b11434-cuda/bin",
    ]
    for place in places:
        server = install(place)
        assert shop.setup().run().server == server


def test_one_without_rpc_or_without_its_worker_is_passed_over(shop: Shop, caplog: pytest.LogCaptureFixture):
    install(shop.folder / "home/llama.cpp/build/bin", SERVER.replace("--rpc SERVERS", ""))
    install(shop.cache / "llama.cpp/b1-cpu/bin", worker="another")
    caplog.set_level("INFO")
    assert shop.setup().run().server == shop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    assert "was built without RPC" in caplog.text


def test_what_the_settings_name_is_used_or_complained_of(shop: Shop):
    server = install(shop.folder / "mine")
    assert shop.setup(server=str(server)).run().server == server
    assert shop.setup(rpc_server=str(server.parent / "ggml-rpc-server")).run().server == server
    with pytest.raises(
        SetupFailed, match=r"nowhere/llama-server, but there is no ggml-rpc-server next to it"
    ):
        shop.setup(server="/nowhere/llama-server").run()


@pytest.mark.parametrize("beside", [True, False])
def test_a_folder_that_may_not_be_entered_is_said_and_ends_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, beside: bool
):
    closed = shop.folder / "home"
    stat = os.stat

    def refuse(path: object, **more: object) -> object:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "stat", refuse)
    assert shop.setup().run().server == shop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    more = {} if beside else {"rpc_server": str(closed / "ggml-rpc-server")}
    with pytest.raises(SetupFailed, match=r"home"):
        shop.setup(server=str(closed / "llama-server"), **more).run()


def test_a_build_ends_whole_with_progress_and_a_log(shop: Shop):
    found = shop.setup().run()
    assert found.server == shop.cache / "llama.cpp/b11434-cpu/bin/llama-server"
    assert shop.left() == ["b11434-cpu"]
    stages = [one.stage for one in shop.told]
    assert stages == ["finding", "fetching", "configuring", "building", "building", "checking", "ready"]
    fractions = [one.fraction for one in shop.told]
    assert fractions == sorted(fractions)
    assert shop.told[3].message == "building llama.cpp for cpu: 1 of 2"
    assert "[2/2] Linking" in (shop.cache / "llama.cpp/build.log").read_text()
    assert shop.setup().run() == found
    assert shop.runs() == 1


def test_a_line_that_fails_is_named_and_nothing_is_left(shop: Shop):
    shop.ninja(
        'echo "FAILED: [code=1] b.o"; echo "c++ -c b.cpp"; echo "b.cpp:7:1: error: no such thing"; exit 1'
    )
    with pytest.raises(
        SetupFailed, match=r"building llama.cpp for cpu failed: b.cpp:7:1: error: no such thing"
    ):
        shop.setup().run()
    assert shop.left() == []
    assert "no such thing" in (shop.cache / "llama.cpp/build.log").read_text()


def test_a_backend_that_does_not_build_gives_way_to_the_processor(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    cuda = llama_setup.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    refuse = 'case "$*" in *CUDA=ON*) echo "CMake Error at x:1"; exit 1;; esac'
    shop.tool("cmake", CMAKE.replace("while [", refuse + "\nwhile ["))
    assert shop.setup().run().server.parent.parent.name == "b11434-cpu"
    # It is not tried again with every start, and the reason stays.
    runs = shop.runs()
    assert shop.setup().run().server.parent.parent.name == "b11434-cpu"
    assert shop.runs() == runs
    assert "CMake Error at x:1" in (shop.cache / "llama.cpp/b11434-cuda.failed").read_text()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_disk_that_becomes_full_is_no_fault_of_the_backend(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Else a machine would do without its GPU until the next upgrade."""
    cuda = llama_setup.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    said = "cc1plus: fatal error: error writing to /tmp/x.s: No space left on device"
    said = said if where == "elsewhere" else "collect2: error: ld returned 1 exit status"
    shop.ninja(f'echo "{said}"; touch {shop.folder}/full; exit 1')
    usage = shutil.disk_usage

    def measured(path: Path) -> object:
        full = where == "here" and (shop.folder / "full").exists()
        return SimpleNamespace(free=0) if full else usage(path)

    monkeypatch.setattr(llama_setup.shutil, "disk_usage", measured)
    with pytest.raises(SetupFailed, match=r"the disk became full while building llama\.cpp"):
        shop.setup().run()
    assert shop.left() == [] and shop.runs() == 1
    (shop.folder / "full").unlink()
    shop.ninja()
    assert shop.setup().run().server.parent.parent.name == "b11434-cuda"


@pytest.mark.parametrize(
    "said",
    [
        "g++: fatal error: Killed signal terminated program cc1plus",
        "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        "cc1plus: out of memory allocating 65536 bytes after a total of 1216512 bytes",
        "virtual memory exhausted: Cannot allocate memory",
    ],
)
def test_memory_that_runs_out_is_no_fault_of_the_backend(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, said: str
):
    cuda = llama_setup.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    shop.ninja(f'echo "{said}"; exit 1')
    with pytest.raises(SetupFailed, match=r"memory ran out .* lower llama\.jobs"):
        shop.setup().run()
    shop.ninja()
    assert shop.setup().run().server.parent.parent.name == "b11434-cuda"


def test_where_one_toolkit_is_too_old_the_next_is_taken(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    """Debian 13's ROCm is, and Vulkan's may be there too."""
    names = ("hip", "vulkan")
    hip, vulkan = (llama_setup.BuildBackend(name, (f"-DGGML_{name.upper()}=ON",)) for name in names)
    packaged = install(shop.folder / "packaged")
    monkeypatch.setattr(llama_setup, "backends", lambda: [hip, vulkan, toolchain.CPU])
    said = "CMake Error at ggml-hip/CMakeLists.txt:57 (message):\n\n  At least ROCM/HIP V6.1 is required\n"
    shop.tool(
        "cmake", CMAKE.replace("while [", f'case "$*" in *HIP=ON*) echo "{said}"; exit 1;; esac\nwhile [')
    )
    assert shop.setup().run().server == packaged, "the first start tries the best"
    assert (
        "failed: At least ROCM/HIP V6.1 is required"
        in (shop.cache / "llama.cpp/b11434-hip.failed").read_text()
    )
    assert shop.setup().run().server.parent.parent.name == "b11434-vulkan"
    assert shop.runs() == 2
    (shop.folder / "packaged/llama-server").unlink()
    for left in (shop.cache / "llama.cpp").glob("b11434-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert shop.setup().run().server.parent.parent.name == "b11434-vulkan", "with none, it goes on at once"


def test_what_looks_for_ninja_by_itself_finds_the_one_in_use(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    """As the project of Vulkan's shaders does, within llama.cpp's."""
    fetched = shop.folder / "env/bin"
    fetched.mkdir(parents=True)
    look = f'[ "$(command -v ninja)" = {fetched}/ninja ] || {{ echo "CMake Error: no Ninja"; exit 1; }}'
    shop.program(fetched / "cmake", CMAKE, look)
    shop.program(fetched / "ninja", NINJA, look)
    monkeypatch.setattr(build, "generator", lambda: None)
    monkeypatch.setattr(build.Build, "_wheels", lambda self: (str(fetched / "cmake"), str(fetched / "ninja")))
    assert shop.setup().run().server.parent.parent.name == "b11434-cpu"


def test_what_an_image_carries_has_the_gpus_library_beside_the_processors(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SetupFailed, match="can't be built for cuda: its toolkit isn't installed here"):
        monkeypatch.setattr(toolchain, "_program", lambda *words, **named: "")
        shop.setup().run_portable("cuda")
    monkeypatch.setattr(toolchain, "_program", lambda name, *words, **named: f"/bin/{name}")
    shop.cmake(f'echo "$options" > {shop.folder}/options')
    shop.tool("cmake", (shop.path / "cmake").read_text().replace("echo run", 'options="$*"; echo run'))
    found = shop.setup().run_portable("cuda", "86;89")
    assert found.server.parent.parent.name == "portable-cuda-b11434", "a name that no search finds"
    options = (shop.folder / "options").read_text()
    assert "-DGGML_BACKEND_DL=ON" in options and "-DGGML_NATIVE=OFF" in options
    assert "-DGGML_CUDA=ON" in options and "-DCMAKE_CUDA_ARCHITECTURES=86;89" in options
    assert shop.setup().run_portable("cuda") == found and shop.runs() == 1
    assert shop.setup().run_portable().server.parent.parent.name == "portable-b11434"
    # CMake asks the GPU for the architecture of ROCm, and where images are built there is none.
    assert shop.setup().run_portable("hip") != found
    assert ";gfx1100;" in (shop.folder / "options").read_text()


def test_the_command_offers_the_gpus_that_can_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    made: dict[str, argparse.ArgumentParser] = {}
    subparsers = parser.add_subparsers()

    def command(name: str, line: str, **more: object) -> argparse.ArgumentParser:
        return made.setdefault(name, subparsers.add_parser(name))

    add_commands(command)
    (gpu,) = (one for one in made["setup"]._actions if one.dest == "gpu")
    monkeypatch.setattr(toolchain, "_program", lambda name, *words, **named: name)
    monkeypatch.setenv("VULKAN_SDK", "/opt/vulkan")
    assert gpu.choices is not None
    assert [*gpu.choices, "cpu"] == [one.name for one in toolchain.backends() if one.name != "metal"]


def test_where_a_toolkit_is_one_for_the_processor_alone_is_not_enough(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    packaged = install(shop.folder / "packaged")
    mine = install(shop.folder / "mine")
    cuda = llama_setup.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    assert shop.setup(build=False).run().server == packaged
    assert shop.setup(server=str(mine)).run().server == mine
    assert shop.setup().run().server.parent.parent.name == "b11434-cuda"
    assert shop.runs() == 1


def test_a_build_of_an_earlier_release_gives_way(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    builds = shop.cache / "llama.cpp"
    install(builds / "b9999-cpu/bin")
    old = install(builds / "b10000-cpu/bin")
    assert shop.setup(build=False).run().server == old, "the newest, by number"
    shop.ninja('echo "b.cpp:7:1: error: no such thing"; exit 1')
    runs = shop.runs()
    for _ in range(2):
        assert shop.setup().run().server == old
    assert shop.runs() == runs + 1, "what fails is not tried with every start"
    shop.ninja()
    note = builds / "b11434-cpu.failed"
    note.write_text(note.read_text().replace(f"sollold {__version__}", "sollold 0.0.1"))
    assert shop.setup().run().server == builds / "b11434-cpu/bin/llama-server"
    assert shop.setup().run().server == builds / "b11434-cpu/bin/llama-server"
    assert shop.runs() == runs + 2


def test_an_earlier_build_for_a_gpu_gives_way_only_to_one_for_the_gpu(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    old = install(shop.cache / "llama.cpp/b10000-cuda/bin")
    assert shop.setup().run().server == old, "its toolkit is gone"
    cuda = llama_setup.BuildBackend("cuda", ("-DGGML_CUDA=ON",))
    monkeypatch.setattr(llama_setup, "backends", lambda: [cuda, toolchain.CPU])
    assert shop.setup().run().server.parent.parent.name == "b11434-cuda"


def test_no_compiler_is_said_with_what_to_do(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(shop.path))
    for name in ("c++", "cc"):
        (shop.path / name).unlink()
    with pytest.raises(SetupFailed, match=r"without a C\+\+ compiler \(on Debian: sudo apt install g\+\+\)"):
        shop.setup().run()


def test_no_source_is_said_with_both_reasons(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    shop.git('echo "fatal: could not resolve host"; exit 128')
    with pytest.raises(SetupFailed, match=r"could not resolve host.*pip could not fetch.*llama.server"):
        shop.setup().run()
    assert shop.left() == []


def test_a_source_that_does_not_come_names_the_proxy(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    shop.git('echo "fatal: proxy is $HTTPS_PROXY"; exit 128')
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:secret@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "example.com")
    with pytest.raises(SetupFailed, match=r"The proxy is http://proxy\.example:3128 \(HTTPS_PROXY\)"):
        shop.setup().run()


def test_a_step_that_took_too_long_says_so(tmp_path: Path):
    with (tmp_path / "log").open("wb") as out:
        steps = Steps(out, tmp_path / "log")
        with pytest.raises(SetupFailed, match=r"^git could not fetch it: timed out after 0 s \(full log: "):
            steps.run("git could not fetch it", ["/bin/sleep", "600"], timeout=0.2)
        assert steps.run("echo", ["/bin/echo", "well"], timeout=30) == "well"


def test_another_commit_is_not_built(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMMIT", "badbadbad")
    monkeypatch.setattr(
        build.Build, "_unpack", lambda self: (_ for _ in ()).throw(SetupFailed("no pip here"))
    )
    with pytest.raises(SetupFailed, match=r"returned commit badbadbad instead of 0c1e57098bba"):
        shop.setup().run()


def test_what_a_build_fetches_is_pinned_by_hashes():
    assert re.fullmatch("[0-9a-f]{40}", build.COMMIT) and re.fullmatch("[0-9a-f]{64}", build.SDIST[2])
    text = build.TOOLS.read_text().replace("\\\n", "")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert {"cmake", "ninja"} <= {words[0].partition("==")[0] for words in lines}
    for words in lines:
        assert "==" in words[0] and any(word.startswith("--hash=sha256:") for word in words), words


def test_a_build_that_does_not_run_is_not_put_in_place(shop: Shop):
    shop.program(shop.folder / "made/llama-server", "#!/bin/sh\nexit 1\n")
    with pytest.raises(SetupFailed, match="does not run"):
        shop.setup().run()
    assert shop.left() == []


def test_building_can_be_turned_off(shop: Shop):
    with pytest.raises(SetupFailed, match=r"llama.build is off"):
        shop.setup(build=False).run()


def test_a_full_disk_is_said_before(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_setup, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(SetupFailed, match=r"free some space or set node\.cache_dir"):
        shop.setup().run()


def test_what_an_interrupted_build_left_is_removed(shop: Shop):
    stale = shop.cache / "llama.cpp/tmp-dead"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    shop.setup().run()
    assert shop.left() == ["b11434-cpu"]


def test_cancelling_ends_the_compiler_and_leaves_nothing(shop: Shop):
    shop.ninja(f'echo $$ > "{shop.folder}/ninja.pid"; sleep 600')
    setup = shop.setup()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            setup.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pid = wait_for_pid(shop.folder / "ninja.pid")
    setup.cancel()
    thread.join(10)
    assert isinstance(raised[0], Cancelled)
    assert shop.left() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_cancelled_task_ends_it_too(shop: Shop):
    shop.ninja(f'echo $$ > "{shop.folder}/ninja.pid"; sleep 600')
    task = asyncio.create_task(set_up(LlamaSettings(), shop.cache, lambda progress: None))
    await asyncio.to_thread(wait_for_pid, shop.folder / "ninja.pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert shop.left() == []


async def test_what_failed_is_looked_for_and_tried_again(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_setup, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(llama_setup, "BUILD_AFTER", 2)
    shop.ninja("exit 1")
    failures: list[str] = []
    work = asyncio.create_task(
        persist(LlamaSettings(), shop.cache, lambda told: None, lambda error: failures.append(str(error)))
    )
    await until(lambda: len(failures) == 2, 30.0)
    assert shop.runs() >= 2
    # Somebody installs one.
    server = await asyncio.to_thread(install, shop.folder / "packaged")
    assert (await asyncio.wait_for(work, 30)).server == server


def test_two_at_once_build_once(shop: Shop):
    gate = shop.folder / "gate"
    shop.ninja(f'while [ ! -e "{gate}" ]; do sleep 0.05; done')
    code = (
        "import sys; from pathlib import Path; from sollold.engines.install import find, setup, toolchain;"
        f"find.PACKAGED = Path('/nowhere'); setup.backends = lambda: [toolchain.CPU];"
        "from sollold.settings.schema import LlamaSettings;"
        f"cache = Path({str(shop.cache)!r});"
        "s = setup.Setup(LlamaSettings(), cache, lambda p: print(p.stage, flush=True));"
        "print(s.run().build)"
    )
    root = str(Path(llama_setup.__file__).parents[3])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        for _ in range(2)
    ]
    told: list[list[str]] = [[], []]

    def read(number: int) -> None:
        for line in both[number].stdout or ():
            told[number].append(line.strip())

    readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(2)]
    try:
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + 20
        while not (shop.runs() and any("waiting" in lines for lines in told)):
            assert time.monotonic() < deadline, told
            time.sleep(0.02)
        gate.touch()
        for reader in readers:
            reader.join(20)
        assert [one.wait(20) for one in both] == [0, 0]
    finally:
        for one in both:
            if one.poll() is None:
                one.send_signal(signal.SIGKILL)
                one.wait()
    assert [one[-1] for one in told] == ["b11434", "b11434"]
    assert shop.runs() == 1
    assert sorted("waiting" in one for one in told) == [False, True]


def wait_for_pid(file: Path) -> int:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(file.read_text())
