"""Explains in a sentence why a llama.cpp process exited."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence

OUT_OF_MEMORY = "ran out of memory"
"""Part of the reason of every process that ran out of memory."""
_TERMINATED = "it was terminated by"
"""Part of the reason of every process that a signal ended, unless one of the others explains it."""
KILLED = "it was killed (SIGKILL), probably out of memory"
UNREADABLE = "a file that it had mapped can't be read any more (SIGBUS): truncated, or its disk is gone"
NO_THREADS = "the system allows this user no more threads or processes; raise TasksMax= or `ulimit -u`"
ENDED_BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Exit codes of a process that was ended by another one or by the system."""
_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cannot allocate|OutOfDeviceMemory"
    r"|cudaMalloc failed|std::bad_alloc|insufficient memory",
    re.IGNORECASE,
)
_THREADS = re.compile(r"what\(\):\s+Resource temporarily unavailable|pthread_create.*\bEAGAIN\b")
"""The C++ library's messages when a thread can't be started."""
_NOT_RUN = re.compile(r"(.+ can't be run: .+) \(errno (\d+)\)")
"""Output of `sollold.machine.child_guard` if the program can't be executed."""
_REMOVED = "it was removed or replaced; restart sollold, which finds or builds another"
_NOT_EXECUTABLE = (
    "it is not executable, or its file system is mounted noexec; set node.cache_dir or llama.server"
)
_DAMAGED = "it is damaged or made for another kind of processor; remove it and restart sollold"
_NOT_RUN_ADVICE = {
    errno.ENOENT: _REMOVED,
    errno.ENOTDIR: _REMOVED,
    errno.EACCES: _NOT_EXECUTABLE,
    errno.EPERM: _NOT_EXECUTABLE,
    errno.ENOEXEC: _DAMAGED,
}
_ILLEGAL = (
    f"{_TERMINATED} SIGILL: this llama.cpp uses instructions that this machine's processor does not "
    "have; let sollold build one here (llama.build), or set llama.server to one that suits"
)
_PORT = re.compile(r"Failed to create server socket|couldn't bind|address already in use", re.IGNORECASE)
_PROJECTOR = re.compile(
    r"failed to load (?:CLIP|multimodal) model|error: failed to load mmproj", re.IGNORECASE
)
_WORKER = re.compile(r"Remote RPC server crashed|Failed to connect to ")
_ASSERTION = re.compile(
    r"\S+\.(?:c|cc|cpp|cu|cuh|h|hpp|m|metal):\d+: .*|GGML_ASSERT\(.*|terminate called .*|\s*what\(\): .*"
)
"""Output of a program that aborts: the place in its source, or the exception."""
_SUSPICIOUS = re.compile(
    r"error|fail|abort|assert|exception|unknown|invalid|unable|could not|can't|crash", re.IGNORECASE
)
_GPU = re.compile(r"\b(?:CUDA|ROCm|MUSA) error: .+")
"""A driver's own words, which the abort that follows does not repeat."""
_XID = "; the kernel's log (`dmesg`) may name the cause as an Xid"
_LIBRARY = re.compile(r"error while loading shared libraries: .+")
_LIBRARY_ADVICE = "; install that library, or let sollold build llama.cpp here (llama.build)"
_LOADING = re.compile(r"error loading \w+: .")
"""llama.cpp's message about a file that it can't load; the lines after it only name the file."""
_NOISE = re.compile(
    r"exiting due to|see https?://|cmd_child_to_router|cleaning up before exit|WARNING: ", re.IGNORECASE
)
_PREFIX = re.compile(r"^(?:[\d.]+ )?[IWEDT] ")
"""Time and level at the start of a llama-server log line."""
_ROUTINE = re.compile(r"^(?:[\d.]+ )?[IDT] ")
"""A line below the level of a warning: it reports normal progress, whatever words it contains."""
_DEBUG = re.compile(r"^(?:[\d.]+ )?[DT](?: |$)")
_MAX_LENGTH = 300


def port_was_taken(lines: Sequence[str]) -> bool:
    """Return whether another program took the port between our check and the bind."""
    return any(_PORT.search(line) for line in lines)


def projector_was_refused(lines: Sequence[str]) -> bool:
    """Return whether llama-server exited because it could not load the projector."""
    return any(_PROJECTOR.search(line) for line in lines)


