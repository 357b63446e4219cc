"""Runs the real llama-server with real workers, to see what it allocates."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sollold.models.run import Run

_READY = "sched_reserve: reserve took"
_LISTENING = "server is listening|llama_server: listening on"
_PATIENCE = 60.0


def binary(name: str) -> Path | None:
    """llama.cpp's program of this name: in PATH, or built into the cache."""
    found = shutil.which(name)
    if found:
        return Path(found)
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sollold" / "llama.cpp"
    built = sorted(root.glob(f"*/bin/{name}"))
    return built[-1] if built else None


class LoadError(Exception):
    """llama-server ended before it had loaded; the text is the end of its log."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Running workers. ``endpoints``: ``host:port`` of each."""

    endpoints: tuple[str, ...]


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    """So many ``ggml-rpc-server`` on loopback."""
    program = binary("ggml-rpc-server")
    assert program is not None
    running: list[subprocess.Popen[bytes]] = []
    ports: list[int] = []
    try:
        for _ in range(count):
            ports.append(free_port())
            # SIGPIPE stays ignored: a worker dies of it when its client is killed.
            running.append(
                subprocess.Popen(
                    [program, "-H", "127.0.0.1", "-p", str(ports[-1]), "-t", "1"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    restore_signals=False,
                    preexec_fn=_end_with_parent,
                )
            )
        for process, port in zip(running, ports, strict=True):
            _wait_for_port(process, port)
        yield Workers(tuple(f"127.0.0.1:{port}" for port in ports))
    finally:
        for process in running:
            process.kill()
            process.wait()


def loaded(
    model: Path, run: Run, ready: Workers, split: Sequence[int], *extra: str, prompt: Sequence[int] = ()
) -> str:
    """Load a model on the first of the workers and give the log. ``split``: layers of each device.

    ``prompt``: tokens that are answered before the log is read.

    Raises:
        LoadError: llama-server could not load it.
    """
    program = binary("llama-server")
    assert program is not None
    port = free_port()
    command = [
        str(program),
        *("-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-lv", "5", "--no-warmup"),
        # Read, not mapped: only then does the log tell what the head's own tensors take.
        *("--load-mode", "none", "-fit", "off", "--cache-ram", "0", "-t", "1", "-ngl", str(sum(split))),
        *("-c", str(run.context), "-np", str(run.slots), "-b", str(run.batch), "-ub", str(run.ubatch)),
        *("-ctk", run.type_k, "-ctv", run.type_v, "-fa", run.flash),
        *("--ctx-checkpoints", str(run.checkpoints)),
        "-kvu" if run.unified else "-no-kvu",
        *(("--embedding",) if run.embedding else ()),
    ]
    if split:
        names = [f"RPC{index}" for index in range(len(split))]
        command += ["--rpc", ",".join(ready.endpoints[: len(split)]), "--device", ",".join(names)]
        command += ["--tensor-split", ",".join(map(str, split))]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *extra],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_end_with_parent,
        )
        try:
            if not prompt:
                return _until(_READY, process, log.fileno())
            _until(_LISTENING, process, log.fileno())
            body = json.dumps({"prompt": list(prompt), "n_predict": 1}).encode()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/completion", body, _PATIENCE) as reply:
                reply.read()
            return _until(_READY, process, log.fileno())
        finally:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """The kernel kills the child when its parent is killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pause() -> None:
    """Wait a moment before looking again."""
    time.sleep(0.02)


def _until(words: str, process: subprocess.Popen[bytes], log: int) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        ended = process.poll() is not None
        text = os.pread(log, os.fstat(log).st_size, 0).decode("utf-8", "replace")
        if re.search(rf"(?:{words})[^\n]*\n", text):
            return text
        if ended:
            raise LoadError(text[-2000:])
        pause()
    raise LoadError(f"not loaded after {_PATIENCE:g} s")


def free_port() -> int:
    """A port of the loopback that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(pid: int, port: int) -> bool:
    """Whether something listens on ``port`` in the process's network.

    Without connecting: a worker takes any connection for its client.
    """
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in map(str.split, lines))


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the worker listens."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise LoadError(f"the worker ended with {process.returncode}")
        if listens(os.getpid(), port):
            return
        pause()
    raise LoadError("the worker did not listen")
