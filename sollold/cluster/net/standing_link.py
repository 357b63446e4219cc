"""Standing links: a TLS connection kept open between two members, to notice when it breaks.

When a process dies, its system closes its connections: the others know within milliseconds. When a whole
machine falls silent, TCP keep-alive closes the connection within seconds. A node that leaves sends a goodbye
first. Links also measure round trips, and occasionally the transfer rate.

With up to 32 nodes all are linked with each other; with more, each is linked with neighbours at distances
1, 2, 4, … on the ring of ids. Of two nodes the one with the lower id opens the connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable
from typing import cast

import msgspec

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import Dialer, keep_watch
from sollold.cluster.net.framing import FrameError, Unframer, frame
from sollold.cluster.net.link_messages import Bye, Hello, LinkMessage, Load, Ping, Pong, Took, decode
from sollold.cluster.net.link_stats import BestRate
from sollold.cluster.net.open_sockets import literal
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import LINK
from sollold.tasks import cancel_and_wait
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

FULL = 32
"""Maximum number of nodes that are all linked with each other."""
SILENT_SECONDS = 4
"""Seconds of silence after which a machine's links are closed."""
_PING_SECONDS = 15.0
_HELLO_SECONDS = 5.0
_FIRST_PINGS = 3
_LOAD_DELAY = 3.0
_LOAD_SECONDS = 3600.0
_LOAD_INTERVAL = 60.0
"""Seconds between the first few rate measurements."""
_LOAD_PIECES = 16
_LOAD_PIECE = 64 * 1024
_MAX_BYTES = _LOAD_PIECE + 1024
_RETRY_SECONDS = 30.0
_SILENCE = frozenset(
    (errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
)
"""Errors by which our own system gives a connection up; any other means that the peer closed it."""


def neighbours(me: str, nodes: Iterable[str]) -> frozenset[str]:
    """Return those of ``nodes`` that ``me`` has links with; the relation is symmetric."""
    others = sorted(set(nodes) - {me})
    if len(others) < FULL:
        return frozenset(others)
    ring = sorted([*others, me])
    index = ring.index(me)
    found = set()
    step = 1
    while step <= len(ring) // 2:
        found |= {ring[(index + step) % len(ring)], ring[(index - step) % len(ring)]}
        step *= 2
    return frozenset(found)


class StandingLinks:
    """All standing links of this node.

    Args:
        reach: opens connections.
        made: called when a link to a node is up, with its IP address and gossip port.
        lost: called when a link broke without goodbye; True: the other side fell silent, False: the other
            side's system closed it.
        measured: called with (node, round trip in seconds, bytes per second or 0.0).
        barred: (node, boot) → whether this process is not that node, although it has its key.
    """

    def __init__(
        self,
        reach: Dialer,
        *,
        made: Callable[[str, Address], None],
        lost: Callable[[str, bool], None],
        measured: Callable[[str, float, float], None],
        barred: Callable[[str, int], bool] = lambda node, boot: False,
    ) -> None:
        self.port = 0
        self.boot = 0
        self._reach = reach
        self.name = reach.name
        self._made = made
        self._lost = lost
        self._measured = measured
        self._barred = barred
        self._wanted: frozenset[str] = frozenset()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._links: dict[str, StandingLink] = {}
        self._closed = False

    def up(self) -> tuple[str, ...]:
        """Return the nodes currently linked with."""
        return tuple(sorted(self._links))

    def want(self, nodes: frozenset[str]) -> None:
        """Keep links with ``nodes`` only."""
        if self._closed or nodes == self._wanted:
            return
        for node in self._wanted - nodes:
            keeper = self._keepers.pop(node, None)
            if keeper is not None:
                keeper.cancel()
            link = self._links.get(node)
            if link is not None and link.dialed:
                link.bye()
        self._wanted = nodes
        for node in nodes:
            if self._reach.node < node and node not in self._keepers:
                self._keepers[node] = asyncio.get_running_loop().create_task(self._keep(node))

    def accept(self, peer: str) -> StandingLink:
        """Return the protocol for a link opened by ``peer``."""
        return StandingLink(self, peer, dialed=False)

    def drop_node(self, node: str, *, boot: int = 0) -> None:
        """Close the link with ``node``, which is dead or has a new process with boot number ``boot``."""
        link = self._links.get(node)
        if link is not None and link.boot != boot:
            del self._links[node]
            link.bye()

    def drop_hosts(self, *, own: Collection[str] = (), other: Collection[str] = ()) -> None:
        """Close links using addresses that this machine (``own``) or another one no longer has.

        This does not count as a death; new links are opened via current addresses."""
        for node, link in tuple(self._links.items()):
            own_host, other_host = link.hosts()
            if own_host in own or other_host in other:
                del self._links[node]
                link.bye()

    async def close(self) -> None:
        """Send goodbye on every link and close it."""
        self._closed = True
        for link in tuple(self._links.values()):
            link.bye()
        await cancel_and_wait(*self._keepers.values())
        self._keepers.clear()
        self._links.clear()

    def link_up(self, link: StandingLink, address: Address) -> None:
        """Register ``link``, which has sent its hello."""
        if self._closed or self._barred(link.node, link.boot):
            link.bye()
            return
        before = self._links.get(link.node)
        if before is not None and before is not link:
            before.bye()
        self._links[link.node] = link
        self._made(link.node, address)

    def link_closed(self, link: StandingLink, *, silent: bool) -> None:
        """Handle a closed link; ``silent``: closed by our own system, as the peer fell silent."""
        if self._links.get(link.node) is not link:
            return
        del self._links[link.node]
        if not link.said_bye and not self._closed:
            self._lost(link.node, silent)

    def measure(self, node: str, trip: float, rate: float) -> None:
        """Report a link's round trip and rate."""
        self._measured(node, trip, rate)

    async def _keep(self, node: str) -> None:
        """Keep a link to ``node`` open."""
        pause = 0.5
        while not self._closed:
            try:
                link, _, _ = await self._reach.connect(
                    node, LINK, lambda: StandingLink(self, node, dialed=True), timeout=3.0
                )
            except PeerError as error:
                log.debug("no link with %s: %s", self.name(node), error)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))
                pause = min(_RETRY_SECONDS, pause * 2)
                continue
            try:
                began = asyncio.get_running_loop().time()
                await link.watch()
                if asyncio.get_running_loop().time() - began > 5:
                    pause = 0.5
            finally:
                if not link.closed.done():
                    link.bye()
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(_RETRY_SECONDS, pause * 2)