def draft_was_refused(lines: Sequence[str]) -> bool:
    """Return whether llama-server exited because it could not load the draft model or MTP layers."""
    return any(re.search("failed to (?:load draft model|create MTP context)", line) for line in lines)


def crashed(code: int, lines: Sequence[str]) -> bool:
    """Return whether a process with this exit code and last output crashed by itself or because of a request:
    it was neither stopped nor killed, no mapped file was truncated, and it could start its threads."""
    stopped = code in (0, -signal.SIGBUS, *ENDED_BY_OTHERS)
    return not stopped and not any(_THREADS.search(line) for line in lines)


def mentions_lack_of_memory(output: str) -> bool:
    """Return whether an engine's output says that memory could not be allocated."""
    return _MEMORY.search(output) is not None


def lacked_memory(reason: str) -> bool:
    """Return whether a process ran out of memory, or was killed, which is probably the same; ``reason``: a
    text that contains its `exit_reason`."""
    return OUT_OF_MEMORY in reason or KILLED in reason


def ended_by_signal(reason: str) -> bool:
    """Return whether a signal ended a process, for none of the other known causes; ``reason``: as for
    `lacked_memory`."""
    return _TERMINATED in reason


def worker_was_lost(lines: Sequence[str]) -> bool:
    """Return whether llama-server exited because the connection to a worker broke."""
    return any(_WORKER.search(line) for line in lines)


def exit_reason(code: int, lines: Sequence[str]) -> str:
    """Return a sentence from the exit ``code`` and the last ``lines`` of output.

    The first message about memory takes precedence, then SIGKILL, SIGBUS, SIGILL, a program that can't be
    run, a lack of threads, a GPU's error and a missing library, then an assertion or exception after a
    signal, then the first file that could not be loaded, then the last line that looks like an error, then
    the last line that is not for debugging.
    """
    clean = [line for line in lines if not _NOISE.search(line)]
    # A routine line may quote a model's description, or tell of an attempt that was not needed.
    memory = next((line for line in clean if mentions_lack_of_memory(line) and not _ROUTINE.match(line)), "")
    if memory:
        return f"it {OUT_OF_MEMORY} ({_short(memory)})"
    if code == -signal.SIGKILL:
        return KILLED
    if code == -signal.SIGBUS:
        return UNREADABLE
    if code == -signal.SIGILL:
        return _ILLEGAL
    if code == 127 and (match := next(filter(None, map(_NOT_RUN.fullmatch, clean)), None)):
        advice = _NOT_RUN_ADVICE.get(int(match[2]), "")
        return f"{match[1]}: {advice}" if advice else match[1]
    if any(_THREADS.search(line) for line in clean):
        return f"{_exit_text(code)}: {NO_THREADS}"
    ending = _exit_text(code)
    if gpu := next((line for line in clean if _GPU.search(line)), ""):
        return f"{ending}: {_short(gpu)}{_XID if 'CUDA' in gpu else ''}"
    if library := next((line for line in clean if _LIBRARY.search(line)), ""):
        return f"{ending}: {_short(library)}{_LIBRARY_ADVICE}"
    cause = _assertion(clean) if code < 0 else ""
    cause = cause or next((line for line in clean if _LOADING.search(line)), "")
    if not cause:
        suspicious = (
            line for line in reversed(clean) if _SUSPICIOUS.search(line) and not _ROUTINE.match(line)
        )
        cause = next(suspicious, "")
    if not cause:
        cause = next((line for line in reversed(clean) if not _DEBUG.match(line)), "")
    return f"{ending}: {_short(cause)}" if cause else ending


def _assertion(lines: Sequence[str]) -> str:
    """Return the last assertion or exception message; else the last line with a place in the source."""
    found = [line for line in lines if _ASSERTION.match(_PREFIX.sub("", line))]
    placed = [line for line in found if "ASSERT" in line or "what()" in line]
    return (placed or found or [""])[-1]


def _exit_text(code: int) -> str:
    if code < 0:
        try:
            return f"{_TERMINATED} {signal.Signals(-code).name}"
        except ValueError:
            return f"{_TERMINATED} signal {-code}"
    return f"it exited with code {code}"


def _short(line: str) -> str:
    line = _PREFIX.sub("", line.strip())
    return line if len(line) <= _MAX_LENGTH else line[: _MAX_LENGTH - 1] + "…"
