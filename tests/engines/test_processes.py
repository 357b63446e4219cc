"""Child processes: start, output, end, journal, logs and ports."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollold.engines.llamacpp import process_log
from sollold.engines.llamacpp.child_journal import MARK, Journal, started
from sollold.engines.llamacpp.engine_key import EngineKey
from sollold.engines.llamacpp.exit_reason import crashed, exit_reason
from sollold.engines.llamacpp.llama_server import Head
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.process import Process
from sollold.engines.llamacpp.process_log import ProcessLog, prune
from tests.doubles import until

ROOT = Path(__file__).parents[2]


async def begin(folder: Path, *command: str, **more: Any) -> Process:
    return await Process.start(
        "test",
        command,
        deployment="d",
        journal=Journal(folder / "children.json"),
        log_file=folder / "logs/d/test.log",
        **more,
    )


def test_the_start_of_a_process_whose_name_is_cut_within_a_letter_is_known(tmp_path: Path) -> None:
    program = tmp_path / ("\u00e4" * 8)  # the kernel keeps 15 of its 16 bytes
    program.write_text("#!/bin/sh\nread line\n")
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as child:
        assert started(child.pid)


async def test_output_and_exit_status_are_logged(folder: Path) -> None:
    lines: list[str] = []
    process = await begin(folder, "/bin/sh", "-c", "echo one; echo two >&2; exit 3", on_line=lines.append)
    assert await asyncio.wait_for(process.exited, 10) == 3
    assert lines == ["one", "two"] == process.last_lines()
    assert (folder / "logs/d/test.log").read_text().splitlines()[1:] == ["one", "two", "[exit 3]"]
    assert (folder / "children.json").read_text() == "[]"


async def test_only_lines_with_the_prefix_reach_the_callback(folder: Path) -> None:
    lines: list[str] = []
    script = "printf 'a\\nstate: 1\\n\\nb\\nsta'; sleep 0.1; printf 'te: 2\\nlast'"
    process = await begin(folder, "/bin/sh", "-c", script, on_line=lines.append, prefix="state:", gather=0.02)
    assert await asyncio.wait_for(process.exited, 10) == 0
    assert lines == ["state: 1", "state: 2"]
    assert process.last_lines() == ["a", "state: 1", "b", "state: 2", "last"]
    log = (folder / "logs/d/test.log").read_text()
    assert "a\nstate: 1\n\nb\nstate: 2\nlast" in log


async def test_a_very_long_line_is_split(folder: Path) -> None:
    process = await begin(folder, "/bin/sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x")
    assert await asyncio.wait_for(process.exited, 10) == 0
    assert sum(map(len, process.last_lines())) == 300_000


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_a_child_is_killed_before_the_daemon_when_memory_runs_out(folder: Path) -> None:
    process = await begin(folder, "/bin/sh", "-c", "echo ready; exec sleep 60")
    await until(lambda: process.last_lines() == ["ready"])
    assert oom_score(process.pid) > oom_score(os.getpid())
    await process.stop(grace=0.0)


async def test_a_child_that_ignores_sigterm_is_killed(folder: Path) -> None:
    process = await begin(folder, "/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    await until(lambda: process.last_lines() == ["ready"])
    await process.stop(grace=0.2)
    assert process.exited.result() == -signal.SIGKILL


PARENT = "{} sleep 600 & echo $!; exec sleep 600"
"""Starts a child that keeps the output open, as Ollama's runner does."""


