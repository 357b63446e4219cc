"""A client of the whole cluster: sends requests to one node, and fails over to another.

The first node that responds lists the others. A request without a response is sent to another node. A broken
stream is resumed: the next node is told what was delivered and returns the rest, as it does when an engine
fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from sollold.client import discovery
from sollold.client.arguments import check_seconds
from sollold.client.connections import Connections
from sollold.client.errors import ClientError, NodeLost, NodeSilent
from sollold.client.http import Client, api_key_of
from sollold.client.node_list import KnownNode, NodeList
from sollold.client.outage import INEXACT, Outage
from sollold.client.received import Received
from sollold.client.time_limits import TimeLimits

log = logging.getLogger("sollold.client")

STALL_SECONDS = 20.0
"""Seconds of silence in a stream after which its node is considered gone; nodes send keep-alives."""
_LEARN_SECONDS = 30.0
"""Seconds between refreshes of the node list, while there are requests."""
_LEARN_AGAIN_SECONDS = 5.0
_PING_SECONDS = 2.0
_STOPPING = "this node is stopping"
"""Error of a node that is shutting down."""

T = TypeVar("T")


class ClusterClient:
    """A client of one cluster's nodes. It may be used on several event loops.

    Args:
        nodes: URLs of nodes, preferred ones first. Default: ``$SOLLOLD_NODE_URL``, this machine, else nodes
            found by mDNS.
        timeout: limit for a response that is not streamed, in seconds.
        find: called if no node is known and none responds on this machine; returns URLs.
        api_key: API key, if the nodes require one; None: ``$SOLLOLD_API_KEY``, empty: none. It is sent to the
            named nodes, to this machine's, and to those listed by them, but not to other nodes found by
            mDNS, which anyone on the LAN can announce.
    """

    def __init__(
        self,
        nodes: Sequence[str] = (),
        *,
        timeout: float = 30.0,
        find: Callable[[], Awaitable[Sequence[str]]] = discovery.on_the_lan,
        api_key: str | None = None,
    ) -> None:
        check_seconds("timeout", timeout)
        self.api_key = api_key_of(api_key)
        self.nodes = NodeList(nodes)
        self._timeout = timeout
        self._find = find
        self._connections = Connections()
        self._learned_at = 0.0

    def apart(self) -> ClusterClient:
        """A separate client of the same nodes, for another event loop."""
        client = ClusterClient(timeout=self._timeout, find=self._find, api_key=self.api_key)
        for known in self.nodes:
            client.nodes.add([known.address], trusted=known.trusted)
        return client

    def __repr__(self) -> str:
        return self.nodes.asked_by(self)

    async def close(self) -> None:
        """Close the connections. The client can be used again afterwards."""
        await self._connections.close()

    def __getstate__(self) -> dict[str, Any]:
        # Knowledge of the nodes may be pickled; connections belong to this process.
        return {**vars(self), "_connections": Connections()}

    def __del__(self) -> None:
        # No ResourceWarning: short programs often do not close their clients. It may have no connections if
        # its __init__ failed.
        if "_connections" in vars(self):
            self._connections.abandon()

    # Responses that are not streamed.

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """Get the JSON at ``path`` from any node.

        Raises:
            ClientError: as `Client.get`.
        """
        return await self._whole(lambda client: client.get(path, timeout=timeout), retry_silent=True)

    async def post(self, path: str, body: object, *, timeout: float | None = None) -> Any:
        """POST JSON to any node; it may be sent more than once if a node fails.

        Raises:
            ClientError: as `Client.post`.
        """
        return await self._whole(lambda client: client.post(path, body, timeout=timeout))

    async def get_all(self, path: str, *, timeout: float = 5.0) -> dict[str, Any]:
        """Get the JSON at ``path`` from every reachable node, by node name.

        Of nodes with the same name, all but the first are keyed by name and id.

        Raises:
            ClientError: no node responded.
        """
        await self.get("/api/version")
        await self.learn()

        async def fetch(known: KnownNode) -> tuple[KnownNode, Any]:
            return known, await self._client(known.url).get(path, timeout=timeout)

        answers = await asyncio.gather(
            *(fetch(known) for known in self.nodes if not known.failures), return_exceptions=True
        )
        found: dict[str, Any] = {}
        ids = set[str]()
        for answer in answers:
            if not isinstance(answer, BaseException):
                known, data = answer
                if known.node and known.node in ids:
                    continue  # the same node at another address
                ids.add(known.node)
                name = known.name or known.url
                found[f"{name} ({known.node})" if name in found else name] = data
        if not found:
            raise next(error for error in answers if isinstance(error, BaseException))
        return found

    async def _whole(self, ask: Callable[[Client], Awaitable[T]], *, retry_silent: bool = False) -> T:
        """Send a request to the nodes in turn. ``retry_silent``: also try another after a timeout."""
        lost: ClientError | None = None
        for known in await self._candidates():
            try:
                answer = await ask(self._client(known.url))
            except ClientError as error:
                if not _is_gone(error) and not (retry_silent and isinstance(error, NodeSilent)):
                    raise
                self._lost(known, error)
                lost = error
                continue
            self._answered(known)
            return answer
        raise lost or _no_node()

    # Streams.

    async def stream(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout: float | None = None,
        start_timeout: float | None = None,
        began: float | None = None,
        whole: bool = False,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the records of an answer of ``/api/chat`` or ``/api/generate``, surviving the loss of nodes.

        Deeply nested, since a generator can't delegate its yields to a function.

        Args:
            path, body: the request; ``stream`` is set here.
            timeout: limit for the whole answer, in seconds; it also stops the engine.
            start_timeout: limit until the answer begins, in seconds, not counting time in a queue.
            began: start of the request on the monotonic clock; None: now.
            whole: yield one record with the complete answer, as for a request that is not streamed.
            on_wait: called with the reason for waiting: ``loading 43 %``, ``queued, place 2`` …

        Raises:
            RequestTimeout: after ``timeout`` or ``start_timeout``.
            ClientError: the daemon refused, or no node was reachable for two minutes.
        """
        limits = TimeLimits(time.monotonic() if began is None else began, timeout, start_timeout)
        received = Received()
        outage = Outage()
        while True:
            error: ClientError = _no_node()
            for known in await limits.within(self._candidates()):
                request = received.request({**body, "stream": True, **limits.body()})
                try:
                    records = self._records(known, path, request, limits, received, on_wait)
                    async with contextlib.aclosing(records):
                        async for record in records:
                            if record.get("done"):
                                yield received.whole(record) if whole else record
                                return
                            if not whole:
                                yield record
                    raise NodeLost(f"the answer of {known.url} broke off before its end")
                except ClientError as failure:
                    error = failure
                if _is_gone(error) or isinstance(error, NodeSilent):
                    self._lost(known, error)
                    outage.node_lost(known, received, time.monotonic())
                elif whole and received and INEXACT in error.message:
                    # Nothing of it was delivered yet.
                    received.forget()
                    break
                elif outage.excuses(error):
                    break
                else:
                    raise error
            if not received.reached or outage.too_long(time.monotonic()):
                raise error
            await limits.within(self._ping_after(outage.next_pause()))

    async def _records(
        self,
        known: KnownNode,
        path: str,
        body: dict[str, Any],
        limits: TimeLimits,
        received: Received,
        on_wait: Callable[[str], None],
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The non-empty records of one node, and the last one."""
        headers: dict[str, str] = {}
        stream = self._client(known.url).stream(path, body, stall=STALL_SECONDS, headers=headers)
        async with contextlib.aclosing(stream):
            while (record := await limits.within(anext(stream, None))) is not None:
                received.reached = True
                received.backend = headers.get("X-Sollold-Backend") or received.backend
                waiting = record.pop("_waiting", None)
                if isinstance(waiting, str):
                    limits.waits(waiting)
                    if waiting.startswith("answering: "):
                        received.backend = waiting.split()[1]
                    on_wait(waiting)
                has_content = received.add(record, time.monotonic())
                if has_content or record.get("done"):
                    limits.started()
                    self._answered(known)
                    yield received.finish(record, limits.elapsed()) if record.get("done") else record

    # The list of nodes.

    async def learn(self) -> None:
        """Refresh the list of nodes from the cluster.

        Raises:
            ClientError: no node responded.
        """
        lost: ClientError | None = None
        for known in await self._candidates():
            try:
                cluster = await self._client(known.url).get("/api/cluster", timeout=5.0)
            except ClientError as error:
                self._lost(known, error)
                lost = error
                continue
            self.nodes.learn(known.url, cluster)
            self._learned_at = time.monotonic()
            self._answered(known)
            return
        raise lost or _no_node()

    async def _candidates(self) -> list[KnownNode]:
        """The nodes to ask, in order; in the background, lost nodes are rechecked and the list is updated."""
        connections = self._connections.here()
        if not len(self.nodes):
            await self._discover()
        now = time.monotonic()
        for known in self.nodes.due(now):
            connections.in_background(known.url, self._ping(known))
        if not self._learned_at or now - self._learned_at >= _LEARN_SECONDS:
            connections.in_background("learn", self._learn_quietly())
        return self.nodes.order()

    async def _discover(self) -> None:
        """Find the first node: in the environment, on this machine, by mDNS."""
        async with self._connections.here().finding:
            if len(self.nodes):
                return
            if named := discovery.named_in_environment():
                self.nodes.add(named)
                return
            with contextlib.suppress(ClientError):
                await self._client(discovery.HERE).get("/api/version", timeout=_PING_SECONDS)
                self.nodes.add([discovery.HERE])
                return
            found = await self._find()
            if not found:
                raise _no_node()
            self.nodes.add(found, trusted=False)

    def _client(self, url: str) -> Client:
        key = self.api_key if self.nodes.is_trusted(url) else ""
        address = self.nodes.address_of(url)
        return Client(address, timeout=self._timeout, session=self._connections.here().session, api_key=key)

    def _lost(self, known: KnownNode, error: ClientError) -> None:
        level = logging.WARNING if known.reached and not known.failures else logging.DEBUG
        log.log(level, "node lost: %s: %s", known.name or known.url, error.message)
        self.nodes.failed(known.url, time.monotonic())

    def _answered(self, known: KnownNode) -> None:
        if known.failures:
            log.info("node is back: %s", known.name or known.url)
        self.nodes.answered(known.url)

    async def _learn_quietly(self) -> None:
        # A node that does not list the others is not asked again with every request.
        self._learned_at = time.monotonic() - _LEARN_SECONDS + _LEARN_AGAIN_SECONDS
        for known in self.nodes.order():
            with contextlib.suppress(ClientError):
                self.nodes.learn(known.url, await self._client(known.url).get("/api/cluster", timeout=5.0))
                self._learned_at = time.monotonic()
                return

    async def _ping(self, known: KnownNode) -> None:
        try:
            await self._client(known.url).get("/api/version", timeout=_PING_SECONDS)
        except ClientError:
            self.nodes.failed(known.url, time.monotonic())
            return
        self._answered(known)

    async def _ping_after(self, seconds: float) -> None:
        """While no node responds: pause, then check all nodes that are due before the next round."""
        await asyncio.sleep(seconds)
        await asyncio.gather(*(self._ping(known) for known in self.nodes.due(time.monotonic())))


def _is_gone(error: ClientError) -> bool:
    """Whether the error means that the node is gone, rather than that it refused the request."""
    return isinstance(error, NodeLost) or _STOPPING in error.message


def _no_node() -> NodeLost:
    return NodeLost(
        "no sollold daemon answers on this machine, and none was found on the LAN. Start one with "
        "`systemctl start sollold` or `sollold run`, name one (node='http://HOST:11435' or "
        f"${discovery.NODE_VARIABLE}), or let the router start one (auto_setup_rpc=True)"
    )
