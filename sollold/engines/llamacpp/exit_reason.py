"""Why a child of llama.cpp ended, in a sentence."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

OUT_OF_MEMORY = "ran out of memory"
"""What a reason says of a process that did."""
KILLED = "it was killed (SIGKILL), probably out of memory"
UNREADABLE = "a file that it had mapped can't be read any more (SIGBUS): cut short, or its disk is gone"
NO_THREADS = "the system gives this user no more threads or processes; raise TasksMax= or `ulimit -u`"
_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cannot allocate|OutOfDeviceMemory"
    r"|cudaMalloc failed|std::bad_alloc|insufficient memory",
    re.IGNORECASE,
)
_THREADS = re.compile(r"what\(\):\s+Resource temporarily unavailable|pthread_create.*\bEAGAIN\b")
"""What the C++ library says when a thread can't be started."""
_PORT = re.compile(r"Failed to create server socket|couldn't bind|address already in use", re.IGNORECASE)
_PROJECTOR = re.compile(
    r"failed to load (?:CLIP|multimodal) model|error: failed to load mmproj", re.IGNORECASE
)
_WORKER = re.compile(r"Remote RPC server crashed|Failed to connect to ")
_ASSERTION = re.compile(
    r"\S+\.(?:c|cc|cpp|cu|cuh|h|hpp|m|metal):\d+: .*|GGML_ASSERT\(.*|terminate called .*|\s*what\(\): .*"
)
"""What a program that gives up on itself prints: the place in its source, or the exception."""
_TELLING = re.compile(
    r"error|fail|abort|assert|exception|unknown|invalid|unable|could not|can't|crash", re.IGNORECASE
)
_LOADING = re.compile(r"error loading \w+: .")
"""What llama.cpp says of a file that it can't load; what comes behind it tells only which file that is."""
_NOISE = re.compile(
    r"exiting due to|see https?://|cmd_child_to_router|cleaning up before exit|WARNING: ", re.IGNORECASE
)
_PREFIX = re.compile(r"^(?:[\d.]+ )?[IWEDT] ")
"""Time and level at the start of a line of llama-server's log."""
_CALM = re.compile(r"^(?:[\d.]+ )?[IDT] ")
"""A line of a level below a warning: it tells of a load that goes well, whatever words are in it."""
_LENGTH = 300


def port_was_taken(lines: Sequence[str]) -> bool:
    """Whether another program took the port between our look and the bind."""
    return any(_PORT.search(line) for line in lines)


def projector_was_refused(lines: Sequence[str]) -> bool:
    """Whether llama-server ended since it could not load the projector."""
    return any(_PROJECTOR.search(line) for line in lines)


def draft_was_refused(lines: Sequence[str]) -> bool:
    """Whether llama-server ended since it could not load what drafts."""
    return any(re.search("failed to (?:load draft model|create MTP context)", line) for line in lines)


def crashed(code: int) -> bool:
    """Whether a process with this exit code ended by a fault of its own, or of what it was asked: nobody
    ended or killed it, and no file was taken from under it."""
    told = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return code not in (0, -signal.SIGBUS, *(-one for one in told))


def worker_was_lost(lines: Sequence[str]) -> bool:
    """Whether llama-server ended since the way to a worker broke."""
    return any(_WORKER.search(line) for line in lines)


def exit_reason(code: int, lines: Sequence[str]) -> str:
    """A sentence from the exit ``code`` and the last ``lines`` of output.

    The line that names the cause is the first telling one after which nothing else but trouble comes, so
    the earliest about memory wins, then that about a file, else the last telling one.
    """
    clean = [line for line in lines if not _NOISE.search(line)]
    memory = next((line for line in clean if _MEMORY.search(line)), "")
    if memory:
        return f"it {OUT_OF_MEMORY} ({_short(memory)})"
    if code == -signal.SIGKILL:
        return KILLED
    if code == -signal.SIGBUS:
        return UNREADABLE
    if any(_THREADS.search(line) for line in clean):
        return f"{_how(code)}: {NO_THREADS}"
    how = _how(code)
    telling = _assertion(clean) if code < 0 else ""
    telling = telling or next((line for line in clean if _LOADING.search(line)), "")
    if not telling:
        alarming = (line for line in reversed(clean) if _TELLING.search(line) and not _CALM.match(line))
        telling = next(alarming, "")
    if not telling:
        telling = clean[-1] if clean else ""
    return f"{how}: {_short(telling)}" if telling else how


def _assertion(lines: Sequence[str]) -> str:
    """The line by which a program says what of its own it found wrong: with the place, if any has one."""
    found = [line for line in lines if _ASSERTION.match(_PREFIX.sub("", line))]
    placed = [line for line in found if "ASSERT" in line or "what()" in line]
    return (placed or found or [""])[-1]


def _how(code: int) -> str:
    if code < 0:
        try:
            return f"it was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"it was ended by signal {-code}"
    return f"it ended with exit code {code}"


def _short(line: str) -> str:
    line = _PREFIX.sub("", line.strip())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 1] + "…"