@pytest.mark.parametrize("runner", ["", "timeout 600"], ids=["", "in a group of its own"])
@pytest.mark.parametrize("alone", [True, False])
async def test_descendants_of_a_child_end_with_it(folder: Path, alone: bool, runner: str) -> None:
    process = await begin(folder, "/bin/sh", "-c", PARENT.format(runner))
    await until(lambda: process.last_lines())
    descendant = int(process.last_lines()[0])
    start_time = started(descendant)
    assert start_time
    await until(lambda: not runner or os.getpgid(descendant) == descendant)
    if alone:
        os.kill(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert await asyncio.wait_for(process.exited, 10) == -signal.SIGKILL
    await until(lambda: started(descendant) != start_time)


WRAPPED = """
import socket
held = b"x" * (64 << 20)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    sum(range(100_000))
"""


async def test_a_program_run_by_a_script_is_measured_and_its_signal_is_known(folder: Path) -> None:
    script = folder / "llama-server"
    script.write_text(f"#!/bin/sh\n{sys.executable} -c '{WRAPPED}'\nexit $?\n")
    script.chmod(0o755)
    process = await begin(folder, str(script))
    await until(process.last_lines)
    assert process.memory() > 64 << 20
    assert process.addresses() == [("127.0.0.1", int(process.last_lines()[0]))]
    before = process.work()
    assert before is not None
    await until(lambda: (process.work() or 0) >= before + 5)
    (program,) = process.pids() - {process.pid}
    os.kill(program, signal.SIGKILL)
    assert await asyncio.wait_for(process.exited, 10) == -signal.SIGKILL


async def test_the_loop_never_looks_through_all_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids, callers = psutil.pids, set()

    def watched() -> list[int]:
        callers.add(threading.get_ident())
        return pids()

    monkeypatch.setattr(psutil, "pids", watched)
    process = await begin(folder, "/bin/sh", "-c", "trap '' TERM; sleep 600 & echo ready; wait; sleep 600")
    await until(process.last_lines)
    assert await asyncio.to_thread(process.pids) > {process.pid}
    assert process.work() is not None
    await process.stop(grace=0.2)
    assert process.exited.result() == -signal.SIGKILL
    assert callers and threading.get_ident() not in callers


def test_processes_with_the_journals_mark_are_killed(folder: Path) -> None:
    path = folder / "children.json"
    mine = {**os.environ, MARK: Journal(path).mark}
    others = {**os.environ, MARK: Journal(folder / "other" / "children.json").mark}
    leftover = subprocess.Popen(["/bin/sleep", "600"], env=mine)
    foreign = subprocess.Popen(["/bin/sleep", "600"], env=others)
    try:
        Journal(path).kill_leftovers()
        assert leftover.wait(10) == -signal.SIGKILL
        assert foreign.poll() is None
    finally:
        for process in (leftover, foreign):
            process.kill()
            process.wait(10)


def test_a_folder_with_the_same_path_has_another_mark(folder: Path) -> None:
    """As in two containers with a common PID namespace."""
    path = folder / "state" / "children.json"
    path.parent.mkdir()
    first = Journal(path).mark
    assert Journal(path).mark == first
    path.parent.rename(folder / "other")
    path.parent.mkdir()
    assert Journal(path).mark != first


async def test_a_child_inherits_no_secrets_and_no_llama_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOLD_CLUSTER_TOKEN", "hush hush")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    process = await begin(folder, "/usr/bin/env", env={"LLAMA_CACHE": "/x"})
    await process.exited
    environment = (folder / "logs/d/test.log").read_text()
    assert "hush hush" not in environment
    assert "LLAMA_ARG" not in environment
    assert "LLAMA_CACHE=/x" in environment


async def test_a_child_ignores_sigpipe(folder: Path) -> None:
    process = await begin(folder, "/bin/grep", "SigIgn", "/proc/self/status")
    await process.exited
    mask = int(process.last_lines()[0].split()[1], 16)
    assert mask >> (signal.SIGPIPE - 1) & 1


async def test_a_missing_program_gives_a_reason(folder: Path) -> None:
    process = await begin(folder, str(folder / "nothing"))
    assert await process.exited != 0
    reason = exit_reason(process.exited.result(), process.last_lines())
    assert reason == (
        f"{folder}/nothing can't be run: No such file or directory: it was removed or replaced; "
        "restart sollold, which finds or builds another"
    )


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(b"#!/bin/sh\n", 0o600, "mounted noexec; set node.cache_dir"), (b"\x7fELF", 0o700, "it is damaged")],
)
async def test_a_program_that_cannot_be_executed_gives_a_reason(
    folder: Path, content: bytes, mode: int, words: str
) -> None:
    program = folder / "program"
    program.write_bytes(content)
    program.chmod(mode)
    process = await begin(folder, str(program))
    assert await process.exited == 127
    assert words in exit_reason(127, process.last_lines())


async def test_a_failed_thread_start_gives_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(OSError, match="test can't be started: the system allows this user no more threads"):
        await begin(folder, "true")


async def test_arguments_in_another_encoding_are_passed_unchanged(folder: Path) -> None:
    process = await asyncio.wait_for(begin(folder, "/bin/echo", "caf\udce9.gguf"), 10)
    assert await process.exited == 0
    assert b"caf\xe9.gguf\n" in (folder / "logs/d/test.log").read_bytes()


