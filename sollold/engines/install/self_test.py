"""Tests whether a new llama.cpp computes on this machine: a small model must answer with its text.

Programs that print their version can still fail at the first computation: because of the compiler, of
instructions that the processor lacks, or of a GPU's driver.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from sollold.engines.install.find import LlamaUnusable
from sollold.engines.llamacpp.exit_reason import ENDED_BY_OTHERS, exit_reason, lacked_memory, port_was_taken
from sollold.engines.llamacpp.ports import LOOPBACK, Ports
from sollold.machine.child_guard import guarded
from sollold.machine.program import child_environment, kill_session
from sollold.models.gguf import demo_model
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.engines")

_START_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
_POLL_SECONDS = 0.05
_EXIT_SECONDS = 5.0
"""Maximum seconds from the end of the connections to the exit: a GPU's driver frees the memory in between."""
_ANSWER_BYTES = 64 * 1024
_ERROR_CHARACTERS = 300
_LAST_LINES = 60
_PROMPT = {"prompt": "Hi", "n_predict": 8, "temperature": 0}
_OPTIONS = ("-c", "256", "-np", "1", "-t", "1", "--offline", "--host", LOOPBACK)


class _NotTested(Exception):
    """The test could not be made; the message says why."""


def self_test(programs: Path, folder: Path, check: Callable[[], None]) -> None:
    """Let the llama.cpp in the folder ``programs`` compute on this machine's devices and through a worker.

    A build that could not be tested, for example because the machine is too slow, counts as usable. Blocks.

    Args:
        folder: for temporary files.
        check: called repeatedly; what it raises ends the test.

    Raises:
        LlamaUnusable: a program crashed or exited, or an answer was wrong.
    """
    server, worker = str(programs / "llama-server"), str(programs / "ggml-rpc-server")
    model = folder / "test.gguf"
    try:
        demo_model.write(model)
        ports = Ports(0)
        worker_port = ports.take_port()
        # Of the model's two layers, one stays on the processor.
        through_worker = ["--rpc", f"{LOOPBACK}:{worker_port}", "--device", "RPC0", "-ngl", "2"]
        command = [worker, "-H", LOOPBACK, "-p", str(worker_port)]
        with _running(command, folder, partial(_listens, worker_port), check):
            for devices in (["-ngl", "99"], through_worker):
                port = ports.take_port()
                command = [server, "-m", str(model), *_OPTIONS, "--port", str(port), *devices]
                with _running(command, folder, partial(_healthy, port), check) as check_exit:
                    answer = _ask(port, "/completion", _PROMPT)
                    check_exit(0.0 if answer else _EXIT_SECONDS)
                _compare(answer)
    except (OSError, _NotTested) as error:
        log.warning("the new llama.cpp could not be tested with a model: %s", error)


def _compare(answer: dict[str, object] | None) -> None:
    if answer is None:
        raise _NotTested("it did not answer in time")
    if error := answer.get("error"):
        raise LlamaUnusable(f"a small model's answer was an error: {str(error)[:_ERROR_CHARACTERS]}")
    text = answer.get("content")
    if not isinstance(text, str) or not text or not demo_model.GREETING.startswith(text):
        raise LlamaUnusable(f"it computes wrong results: a small model's answer was {str(text)[:80]!r}")


@contextlib.contextmanager
def _running(
    command: Sequence[str], folder: Path, ready: Callable[[], bool], check: Callable[[], None]
) -> Iterator[Callable[[float], None]]:
    """Run a program from when it is ``ready`` to the end of the block, and kill it.

    Yields a function that raises LlamaUnusable if the program exits within a number of seconds.
    """
    name = Path(command[0]).name
    output = folder / f"{name}.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            guarded(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )

    def check_exit(patience: float) -> None:
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            return
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        reason = f"{name}: {exit_reason(code, lines)}"
        if code in ENDED_BY_OTHERS or lacked_memory(reason) or port_was_taken(lines):
            raise _NotTested(reason)
        raise LlamaUnusable(reason)

    with process:
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not ready():
                check()
                check_exit(0.0)
                if time.monotonic() > deadline:
                    raise _NotTested(f"{name} did not start within {_START_SECONDS:.0f} s")
                time.sleep(_POLL_SECONDS)
            yield check_exit
        finally:
            if process.poll() is None:
                kill_session(process.pid)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1.0):
        return True
    return False


def _healthy(port: int) -> bool:
    answer = _ask(port, "/health")
    return answer is not None and "error" not in answer


def _ask(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object] | None:
    """Return the response of a llama-server, which has an ``error`` if it can't answer; None without one."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("POST" if body else "GET", path, msgspec.json.encode(body) if body else None)
        return msgspec.json.decode(connection.getresponse().read(_ANSWER_BYTES), type=dict[str, object])
    except (OSError, http.client.HTTPException, *UNDECODABLE):
        return None
    finally:
        connection.close()
