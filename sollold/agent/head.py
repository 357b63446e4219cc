"""The head's ``llama-server``: started, watched until it is ready, ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec

from sollold.agent.command_line import Reach, command_line
from sollold.agent.journal import Journal
from sollold.agent.last_words import crashed, last_words, port_was_taken, worker_was_lost
from sollold.agent.llama_find import Llama
from sollold.agent.ports import LOOPBACK, Ports
from sollold.agent.process import Process
from sollold.machine.backends import ENVIRONMENT
from sollold.models.model import Model
from sollold.placement.plan import Plan

LOAD_SECONDS = 3600.0
"""A load that takes longer is given up."""
_ASK_SECONDS = 0.1
_STATE = "cmd_child_to_router:state:"


class HeadFailed(Exception):
    """``llama-server`` did not get ready, or ended; the sentence says why."""

    def __init__(
        self, reason: str, *, port: bool = False, worker: bool = False, crashed: bool = False
    ) -> None:
        super().__init__(reason)
        self.worker = worker
        """It ended since it lost a worker."""
        self.crashed = crashed
        """It ended by a fault of its own."""
        self.port = port
        """Another program had taken its port: worth another try."""


class _Loading(msgspec.Struct):
    """What llama-server tells a router of its start. Undocumented: nothing depends on it."""

    state: str = ""
    payload: msgspec.Raw = msgspec.Raw(b"{}")


class _Progress(msgspec.Struct):
    stages: list[str] = []
    current: str = ""
    value: float = 0.0


def progress_in(line: str) -> float | None:
    """How much of the load is done by this line of output, 0.0 to 1.0; None when it does not say."""
    if not line.startswith(_STATE):
        return None
    try:
        told = msgspec.json.decode(line[len(_STATE) :], type=_Loading)
        if told.state != "loading":
            return None
        part = msgspec.json.decode(told.payload, type=_Progress)
    except (msgspec.DecodeError, ValueError):
        return None
    value = min(max(part.value, 0.0), 1.0)
    if part.current not in part.stages:
        return value
    return (part.stages.index(part.current) + value) / len(part.stages)


class Head:
    """A running ``llama-server``. Made with `Head.start`; READY after `Head.ready`."""

    def __init__(self, process: Process, port: int, ports: Ports) -> None:
        self.process = process
        self.port = port
        self._ports = ports

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{LOOPBACK}:{self.port}"

    @classmethod
    async def start(
        cls,
        plan: Plan,
        model: Model,
        llama: Llama,
        reach: Sequence[Reach],
        *,
        deployment: str,
        ports: Ports,
        journal: Journal,
        logs: Path,
        threads: int,
        extra: Sequence[str],
        on_progress: Callable[[float], None],
    ) -> Head:
        """Start it. ``on_progress`` is called on the loop with 0.0 to 1.0 while it loads.

        Raises:
            HeadFailed: it could not be started.
        """

        def line(text: str) -> None:
            value = progress_in(text)
            if value is not None:
                on_progress(value)

        try:
            port = ports.take()
        except OSError as error:
            raise HeadFailed(f"llama-server could not be started: {error}") from error
        try:
            process = await Process.start(
                "llama-server",
                command_line(plan, model, llama, reach, port=port, threads=threads, extra=extra),
                deployment=deployment,
                journal=journal,
                log_file=logs / "llama-server.log",
                # With a router's port it tells its progress, and ends when its standard input does,
                # which it does when the daemon dies.
                env={**ENVIRONMENT, "GGML_NO_BACKTRACE": "1", "LLAMA_SERVER_ROUTER_PORT": "1"},
                on_line=line,
            )
        except OSError as error:
            ports.give_back(port)
            raise HeadFailed(f"llama-server could not be started: {error}") from error
        except BaseException:
            ports.give_back(port)
            raise
        return cls(process, port, ports)

    async def ready(self, http: aiohttp.ClientSession) -> None:
        """Wait until it answers. The caller gives up by cancelling.

        Raises:
            HeadFailed: it ended, or did not listen on loopback alone.
        """
        while True:
            if not self.process.running:
                raise self.failure()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=2.0)) as reply:
                    await reply.read()
                    if reply.status == 200:
                        break
            await asyncio.wait({self.process.exited}, timeout=_ASK_SECONDS)
        addresses = await asyncio.to_thread(self.process.addresses)
        if (LOOPBACK, self.port) not in addresses:
            raise HeadFailed(
                f"port {self.port} is answered by another program than our llama-server: "
                "set llama.server_port to another",
                port=True,
            )
        if any(address != LOOPBACK for address, _ in addresses):
            raise HeadFailed(f"llama-server listens on {addresses}, not on {LOOPBACK} alone: ended")

    def failure(self) -> HeadFailed:
        """Why it ended. Only when it has."""
        lines = self.process.last_lines()
        code = self.process.exited.result()
        why = last_words(code, lines)
        worker = worker_was_lost(lines)
        return HeadFailed(
            f"llama-server: {why}",
            port=port_was_taken(lines),
            worker=worker,
            crashed=crashed(code) and not worker,
        )

    async def stop(self, patience: float) -> None:
        """End it: it ignores SIGTERM while it hangs on a worker, so ``patience`` seconds, then SIGKILL."""
        await self.process.stop(patience)
        self._ports.give_back(self.port)