@pytest.mark.parametrize("argument", ["a\0b", "\ud800"])
async def test_an_invalid_command_is_an_error(folder: Path, argument: str) -> None:
    with pytest.raises(OSError, match="invalid command"):
        await asyncio.wait_for(begin(folder, "/bin/echo", argument), 10)


async def test_a_cancelled_start_leaves_no_child(folder: Path) -> None:
    start = asyncio.create_task(begin(folder, "/bin/sleep", "600"))
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    log = folder / "logs/d/test.log"
    # Until then its thread may only be about to start it.
    await until(lambda: log.exists() and "[exit -9]" in log.read_text())
    assert psutil.Process().children(recursive=True) == []


def test_children_end_with_a_killed_daemon(folder: Path) -> None:
    code = (
        "import asyncio, time; from pathlib import Path\n"
        "from sollold.engines.llamacpp.child_journal import Journal\n"
        "from sollold.engines.llamacpp.process import Process\n"
        "async def main():\n"
        f"    folder = Path({str(folder)!r})\n"
        "    p = await Process.start('test', ['/bin/sleep', '600'], deployment='d',\n"
        "        journal=Journal(folder / 'c.json'), log_file=folder / 'l')\n"
        "    print(p.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    daemon = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        start_time = started(pid)
        assert start_time
        daemon.kill()
        daemon.wait(10)
        asyncio.run(until(lambda: started(pid) != start_time))
    finally:
        daemon.kill()
        daemon.wait(10)


def test_the_journal_kills_only_leftover_children(folder: Path) -> None:
    leftover = subprocess.Popen(["/bin/sleep", "600"])
    foreign = subprocess.Popen(["/bin/sleep", "600"])
    try:
        journal = Journal(folder / "children.json")
        journal.add(leftover.pid, "worker", "d")
        journal.add(foreign.pid, "worker", "d")
        entries = json.loads((folder / "children.json").read_text())
        # The other process has the reused pid of an ended child.
        entries[1]["started"] = started(os.getpid())
        (folder / "children.json").write_text(json.dumps(entries))
        killed = Journal(folder / "children.json").kill_leftovers()
        assert [child.pid for child in killed] == [leftover.pid]
        assert leftover.wait(10) == -signal.SIGKILL
        assert foreign.poll() is None
        assert Journal(folder / "children.json").kill_leftovers() == []
    finally:
        for process in (leftover, foreign):
            process.kill()
            process.wait(10)


@pytest.mark.parametrize("data", [b"", b"[", b"{}", b'[{"pid": "x"}]', b"\x00", b'[{"name": "\xff"}]'])
def test_a_damaged_journal_is_ignored(folder: Path, data: bytes) -> None:
    (folder / "children.json").write_bytes(data)
    assert Journal(folder / "children.json").kill_leftovers() == []


def test_logs_are_rotated_and_old_ones_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "ROTATE_BYTES", 100)
    with ProcessLog(folder / "logs/d/x.log") as log:
        for _ in range(30):
            log.write(b"0123456789\n")
    sizes = {file.name: file.stat().st_size for file in (folder / "logs/d").iterdir()}
    assert sizes.keys() == {"x.log", "x.log.1"}
    assert max(sizes.values()) <= 121
    for number in range(5):
        (folder / f"logs/old{number}").mkdir()
        if not number:
            (folder / "logs/old0/folder").mkdir()
        os.utime(folder / f"logs/old{number}", (number, number))
    prune(folder / "logs", spare=["old2"], keep=2)
    # A folder that can't be removed is skipped.
    assert sorted(entry.name for entry in (folder / "logs").iterdir()) == ["d", "old0", "old2", "old4"]


def test_a_log_that_could_not_be_opened_again_is_continued_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_log, "ROTATE_BYTES", 10)

    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with ProcessLog(folder / "x.log") as log:
        log.write(b"0123456789ab\n")
        with monkeypatch.context() as patch:
            patch.setattr(process_log, "_open", refuse)
            log.write(b"lost\n")
        log.write(b"kept\n")
    assert (folder / "x.log").read_bytes() == b"kept\n"
    assert (folder / "x.log.1").read_bytes() == b"0123456789ab\n"


def test_each_port_is_given_once() -> None:
    ports = Ports(0)
    taken = {ports.take_port() for _ in range(2000)}
    assert len(taken) == 2000
    first = min(taken)
    assert Ports(first).take_port() >= first
    same = Ports(first)
    port = same.take_port()
    assert same.take_port() != port


