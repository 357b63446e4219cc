"""A client's connections. Each event loop has its own, since a connection belongs to its loop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sollold.client.trust import CA_VARIABLE, trusted
from sollold.tasks import cancel_and_wait

if TYPE_CHECKING:
    import aiohttp

LONGEST_LINE = 1 << 20
"""Half of the maximum length of a line in a stream, in bytes."""
_open: set[aiohttp.ClientSession] = set()
"""Sessions of clients. The garbage collector must not find one together with its client: it finalizes both in
any order, and an open session warns."""


def new_session() -> aiohttp.ClientSession:
    """A session for the running loop.

    Raises:
        ClientError: the file named by ``$SOLLOLD_CA`` is unusable.
    """
    import aiohttp

    # Only HTTPS needs the system's CA certificates, which load slowly.
    context = trusted() if os.environ.get(CA_VARIABLE) else True
    # Each stream has its own connection, and a program may read any number of streams concurrently.
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_note_reused)
    return aiohttp.ClientSession(connector=connector, read_bufsize=LONGEST_LINE, trace_configs=[tracing])


async def _note_reused(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    context.trace_request_ctx.reused = True


class LoopConnections:
    """The connections and background tasks of one client on the running loop.

    Attributes:
        session: holds the connections.
        finding: lock of the search for the first node.
    """

    def __init__(self) -> None:
        self.session = new_session()
        self.finding = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._end = _closed_with_loop(self.session)

    def in_background(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` as a task, unless one with this name is running."""
        if name in self._tasks:
            work.close()
            return
        task = self._tasks[name] = self._loop.create_task(work, name=f"sollold {name}")
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    def is_over(self) -> bool:
        """Whether its loop has ended: it is closed, or another one runs in its thread."""
        here = self._thread == threading.get_ident() and not self._loop.is_running()
        return here or self._loop.is_closed()

    async def close(self) -> None:
        """Cancel the tasks and close the connections; on their own loop."""
        await cancel_and_wait(*self._tasks.values())
        await self._end.aclose()

    def abandon(self) -> None:
        """Drop the connections without waiting: in any thread, also after the end of the loop."""
        _open.discard(self.session)
        if (connector := self.session.connector) is not None:
            with contextlib.suppress(Exception):
                self.session.detach()
                if self._loop.is_running() and self._loop is not asyncio._get_running_loop():
                    self._loop.call_soon_threadsafe(connector._close)
                else:
                    connector._close()
        with contextlib.suppress(StopIteration, RuntimeError):
            # It ends at once, without a loop, since nothing is left to wait for.
            self._end.aclose().send(None)


class Connections:
    """The connections of a client on the loops that use it, which may run in several threads."""

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, LoopConnections] = {}

    def here(self) -> LoopConnections:
        """Those of the running loop.

        Raises:
            ClientError: as `new_session`.
        """
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None or found.session.closed:
            self._abandon(lambda connections: connections is found or connections.is_over())
            found = self._loops[loop] = LoopConnections()
        return found

    async def close(self) -> None:
        """Close the connections of the running loop; other loops that run keep theirs."""
        here = self._loops.pop(asyncio.get_running_loop(), None)
        self._abandon(LoopConnections.is_over)
        if here is not None:
            await here.close()

    def abandon(self) -> None:
        """Drop all connections without waiting."""
        self._abandon(lambda connections: True)

    def _abandon(self, chosen: Callable[[LoopConnections], bool]) -> None:
        # Several threads may do this at once.
        for loop, connections in tuple(self._loops.items()):
            if chosen(connections) and self._loops.pop(loop, None) is not None:
                connections.abandon()


def _closed_with_loop(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    """An async generator that closes ``session`` when it is closed, or when the running loop ends.

    `asyncio.run` closes unfinished generators while connections can still be closed cleanly.
    """
    end = _closing(session)
    with contextlib.suppress(StopIteration):
        # Runs up to its yield without waiting; from now on the loop knows the generator.
        end.__anext__().send(None)
    return end


async def _closing(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    _open.add(session)
    try:
        yield
    finally:
        _open.discard(session)
        await session.close()


@atexit.register
def _leave_to_the_system() -> None:
    """At the end of the program the system closes the connections: loops in other threads no longer run."""
    for session in tuple(_open):
        if session.connector is not None:
            session.connector._closed = True
