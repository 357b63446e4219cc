"""Runs the real llama-server with real workers, to read its allocations and answers."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sollold.models.footprint.run_options import Run
from tests.doubles import free_port

_READY = "sched_reserve: reserve took"
_LISTENING = "server is listening|llama_server: listening on"
_DRAFTS = ("--spec-type", "draft-mtp", "--no-spec-draft-backend-sampling")
_LOAD_SECONDS, _ANSWER_SECONDS = 60.0, 300.0


def binary(name: str) -> Path | None:
    """The path of a llama.cpp program: from PATH, or built into sollold's cache; None if there is none."""
    found = shutil.which(name)
    if found:
        return Path(found)
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sollold" / "llama.cpp"
    built = sorted(root.glob(f"*/bin/{name}"))
    return built[-1] if built else None


class LoadError(Exception):
    """llama-server or a worker ended before it was ready, or took too long."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Running workers. ``endpoints``: ``host:port`` of each."""

    endpoints: tuple[str, ...]


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Run ``count`` processes of ``ggml-rpc-server`` on loopback."""
    program = binary("ggml-rpc-server")
    assert program is not None
    running: list[subprocess.Popen[bytes]] = []
    ports: list[int] = []
    try:
        for _ in range(count):
            ports.append(free_port())
            # SIGPIPE stays ignored: it would end a worker when its client is killed.
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
    model: Path,
    run: Run,
    ready: Workers,
    split: Sequence[int],
    *extra: str,
    prompt: Sequence[int] = (),
    ended: bool = False,
) -> str:
    """Load a model with llama-server and return its log.

    Args:
        model: the model's file.
        run: how it runs.
        ready: the running workers, of which the first are used.
        split: layers of each worker.
        extra: further arguments of llama-server.
        prompt: tokens that are completed before the log is read.
        ended: read the log after the end of the process, where it names buffers that had to grow.

    Raises:
        LoadError: llama-server could not load it.
    """
    with _server(model, run, ready, split, *extra) as server:
        if not prompt:
            return server.until(_READY)
        server.answer(prompt, 1 + run.drafts)
        if not ended:
            return server.until(_READY)
        server.process.terminate()
        server.process.wait(_LOAD_SECONDS)
        return server.text()


def answered(
    model: Path,
    run: Run,
    ready: Workers,
    split: Sequence[int],
    *extra: str,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> list[dict[str, Any]]:
    """llama-server's completion of each prompt, with ``tokens`` tokens at temperature 0.

    Raises:
        LoadError: llama-server could not load it.
    """
    with _server(model, run, ready, split, *extra) as server:
        return [server.answer(prompt, tokens) for prompt in prompts]


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    port: int
    log: int

    def text(self) -> str:
        """The log so far."""
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode("utf-8", "replace")

    def until(self, pattern: str) -> str:
        """Wait for a line that matches ``pattern``, and return the log."""
        end = time.monotonic() + _LOAD_SECONDS
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            text = self.text()
            if re.search(rf"(?:{pattern})[^\n]*\n", text):
                return text
            if ended:
                raise LoadError(text[-2000:])
            pause()
        raise LoadError(f"not loaded after {_LOAD_SECONDS:g} s")

    def answer(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Wait until the model is loaded, and return the completion of a prompt."""
        self.until(_LISTENING)
        request = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "return_tokens": True}
        body = json.dumps(request).encode()
        url = f"http://127.0.0.1:{self.port}/completion"
        with urllib.request.urlopen(url, body, _ANSWER_SECONDS) as reply:
            return dict(json.load(reply))


@contextlib.contextmanager
def _server(model: Path, run: Run, ready: Workers, split: Sequence[int], *extra: str) -> Iterator[_Server]:
    program = binary("llama-server")
    assert program is not None
    port = free_port()
    command = [
        str(program),
        *("-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-lv", "5", "--no-warmup"),
        # Without mmap the log contains the size of the head's own tensors.
        *("--load-mode", "none", "-fit", "off", "--cache-ram", "0", "-t", "1", "-ngl", str(sum(split))),
        *("-c", str(run.context), "-np", str(run.slots), "-b", str(run.batch), "-ub", str(run.ubatch)),
        *("-ctk", run.type_k, "-ctv", run.type_v, "-fa", run.flash),
        *("--ctx-checkpoints", str(run.checkpoints)),
        "-kvu" if run.unified else "-no-kvu",
        *(("--embedding",) if run.embedding else ()),
        *(_DRAFTS if run.predicts else ()),
    ]
    if run.predicts:
        command += ["--spec-draft-n-max", str(run.drafts)]
        command += ["--spec-draft-type-k", run.type_k, "--spec-draft-type-v", run.type_v]
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
            yield _Server(process, port, log.fileno())
        finally:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Have the kernel kill the child when its parent ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pause() -> None:
    """Wait between two polls."""
    time.sleep(0.02)


def listens(pid: int, port: int) -> bool:
    """Whether something listens on ``port`` in the network namespace of ``pid``.

    Does not connect: a worker would take the connection for its client.
    """
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in map(str.split, lines))


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the worker listens."""
    end = time.monotonic() + _LOAD_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise LoadError(f"the worker ended with {process.returncode}")
        if listens(os.getpid(), port):
            return
        pause()
    raise LoadError("the worker did not listen")