@pytest.mark.parametrize(
    ("code", "lines", "words"),
    [
        (1, ["0.01 E load: failed to open x", "0.02 E srv: exiting due to model"], "failed to open x"),
        (
            1,
            [
                "0.1 E llama_model_load: error loading model: unknown model architecture: 'odd'",
                "0.2 E llama_model_load_from_file_impl: failed to load model",
                "0.3 E srv    load_model: failed to load model, '/models/odd.gguf'",
            ],
            "it exited with code 1: llama_model_load: error loading model: unknown model architecture",
        ),
        (1, ["failed to allocate RPC buffer", "error: x"], "out of memory (failed to allocate"),
        (-9, ["all is well"], "it was killed (SIGKILL), probably out of memory"),
        (-6, ["a", "GGML_ASSERT(x) failed"], "it was terminated by SIGABRT: GGML_ASSERT(x) failed"),
        (
            -6,
            [
                "0.1 I load_tensors: tensor 'x' can't be used with the preferred buffer type",
                "/src/ggml/src/ggml.c:3153: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed",
                "0.2 I common_init_from_params: warming up, unknown or invalid tokens are skipped",
            ],
            "it was terminated by SIGABRT: "
            "/src/ggml/src/ggml.c:3153: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed",
        ),
        (
            -6,
            [
                "terminate called after throwing an instance of 'std::runtime_error'",
                "  what():  Invalid diff",
                "0.3 W warning: failed to map a page",
            ],
            "it was terminated by SIGABRT: what():  Invalid diff",
        ),
        (
            -11,
            ["0.1 I srv load: error correction is off", "0.2 I done"],
            "it was terminated by SIGSEGV: done",
        ),
        (-11, ["0.1 I warming up", "0.2 D used by node", "0.3 D"], "by SIGSEGV: warming up"),
        (-7, ["0.1 I slot init_sampler: took 0.00 ms"], "a file that it had mapped can't be read any more"),
        (
            -6,
            [
                "terminate called after throwing an instance of 'std::system_error'",
                "  what():  Resource temporarily unavailable",
            ],
            "it was terminated by SIGABRT: the system allows this user no more threads or processes",
        ),
        (
            -6,
            [
                "0.1 E CUDA error: the launch timed out and was terminated",
                "0.1 E   current device: 0, in function ggml_backend_cuda_synchronize",
                "/src/ggml/src/ggml-cuda/ggml-cuda.cu:98: CUDA error",
            ],
            "SIGABRT: CUDA error: the launch timed out and was terminated; the kernel's log (`dmesg`) may",
        ),
        (
            127,
            ["llama-server: error while loading shared libraries: libgomp.so.1: cannot open shared object"],
            "libgomp.so.1: cannot open shared object; install that library, or let sollold build llama.cpp",
        ),
        (
            -11,
            ["0.1 D malloc: failed to allocate 9 MiB of pinned memory", "0.2 I kv: name = Out of memory"],
            "it was terminated by SIGSEGV",
        ),
        (-4, ["0.1 I done"], "instructions that this machine's processor does not have"),
        (0, [], "it exited with code 0"),
        (-99, ["x"], "it was terminated by signal 99: x"),
    ],
)  # fmt: skip
def test_exit_reasons(code: int, lines: list[str], words: str) -> None:
    assert words in exit_reason(code, lines)


def test_what_no_request_causes_does_not_count_as_a_crash() -> None:
    assert crashed(-signal.SIGSEGV, []) and crashed(-signal.SIGABRT, ["GGML_ASSERT(x)"]) and crashed(1, [])
    assert not crashed(-signal.SIGBUS, []) and not crashed(-signal.SIGKILL, [])
    assert not crashed(-signal.SIGABRT, ["terminate called", "  what():  Resource temporarily unavailable"])


async def test_an_engine_that_is_stopped_twice_gives_back_its_port_once(folder: Path) -> None:
    ports = Ports(0)
    port = ports.take_port()
    first = EngineKey(folder, port)
    first.make()
    head = Head(await begin(folder, "/bin/true"), port, ports, first)
    await head.stop(0.0)
    assert not first.file.exists()
    # The next engine may get the same port.
    ports._taken.add(port)
    second = EngineKey(folder, port)
    second.make()
    await head.stop(0.0)
    assert second.file.exists() and port in ports._taken