class StandingLink(asyncio.Protocol):
    """One link, seen from one side.

    Attributes:
        node: the authenticated node at the other end.
        dialed: this side opened it, so it measures.
        boot: boot number of the process at the other end; 0 before its hello.
        said_bye: it is closed on purpose.
        closed: done when it is closed.
    """

    def __init__(self, links: StandingLinks, node: str, *, dialed: bool) -> None:
        self.node = node
        self.dialed = dialed
        self.said_bye = False
        self.boot = 0
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._links = links
        self._bytes = Unframer(_MAX_BYTES)
        self._hello = False
        self._timer: asyncio.TimerHandle | None = None
        self._sequence = 0
        self._sent = 0.0
        self._answered: asyncio.Future[None] | None = None
        self._trip = 0.0
        self._rate = 0.0
        self._rates = BestRate()
        self._arrivals: list[float] = []
        self._all_arrived: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the hello."""
        self._transport = cast(asyncio.Transport, transport)
        keep_watch(transport, seconds=SILENT_SECONDS, always=True)
        self._timer = self._loop.call_later(_HELLO_SECONDS, self.bye)
        if self.dialed:
            self._send(Hello(self._links.port, self._links.boot))

    def data_received(self, data: bytes) -> None:
        """Handle complete messages."""
        try:
            self._bytes.feed(data)
            while (message := self._bytes.take_message()) is not None:
                if (known := decode(message)) is not None:
                    self._hear(known)
        except (FrameError, *UNDECODABLE) as error:
            name = self._links.name(self.node)
            log.warning("the link with %s carried an invalid message: %s", name, error)
            self.bye()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the link."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)
        self._links.link_closed(self, silent=isinstance(exc, OSError) and exc.errno in _SILENCE)

    def hosts(self) -> tuple[str, str]:
        """Return the IP addresses of the link: this machine's and the other's."""
        ends = (self._transport.get_extra_info(end) for end in ("sockname", "peername"))
        own, other = (literal(end)[0] if end else "" for end in ends)
        return own, other

    def bye(self) -> None:
        """Close this link on purpose, so that the other side does not take it for a death."""
        self.said_bye = True
        self._send(Bye())
        self._transport.close()

    async def watch(self) -> None:
        """Measure periodically until the link is closed. For the side that opened it."""
        load_at = self._loop.time() + _LOAD_DELAY * random.uniform(1, 3)
        pings = 0
        while not self.closed.done():
            await self._measure_trip()
            pings += 1
            if self._loop.time() >= load_at:
                await self._measure_rate()
                interval = _LOAD_SECONDS if self._rates.settled else _LOAD_INTERVAL
                load_at = self._loop.time() + interval * random.uniform(0.75, 1.25)
            pause = 0.2 if pings < _FIRST_PINGS else _PING_SECONDS * random.uniform(0.8, 1.2)
            if self._rate == 0.0:
                pause = min(pause, max(0.1, load_at - self._loop.time()))
            await asyncio.wait([self.closed], timeout=pause)

    async def _measure_trip(self) -> None:
        self._sequence += 1
        self._answered = self._loop.create_future()
        self._sent = time.perf_counter()  # event loops count in milliseconds
        self._send(Ping(self._sequence, self._trip, self._rate))
        await self._done(self._answered, 10.0)

    async def _measure_rate(self) -> None:
        if self._transport.is_closing():
            return
        self._arrivals = []
        self._all_arrived = self._loop.create_future()
        piece = frame(msgspec.msgpack.encode(Load(random.randbytes(_LOAD_PIECE))))
        for _ in range(_LOAD_PIECES):
            self._transport.write(piece)
        await self._done(self._all_arrived, 10.0)
        if len(self._arrivals) == _LOAD_PIECES and self._arrivals[-1] > self._arrivals[0]:
            # The first response marks the first piece's arrival; from there on only the rate counts.
            rate = (_LOAD_PIECES - 1) * _LOAD_PIECE / (self._arrivals[-1] - self._arrivals[0])
            self._rate = self._rates.add(rate)
            self._links.measure(self.node, self._trip, self._rate)

    async def _done(self, future: asyncio.Future[None], seconds: float) -> None:
        await asyncio.wait([future, self.closed], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _hear(self, message: LinkMessage) -> None:
        if isinstance(message, Bye):
            self.said_bye = True
            self._transport.close()
        elif isinstance(message, Hello):
            self._greeted(message)
        elif not self._hello:
            self.bye()
        elif isinstance(message, Ping):
            self._send(Pong(message.sequence))
            if message.trip > 0:
                self._links.measure(self.node, message.trip, message.rate)
        elif isinstance(message, Pong):
            self._ponged(message)
        elif isinstance(message, Load):
            self._send(Took())
        elif self._all_arrived is not None and not self._all_arrived.done():
            self._arrivals.append(time.perf_counter())
            if len(self._arrivals) == _LOAD_PIECES:
                self._all_arrived.set_result(None)

    def _greeted(self, hello: Hello) -> None:
        if self._hello:
            self.bye()
            return
        self._hello, self.boot = True, hello.boot
        if self._timer is not None:
            self._timer.cancel()
        if not self.dialed:
            self._send(Hello(self._links.port, self._links.boot))
        peer = self._transport.get_extra_info("peername")
        self._links.link_up(self, (literal(peer)[0], hello.port))

    def _ponged(self, pong: Pong) -> None:
        if pong.sequence != self._sequence or self._answered is None or self._answered.done():
            return
        self._answered.set_result(None)
        trip = max(1e-6, time.perf_counter() - self._sent)
        # A busy loop only ever adds delay: adopt shorter times quickly, longer ones slowly.
        self._trip = (
            trip
            if not self._trip
            else self._trip + (trip - self._trip) * (0.5 if trip < self._trip else 0.125)
        )
        if self._sequence >= _FIRST_PINGS:
            self._links.measure(self.node, self._trip, self._rate)

    def _send(self, message: LinkMessage) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame(msgspec.msgpack.encode(message)))
