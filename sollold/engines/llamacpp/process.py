"""A child process: started, its output kept, its exit reported at once, reliably killed.

One thread per child starts it, reads its output and waits for its exit. That thread must live as long as
the child: Linux sends the parent-death signal when the *thread* that started the child ends. A second
thread only waits for the exit and then kills the child's own children (such as Ollama's runners), which
would hold on to memory and keep the output open, and so delay the report of the exit.
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

from sollold.engines.llamacpp.child_journal import MARK, Journal, stat_fields
from sollold.engines.llamacpp.exit_reason import NO_THREADS
from sollold.engines.llamacpp.process_log import ProcessLog
from sollold.machine.child_guard import guarded
from sollold.machine.program import child_environment, in_session, kill_session, session_members

log = logging.getLogger("sollold.engines")


_LAST_LINES = 60
_CHUNK = 64 * 1024
GATHER_SECONDS = 0.02
"""Value of ``gather`` for engines, which write about twenty lines per request."""
_KILL_SECONDS = 10.0


class Process:
    """A child process. Create it with `Process.start`.

    Attributes:
        name: its kind, for messages (``worker``, ``llama-server``).
        pid: its process id.
        exited: done once it has exited; its result is the exit code, negative for a signal.
    """

    def __init__(
        self,
        name: str,
        on_line: Callable[[str], None] | None,
        log_file: Path,
        prefix: str = "",
        gather: float = 0.0,
    ) -> None:
        self.name = name
        self.pid = 0
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._on_line = on_line
        self._prefix = prefix
        self._gather = gather
        self._log_file = log_file
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._popen: subprocess.Popen[bytes] | None = None
        self._found: set[int] = set()
        """The processes of its session, as last looked up."""
        self._reaping = threading.Lock()
        """Held to signal and to reap: a pid can't be reused until its process is reaped."""

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
        prefix: str = "",
        gather: float = 0.0,
    ) -> Process:
        """Start ``command`` and record it in ``journal``. ``on_line`` is called on the loop for lines of
        output that start with ``prefix``. ``gather``: seconds to wait for more output after each read, so
        that a child that writes many lines per request does not wake this thread for each of them.

        Raises:
            OSError: it could not be started.
        """
        process = cls(name, on_line, log_file, prefix, gather)
        arguments = (list(command), dict(env or {}), deployment, journal)
        thread = threading.Thread(target=process._run, args=arguments, name=f"child {name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, f"{name} can't be started: {NO_THREADS}") from None
        try:
            await asyncio.shield(process._started)
        except asyncio.CancelledError:
            process._started.add_done_callback(process._kill_late_start)
            raise
        return process

    @property
    def running(self) -> bool:
        """Whether the child is running."""
        return not self.exited.done()

    def last_lines(self) -> list[str]:
        """Return its last lines of output."""
        return list(self._last)

    def pids(self) -> set[int]:
        """Look up the ids of its processes: a script set as a program may run the actual one as its child.
        Blocks for milliseconds.
        """
        self._found = session_members(self.pid)
        return self._found

    def known_pids(self) -> set[int]:
        """Return those that `pids`, `memory` or `addresses` found last, without those that have ended."""
        return {pid for pid in {self.pid, *self._found} if in_session(pid, self.pid)}

    def memory(self) -> int:
        """Return its private RAM in bytes: without mapped files, which the system can reclaim. Blocks."""
        return sum(map(_private_memory, self.pids()))

    def work(self) -> int | None:
        """Return a counter of its activity: processor time in hundredths of a second plus major page faults.
        None if unknown. It counts `known_pids`.
        """
        known = [work for pid in self.known_pids() if (work := _work(pid)) is not None]
        return sum(known) if known else None

    def waits_for_disk(self) -> bool:
        """Return whether one of its threads is waiting in the kernel for a disk or network share. Blocks."""
        return any(map(_waits_for_disk, self.pids()))

    def addresses(self) -> list[tuple[str, int]]:
        """Return the (address, port) pairs on which it listens for TCP, without connecting to any. Blocks."""
        connections = [found for pid in self.pids() for found in _connections(pid)]
        return [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]

    def terminate(self) -> None:
        """Send SIGTERM and close its stdin, which llama-server waits for as well."""
        self._signal(signal.SIGTERM)
        if self._popen is not None and self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()

    def kill(self) -> None:
        """Send SIGKILL to its known processes. The rest of its session is killed once it has exited."""
        self._signal(signal.SIGKILL, self.known_pids())

    async def stop(self, grace: float = 3.0) -> None:
        """Stop it: SIGTERM, then SIGKILL after ``grace`` seconds. Returns once it is gone."""
        if grace > 0 and self.running:
            self.terminate()
            await asyncio.wait({self.exited}, timeout=grace)
        if self.running:
            self.kill()
            await asyncio.wait({self.exited}, timeout=_KILL_SECONDS)
        if self.running:
            log.error("%s (pid %d) can't be killed: it is stuck in the kernel", self.name, self.pid)

    def _signal(self, number: signal.Signals, others: Iterable[int] = ()) -> None:
        """Signal it and ``others``, which are processes of its session."""
        # If a thread holds the lock, the process has exited.
        if self._popen is None or not self._reaping.acquire(blocking=False):
            return
        try:
            for pid in {self._popen.pid, *others} if self._popen.returncode is None else ():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        finally:
            self._reaping.release()

    def _kill_late_start(self, started: asyncio.Future[None]) -> None:
        if not started.cancelled() and started.exception() is None:
            self.kill()

    # In the child's thread:

    def _run(self, command: list[str], env: dict[str, str], deployment: str, journal: Journal) -> None:
        try:
            output = ProcessLog(self._log_file)
            output.write((" ".join(command) + "\n").encode("utf-8", "surrogateescape"))
            popen = self._popen = subprocess.Popen(
                guarded(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**child_environment(), **env, MARK: journal.mark},
                cwd="/",
                start_new_session=True,
                restore_signals=False,
            )
        except OSError as error:
            self._resolve(self._started, error=error)
            return
        except ValueError as error:
            # A null byte or a lone surrogate in a name that came from elsewhere.
            self._resolve(self._started, error=OSError(errno.EINVAL, f"invalid command: {error}"))
            return
        self.pid = popen.pid
        try:
            journal.add(popen.pid, self.name, deployment)
        except OSError as error:
            log.warning("the journal can't be written (%s): a crash could leave %s running", error, self.name)
        self._resolve(self._started)
        ending = threading.Thread(target=self._end_session, name=f"end of {self.name}", daemon=True)
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
        self._resolve(self.exited, code)

    def _read(self, source: IO[bytes], output: ProcessLog) -> None:
        """Forward the child's output until it ends."""
        rest = b""
        while chunk := source.read1(_CHUNK):  # type: ignore[attr-defined]
            output.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _CHUNK:
                lines, rest = [*lines, rest], b""
            self._add_lines(lines)
            if self._gather and len(chunk) < _CHUNK // 4:
                time.sleep(self._gather)
        self._add_lines([rest])

    def _add_lines(self, lines: Iterable[bytes]) -> None:
        decoded = [line for raw in lines if (line := raw.decode("utf-8", "replace").rstrip())]
        self._last.extend(decoded)
        if self._on_line is None:
            return
        for line in decoded:
            if line.startswith(self._prefix):
                self._call_soon(self._on_line, line)

    def _end_session(self) -> None:
        """Wait for its exit, then kill its session, whose id can't be reused before the reaping."""
        if hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._reaping:
                if self._popen is not None and self._popen.returncode is None:
                    kill_session(self.pid)

    def _reap(self, popen: subprocess.Popen[bytes]) -> int:
        self._end_session()
        with self._reaping if hasattr(os, "waitid") else contextlib.nullcontext():
            code = popen.wait()
        # A shell exits so if the program that it ran was ended by a signal.
        return 128 - code if code - 128 in signal.valid_signals() else code

    def _call_soon(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(call, *arguments)

    def _resolve(
        self, future: asyncio.Future[Any], value: object = None, error: OSError | None = None
    ) -> None:
        def done() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._call_soon(done)


def _private_memory(pid: int) -> int:
    try:
        with Path(f"/proc/{pid}/status").open("rb") as status:
            for line in status:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _work(pid: int) -> int | None:
    try:
        fields = stat_fields(Path(f"/proc/{pid}"))
        # With those of its children that have exited, so that the sum does not decrease.
        return sum(int(fields[index]) for index in (9, 10, 11, 12, 13, 14))
    except (OSError, ValueError, IndexError):
        return None


def _waits_for_disk(pid: int) -> bool:
    try:
        return any(stat_fields(thread)[0] == "D" for thread in Path(f"/proc/{pid}/task").iterdir())
    except (OSError, IndexError):
        return False


def _connections(pid: int) -> list[Any]:
    try:
        return psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
