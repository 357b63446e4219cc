"""The head's ``llama-server`` process: starting it, waiting until it is ready, stopping it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import msgspec

from sollold.engines.address import EngineAddress
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.command_line import WorkerAddress, command_line
from sollold.engines.llamacpp.context import DeploymentContext
from sollold.engines.llamacpp.engine_key import EngineKey
from sollold.engines.llamacpp.exit_reason import (
    crashed,
    draft_was_refused,
    exit_reason,
    port_was_taken,
    projector_was_refused,
    worker_was_lost,
)
from sollold.engines.llamacpp.ports import LOOPBACK, Ports
from sollold.engines.llamacpp.process import GATHER_SECONDS, Process
from sollold.errors import system_words
from sollold.machine.backends import ENVIRONMENT
from sollold.models.model import Model
from sollold.models.templates.go_parser import TemplateError
from sollold.models.templates.jinja import to_jinja
from sollold.placement.plan import Plan
from sollold.settings.state_file import write_whole
from sollold.undecodable import UNDECODABLE

_POLL_SECONDS = 0.1
_REMOVE_SECONDS = 2.0
_STATE = "cmd_child_to_router:state:"
_ENVIRONMENT = {**ENVIRONMENT, "GGML_NO_BACKTRACE": "1", "LLAMA_SERVER_ROUTER_PORT": "1"}
"""With a router's port it reports its progress, and exits when its stdin closes, so when the daemon dies."""


class HeadFailed(Exception):
    """``llama-server`` did not become ready, or exited; the message says why."""

    def __init__(
        self,
        reason: str,
        *,
        port: bool = False,
        worker: bool = False,
        crashed: bool = False,
        projector: bool = False,
        draft: bool = False,
    ) -> None:
        super().__init__(reason)
        self.worker = worker
        """It exited because it lost a worker."""
        self.crashed = crashed
        """It exited by a fault of its own."""
        self.port = port
        """Another program had taken its port: worth retrying."""
        self.projector = projector
        """It could not load the projector: worth retrying without it."""
        self.draft = draft
        """It could not load the draft model: worth retrying without it."""


class _Loading(msgspec.Struct):
    """llama-server's report to a router while it starts. Undocumented: nothing depends on it."""

    state: str = ""
    payload: msgspec.Raw = msgspec.Raw(b"{}")


class _Progress(msgspec.Struct):
    stages: list[str] = []
    current: str = ""
    value: float = 0.0


def _write_template(plan: Plan, folder: Path) -> Path | None:
    """Write the plan's TEMPLATE as Jinja to a file for ``llama-server``; None if the plan has none."""
    if not plan.template:
        return None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "chat-template.jinja"
    write_whole(path, to_jinja(plan.template).encode(), durable=False)
    return path


def progress_in(line: str) -> float | None:
    """Return the load progress in this line of output, 0.0 to 1.0; None if there is none."""
    if not line.startswith(_STATE):
        return None
    try:
        report = msgspec.json.decode(line[len(_STATE) :], type=_Loading)
        if report.state != "loading":
            return None
        part = msgspec.json.decode(report.payload, type=_Progress)
    except (*UNDECODABLE, ValueError):
        return None
    value = min(max(part.value, 0.0), 1.0)
    if part.current not in part.stages:
        return value
    return (part.stages.index(part.current) + value) / len(part.stages)


def _report_progress(on_progress: Callable[[float], None], line: str) -> None:
    if (value := progress_in(line)) is not None:
        on_progress(value)


class Head:
    """A running ``llama-server``. Create it with `Head.start`; it is READY after `Head.ready`.

    Attributes:
        address: its URL and key.
    """

    def __init__(self, process: Process, port: int, ports: Ports, key: EngineKey) -> None:
        self.process = process
        self.port = port
        self.address = EngineAddress(f"http://{LOOPBACK}:{port}", key.text)
        self._ports = ports
        self._key = key
        self._released = False
        """Whether its port and key are given back."""

    @classmethod
    async def start(
        cls,
        plan: Plan,
        model: Model,
        llama: Llama,
        workers: Sequence[WorkerAddress],
        *,
        deployment: str,
        context: DeploymentContext,
        on_progress: Callable[[float], None],
        draft: Model | None = None,
    ) -> Head:
        """Start it with a new key.

        ``on_progress`` is called on the loop with 0.0 to 1.0 while it loads.

        Raises:
            HeadFailed: it could not be started.
        """
        ports, logs = context.ports, context.logs / deployment
        try:
            template = await asyncio.to_thread(_write_template, plan, logs)
            port = ports.take_port()
        except (OSError, TemplateError) as error:
            raise HeadFailed(f"llama-server could not be started: {system_words(error)}") from error
        key = EngineKey(context.keys, port)
        command = command_line(
            plan,
            model,
            llama,
            workers,
            port=port,
            key_file=key.file,
            threads=context.threads,
            extra=context.extra,
            template=template,
            draft=draft,
            slots=context.prompts.folder,
        )
        try:
            await asyncio.to_thread(key.make)
            process = await Process.start(
                "llama-server",
                command,
                deployment=deployment,
                journal=context.journal,
                log_file=logs / "llama-server.log",
                env=_ENVIRONMENT,
                on_line=partial(_report_progress, on_progress),
                prefix=_STATE,
                gather=GATHER_SECONDS,
            )
        except BaseException as error:
            await _give_back(port, key, ports)
            if isinstance(error, OSError):
                raise HeadFailed(f"llama-server could not be started: {system_words(error)}") from error
            raise
        return cls(process, port, ports, key)

    async def ready(self, http: aiohttp.ClientSession) -> None:
        """Wait until it answers. Cancel to give up.

        Raises:
            HeadFailed: it exited, listens beyond loopback, or another program has its port.
        """
        url = self.address.url
        while True:
            if not self.process.running:
                raise self.failure()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=2.0)) as reply:
                    await reply.read()
                    if reply.status == 200:
                        break
            await asyncio.wait({self.process.exited}, timeout=_POLL_SECONDS)
        addresses = await asyncio.to_thread(self.process.addresses)
        if (LOOPBACK, self.port) not in addresses:
            raise HeadFailed(
                f"another program answers on port {self.port} instead of our llama-server: "
                "set llama.server_port to another port",
                port=True,
            )
        if any(address != LOOPBACK for address, _ in addresses):
            raise HeadFailed(f"llama-server listens on {addresses}, not only on {LOOPBACK}: stopped")

    def failure(self) -> HeadFailed:
        """Return why it exited. Call it only once it has."""
        lines = self.process.last_lines()
        code = self.process.exited.result()
        why = exit_reason(code, lines)
        worker = worker_was_lost(lines)
        return HeadFailed(
            f"llama-server: {why}",
            port=port_was_taken(lines),
            worker=worker,
            crashed=crashed(code, lines) and not worker,
            projector=projector_was_refused(lines),
            draft=draft_was_refused(lines),
        )

    async def stop(self, grace: float) -> None:
        """Stop it, by SIGKILL after ``grace`` seconds: it ignores SIGTERM while it waits for a worker.

        May be called twice: its port, and the key file named by it, may be another engine's by then.
        """
        await self.process.stop(grace)
        if self._released:
            return
        self._released = True
        await _give_back(self.port, self._key, self._ports)


async def _give_back(port: int, key: EngineKey, ports: Ports) -> None:
    """Delete a key's file, then give back the port that names it. If the disk hangs, do not wait for that."""
    removing = asyncio.ensure_future(asyncio.to_thread(key.remove))
    removing.add_done_callback(lambda _: ports.give_back(port))
    await asyncio.wait({removing}, timeout=_REMOVE_SECONDS)
