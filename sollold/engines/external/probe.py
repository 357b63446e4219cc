"""A probe of an external worker: a real handshake with a timeout on every step."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sollold.engines.external.rpc_protocol import DeviceMemory, Handshake, NotAWorker, Version
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.ports import LOOPBACK, Ports
from sollold.engines.llamacpp.rpc_worker import Worker, WorkerFailed
from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR
from sollold.machine.external_worker import ExternalState, ExternalWorker

log = logging.getLogger("sollold.engines")

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 2.0
"""Timeout of the handshake: a free worker answers within milliseconds, one serving another client never."""
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Outcome of a probe.

    ``memories``: memory of the worker's devices, in order, if USABLE; ``silent``: connecting timed
    out.
    """

    state: ExternalState
    reason: str = ""
    version: Version | None = None
    memories: tuple[DeviceMemory, ...] = ()
    silent: bool = False

    def worker(self, address: str) -> ExternalWorker:
        """Return the status to report for the worker at ``address``."""
        total = sum(memory.total for memory in self.memories)
        version = str(self.version or "")
        return ExternalWorker(address, self.state, self.reason, version, len(self.memories), total)


async def look(
    host: str, port: int, local: Version | None, *, connect: float = CONNECT_SECONDS
) -> ProbeResult:
    """Probe the worker at ``host:port``. It serves one client at a time, and during the probe that is us.

    Args:
        local: protocol version of the local llama.cpp; None: accept any.
        connect: connection timeout in seconds.
    """
    try:
        async with asyncio.timeout(connect):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return ProbeResult(
            ExternalState.DEAD, f"no connection to {host}:{port} within {connect:g} s", silent=True
        )
    except (OSError, UnicodeError) as error:
        reason = system_reason(error)
        return ProbeResult(ExternalState.DEAD, f"nothing listens on {host}:{port} ({reason})")
    handshake = Handshake(local)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await _shake_hands(handshake, reader, writer)
    except TimeoutError:
        if handshake.version is None:
            reason = f"{host}:{port} accepts connections but does not answer: it serves another client"
            return ProbeResult(ExternalState.BUSY, reason)
        return ProbeResult(ExternalState.REFUSED, f"{host}:{port} stopped while answering")
    except (OSError, EOFError):
        # Very old workers close the connection when they receive an unknown command.
        reason = f"{host}:{port} closed the connection: not a worker, or an incompatible llama.cpp"
        return ProbeResult(ExternalState.REFUSED, reason, handshake.version)
    except NotAWorker as error:
        return ProbeResult(ExternalState.REFUSED, f"{host}:{port}: {error}", handshake.version)
    finally:
        writer.transport.abort()  # The worker serves the next client only once we are gone.
    version = handshake.version
    assert version is not None
    if local is not None and not version.mixes(local):
        reason = (
            f"{host}:{port} speaks version {version} of the RPC protocol, but the llama.cpp here {local}: "
            "start it from the same build"
        )
        return ProbeResult(ExternalState.REFUSED, reason, version)
    if not handshake.memories:
        return ProbeResult(ExternalState.REFUSED, f"{host}:{port} offers no device", version)
    return ProbeResult(ExternalState.USABLE, "", version, tuple(handshake.memories))


async def _shake_hands(
    handshake: Handshake, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(handshake.begin())
    while not handshake.done:
        data = await reader.read(_CHUNK)
        if not data:
            raise EOFError
        writer.write(handshake.feed(data))
        await writer.drain()


async def own_protocol(llama: Llama, ports: Ports, journal: Journal, logs: Path) -> Version | None:
    """Return the protocol version of this llama.cpp, asked of a temporary worker; None if that fails."""
    try:
        worker = await Worker.start(
            llama,
            (PROCESSOR,),
            deployment="protocol",
            ports=ports,
            journal=journal,
            logs=logs,
            threads=1,
            cache=None,
        )
    except WorkerFailed as error:
        log.warning("unknown RPC protocol of llama.cpp %s: %s", llama.build, error)
        return None
    try:
        found = await look(LOOPBACK, worker.port, None)
        if found.version is None:
            log.warning("unknown RPC protocol of llama.cpp %s: %s", llama.build, found.reason)
        return found.version
    finally:
        await worker.stop()
