"""A worker: one ``ggml-rpc-server`` for one deployment, on the devices granted to it.

It serves one client, so it is started and stopped with its deployment. It listens on loopback only, since its
protocol has neither authentication nor encryption; the tunnel provides both.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.exit_reason import exit_reason, port_was_taken
from sollold.engines.llamacpp.ports import LOOPBACK, Ports
from sollold.engines.llamacpp.process import Process
from sollold.errors import system_words
from sollold.machine.backends import ENVIRONMENT
from sollold.machine.loopback_clients import client_users

READY_SECONDS = 30.0
_POLL_SECONDS = 0.02
_MAX_ATTEMPTS = 4
_ACCEPTED = "Accepted client connection"
"""Its log line for each client; it serves them one at a time."""


class WorkerFailed(Exception):
    """The worker did not start; the message says why."""


class _Accepted:
    """Counts the clients that a worker has accepted, by its output."""

    def __init__(self) -> None:
        self.count = 0

    def line(self, text: str) -> None:
        """Process a line of output."""
        self.count += text == _ACCEPTED


class Worker:
    """A running worker. Create it with `Worker.start`."""

    def __init__(self, process: Process, port: int, ports: Ports, accepted: _Accepted) -> None:
        self.process = process
        self.port = port
        self._ports = ports
        self._accepted = accepted
        self._own_connections = 0

    @classmethod
    async def start(
        cls,
        llama: Llama,
        devices: Sequence[str],
        *,
        deployment: str,
        ports: Ports,
        journal: Journal,
        logs: Path,
        threads: int,
        cache: Path | None,
    ) -> Worker:
        """Start one on ``devices`` and wait until it listens. ``cache``: folder of its tensor cache, if any.

        Raises:
            WorkerFailed: it did not start.
        """
        for attempt in range(_MAX_ATTEMPTS):
            try:
                port = ports.take_port()
            except OSError as error:
                raise WorkerFailed(str(error)) from error
            accepted = _Accepted()
            try:
                process = await Process.start(
                    "worker",
                    _command(llama, devices, port, threads, cache),
                    deployment=deployment,
                    journal=journal,
                    log_file=logs / "worker.log",
                    env={**ENVIRONMENT, "GGML_NO_BACKTRACE": "1"}
                    | ({"LLAMA_CACHE": str(cache)} if cache else {}),
                    on_line=accepted.line,
                    prefix=_ACCEPTED,
                )
            except OSError as error:
                ports.give_back(port)
                raise WorkerFailed(f"{llama.worker} could not be started: {system_words(error)}") from error
            except BaseException:
                ports.give_back(port)
                raise
            worker = cls(process, port, ports, accepted)
            try:
                await worker._wait_until_listening()
            except WorkerFailed:
                await worker.stop()
                if attempt == _MAX_ATTEMPTS - 1 or not port_was_taken(process.last_lines()):
                    raise
                continue
            except BaseException:
                await asyncio.shield(worker.stop())
                raise
            return worker
        raise AssertionError("unreachable")

    def connected(self) -> None:
        """Count one connection of our own."""
        self._own_connections += 1

    async def foreign_use(self) -> str:
        """Return who else uses or has used the worker, as a sentence; empty if nobody has.

        All users of a machine can reach its loopback, and the protocol lets any client do anything.
        """
        if self._accepted.count > self._own_connections:
            return "another program on this machine has used it"
        clients = await client_users(self.port)
        others = set((clients or {}).values()) - {os.geteuid()}
        return f"a program of user {min(others)} is connected to it" if others else ""

    async def stop(self) -> None:
        """Kill it at once: it has no state that SIGKILL could corrupt."""
        await self.process.stop(grace=0.0)
        self._ports.give_back(self.port)

    async def _wait_until_listening(self) -> None:
        """Wait until its port is open. Connecting would make us its only client, so the system is asked."""
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            if not self.process.running:
                why = exit_reason(self.process.exited.result(), self.process.last_lines())
                raise WorkerFailed(f"the worker exited at startup: {why}")
            addresses = await asyncio.to_thread(self.process.addresses)
            if any(address != LOOPBACK for address, _ in addresses):
                raise WorkerFailed(f"the worker listens on {addresses}, not only on {LOOPBACK}: stopped")
            if (LOOPBACK, self.port) in addresses:
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise WorkerFailed(f"the worker did not listen on port {self.port} within {READY_SECONDS:.0f} s")


def _command(llama: Llama, devices: Sequence[str], port: int, threads: int, cache: Path | None) -> list[str]:
    command = [str(llama.worker), "-H", LOOPBACK, "-p", str(port), "-d", ",".join(devices)]
    if threads:
        command += ["-t", str(threads)]
    if cache is not None:
        command.append("-c")
    return command
