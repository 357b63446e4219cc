"""One child process: started, its output kept, its exit told at once, ended for certain.

A thread per child starts it, reads its output and waits for its exit. That thread lives as long as the
child does, which matters: Linux sends the parent-death signal when the *thread* that started the child
ends. A second thread waits for nothing but the exit: what the child has started itself (an Ollama its
runners) would keep memory and output, so it is ended then, and the exit is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from sollold.engines.llamacpp.child_journal import MARK, Journal
from sollold.engines.llamacpp.exit_reason import NO_THREADS
from sollold.engines.llamacpp.process_log import ProcessLog
from sollold.machine.child_guard import guarded

log = logging.getLogger("sollold.engines")


_LAST_LINES = 60
_PIECE = 64 * 1024
GATHER_SECONDS = 0.02
"""For engines, which say twenty lines for each request."""
_KILL_SECONDS = 10.0


class Process:
    """A child process. Make it with `Process.start`.

    Attributes:
        name: what it is, for people (``worker``, ``llama-server``).
        pid: of the child.
        exited: done when the child is gone; its result is the exit code, negative for a signal.
    """

    def __init__(
        self,
        name: str,
        on_line: Callable[[str], None] | None,
        log_file: Path,
        heard: str = "",
        gather: float = 0.0,
    ) -> None:
        self.name = name
        self.pid = 0
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._on_line = on_line
        self._heard = heard
        self._gather = gather
        self._log_file = log_file
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._popen: subprocess.Popen[bytes] | None = None
        self._reaping = threading.Lock()
        """Held to signal and to reap: a number is nobody else's until its process was reaped."""

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        deployment: str,
        journal: Journal,
        log_file: Path,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
        heard: str = "",
        gather: float = 0.0,
    ) -> Process:
        """Start ``command`` and note it in ``journal``. ``on_line`` gets each line of output that begins with
        ``heard``, on the loop. ``gather``: seconds for which more output may be waited for: one that says
        many lines for each request wakes nobody for each of them.

        Raises:
            OSError: it could not be started.
        """
        process = cls(name, on_line, log_file, heard, gather)
        arguments = (list(command), dict(env or {}), deployment, journal)
        thread = threading.Thread(target=process._run, args=arguments, name=f"child {name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, f"{name} can't be started: {NO_THREADS}") from None
        try:
            await asyncio.shield(process._started)
        except asyncio.CancelledError:
            process._started.add_done_callback(process._unwanted)
            raise
        return process

    @property
    def running(self) -> bool:
        """Whether the child is still there."""
        return not self.exited.done()

    def last_lines(self) -> list[str]:
        """The end of its output."""
        return list(self._last)

    def memory(self) -> int:
        """Bytes of RAM that are its own: not those of mapped files, which the system can take back."""
        try:
            with Path(f"/proc/{self.pid}/status").open("rb") as status:
                for line in status:
                    if line.startswith(b"RssAnon:"):
                        return int(line.split()[1]) * 1024
            return int(psutil.Process(self.pid).memory_info().rss)
        except FileNotFoundError:
            with contextlib.suppress(psutil.Error):
                return int(psutil.Process(self.pid).memory_info().rss)
            return 0
        except (OSError, psutil.Error):
            return 0

    def work(self) -> int | None:
        """A number that grows with what it does: hundredths of a second of the processors, and pages read
        from a disk. None when that can't be told.
        """
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[9]) + int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            return None

    def waits_for_disk(self) -> bool:
        """Whether one of its threads waits in the kernel for a disk or a share, as far as can be told."""
        try:
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                    return True
        except (OSError, IndexError):
            pass
        return False

    def addresses(self) -> list[tuple[str, int]]:
        """The (address, port) pairs on which it accepts TCP. Found without connecting to any."""
        try:
            connections = psutil.Process(self.pid).net_connections("tcp")
        except psutil.Error:
            return []
        return [(one.laddr.ip, one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN]

    def terminate(self) -> None:
        """SIGTERM, and the end of its standard input, for which llama-server waits besides."""
        self._signal(signal.SIGTERM)
        if self._popen is not None and self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()

    def kill(self) -> None:
        """SIGKILL, with all that it has started."""
        self._signal(signal.SIGKILL, group=True)

    async def stop(self, grace: float = 3.0) -> None:
        """End it: SIGTERM, after ``grace`` seconds SIGKILL. Returns when it is gone."""
        if grace > 0 and self.running:
            self.terminate()
            await asyncio.wait({self.exited}, timeout=grace)
        if self.running:
            self.kill()
            await asyncio.wait({self.exited}, timeout=_KILL_SECONDS)
        if self.running:
            log.error("%s (pid %d) can't be killed: it is stuck in the kernel", self.name, self.pid)

    def _unwanted(self, started: asyncio.Future[None]) -> None:
        if not started.cancelled() and started.exception() is None:
            self.kill()

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        with self._reaping, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._popen is not None and self._popen.returncode is None:
                (os.killpg if group else os.kill)(self._popen.pid, number)

    # In the child's thread

    def _run(self, command: list[str], env: dict[str, str], deployment: str, journal: Journal) -> None:
        try:
            output = ProcessLog(self._log_file)
            output.write((" ".join(command) + "\n").encode("utf-8", "surrogateescape"))
            popen = self._popen = subprocess.Popen(
                guarded(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**_clean(os.environ), **env, MARK: journal.mark},
                cwd="/",
                start_new_session=True,
                restore_signals=False,
            )
        except OSError as error:
            self._tell(self._started, error=error)
            return
        except ValueError as error:
            # A zero byte, or half a character, in a name that came from somewhere.
            self._tell(self._started, error=OSError(errno.EINVAL, f"invalid command: {error}"))
            return
        self.pid = popen.pid
        try:
            journal.add(popen.pid, self.name, deployment)
        except OSError as error:
            log.warning("the journal can't be written (%s): a crash could leave %s running", error, self.name)
        self._tell(self._started)
        ending = threading.Thread(target=self._end_group, name=f"end of {self.name}", daemon=True)
        try:
            ending.start()
        except RuntimeError as error:
            log.warning("no thread waits for the exit of %s: %s", self.name, error)
        assert popen.stdout is not None
        with output, popen.stdout:
            self._read(popen.stdout, output)
            code = self._reap(popen)
            output.write(f"[exit {code}]\n".encode())
        if popen.stdin is not None:
            with contextlib.suppress(OSError):
                popen.stdin.close()
        with contextlib.suppress(OSError):
            journal.remove(popen.pid)
        self._tell(self.exited, code)

    def _read(self, source: IO[bytes], output: ProcessLog) -> None:
        """Pass on what the child says, until it says nothing any more."""
        rest = b""
        while piece := source.read1(_PIECE):  # type: ignore[attr-defined]
            output.write(piece)
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _PIECE:
                lines, rest = [*lines, rest], b""
            self._take(lines)
            if self._gather and len(piece) < _PIECE // 4:
                time.sleep(self._gather)
        self._take([rest])

    def _take(self, lines: Iterable[bytes]) -> None:
        decoded = [line for raw in lines if (line := raw.decode("utf-8", "replace").rstrip())]
        self._last.extend(decoded)
        if self._on_line is None:
            return
        for line in decoded:
            if line.startswith(self._heard):
                self._later(self._on_line, line)

    def _end_group(self) -> None:
        """Wait for the exit, then end what the child has left behind; not reaped yet, it keeps its number."""
        if hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self._signal(signal.SIGKILL, group=True)

    def _reap(self, popen: subprocess.Popen[bytes]) -> int:
        self._end_group()
        with self._reaping if hasattr(os, "waitid") else contextlib.nullcontext():
            return popen.wait()

    def _later(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody listens any more.
            self._loop.call_soon_threadsafe(call, *arguments)

    def _tell(self, future: asyncio.Future[Any], value: object = None, error: OSError | None = None) -> None:
        def done() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._later(done)


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would set options of llama.cpp unseen, the daemon's secrets, and systemd's socket."""
    unwanted = ("LLAMA_", "SOLLOLD_", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
    return {name: value for name, value in environment.items() if not name.startswith(unwanted)}
