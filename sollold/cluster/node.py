"""The shell around the gossip core: sockets, clock, disk, and what the other rooms see of the cluster."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sollold.cluster.actions import (
    Action,
    Address,
    Change,
    Event,
    Kept,
    Persist,
    PushPullWith,
    Send,
    TcpPing,
)
from sollold.cluster.datagrams import Datagrams
from sollold.cluster.discovery import Discovery, DiscoveryStatus
from sollold.cluster.gossip import Gossip
from sollold.cluster.identity import Identity
from sollold.cluster.interfaces import Interface, InterfaceWatch, tellable, within
from sollold.cluster.kept_file import KeptFile, KeptWriter
from sollold.cluster.link import Links, neighbours
from sollold.cluster.measures import Measures
from sollold.cluster.peer import PeerError
from sollold.cluster.peer_client import Calls
from sollold.cluster.peer_server import LINK, Peers, PortTaken
from sollold.cluster.peers_file import Peer, PeersFile, PeersWriter
from sollold.cluster.reach import Reach
from sollold.cluster.record import Record
from sollold.cluster.seal import Opened, Sealer
from sollold.cluster.seeds import Seed, read_seeds, resolve
from sollold.cluster.sync import SYNC, SyncServer, knock, sync
from sollold.cluster.term import Term
from sollold.config import ClusterSettings

log = logging.getLogger("sollold.cluster")

_GOODBYE_SECONDS = 0.5
_ROUND_SECONDS = 30.0
"""Seeds are resolved again, and announced nodes that are not there are tried again."""
_EXCHANGES = 8
"""Push-pulls and TCP pings under way at a time."""
_STRANGERS = 4
"""Of these, tries to reach whoever may be somewhere: each of the machines that are off takes seconds."""
_ANY = ("0.0.0.0", "::", "")
_NO_IPV6 = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.ENOPROTOOPT))
_TRIES = 20


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """How the node's part in the cluster does, for doctor and metrics.

    Attributes:
        discovery: of mDNS; None when the settings turn it off.
        links: nodes that a standing link is up with.
        health: 0 good, up to 8: this node is slow or badly connected.
        rejected: packets that were opened but not understood.
        refused: datagrams dropped unopened, by reason (`sollold.cluster.seal.Refused`).
        unsent: datagrams the system did not take.
        unheard: names of live nodes on this one's own network that mDNS, which works, has never shown.
        cloned: another machine that uses our node id was heard since the start.
    """

    discovery: DiscoveryStatus | None
    links: tuple[str, ...]
    health: int
    rejected: int
    refused: dict[str, int]
    unsent: int
    unheard: tuple[str, ...]
    cloned: bool


class ClusterNode:
    """This node in the cluster; a `sollold.cluster.view.View`.

    Args:
        settings: of the cluster.
        identity: who this node is.
        record: what it says of itself at first; addresses and port are filled in at the start.
        peers: the answering side; everything is registered with it before `start`.
        state: folder for what must survive a restart.

    Attributes:
        reach: opens connections to nodes.
        calls: calls to other nodes.
    """

    def __init__(
        self, settings: ClusterSettings, identity: Identity, record: Record, peers: Peers, state: Path
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._peers = peers
        self._draft = record
        self._boot = secrets.randbits(62) | 1
        self._kept = KeptFile(state)
        self._keeper = KeptWriter(self._kept, self._persisted)
        self._remembered = PeersWriter(PeersFile(state), self._contacts)
        self._gossip: Gossip | None = None
        self.reach = Reach(identity, self._addresses_of)
        self.calls = Calls(self.reach, peers)
        self._sealer = Sealer(identity.tokens.accepted, node=identity.node, boot=self._boot)
        self._datagrams = Datagrams(self._sealer, self._heard)
        self._links = Links(self.reach, made=self._linked, lost=self._unlinked, measured=self._measured)
        self._discovery: Discovery | None = None
        self._interfaces: InterfaceWatch | None = None
        self._networks: tuple[str, ...] = ()
        self._silent: frozenset[str] = frozenset()
        self._unheard: frozenset[str] = frozenset()
        self._cloned = False
        self._host = settings.host or "::"
        self._port = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._exchanging = self._strangers = 0
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._telling = False
        self._live: tuple[Record, ...] | None = None
        self._measures = Measures()
        self._leaving = False
        peers.speak(LINK, self._links.accept)
        peers.speak(SYNC, lambda _: SyncServer(self._take))

    # Start and end

    async def start(self) -> None:
        """Listen, join, announce.

        Raises:
            PortTaken: the port for nodes is in use.
            BadSeed: a seed in the settings can't be read.
            OSError: the address can't be listened on, or the state folder can't be read.
        """
        settings = self._settings
        seeds = read_seeds(settings.seeds, settings.port)
        kept = await asyncio.to_thread(self._kept.read)
        remembered = await self._remembered.read()
        await self._listen()
        self._links.port, self._links.boot = self._port, self._boot
        loop = asyncio.get_running_loop()
        fixed = () if settings.host in _ANY else (settings.host,)
        self._draft = replace(self._draft, peer_port=self._port, addresses=fixed or self._draft.addresses)
        self._gossip = Gossip(
            self._draft,
            boot=self._boot,
            addresses=tuple((ip, self._port) for ip in self._draft.addresses),
            kept=kept,
            now=time.monotonic(),
            random=random.Random(),
        )
        self._tick()
        if settings.mdns:
            self._discovery = Discovery(
                node=self._identity.node,
                boot=self._boot,
                clusters=self._identity.tokens.clusters,
                port=self._port,
                found=self._announced,
                ipv6=":" in self._host,
                named=settings.interfaces,
            )
        if not fixed:
            self._interfaces = InterfaceWatch(settings.interfaces, self._use)
            await self._interfaces.start()
        elif self._discovery is not None:
            one = Interface("", 0, (), fixed) if ":" in settings.host else Interface("", 0, fixed)
            self._discovery.use((one,))
        now = time.monotonic()
        for peer in remembered:
            if peer.node != self._identity.node and peer.addresses:
                self._do(self._gossip.introduce(peer.addresses, now, keep=True, source=peer.node))
        self._own(loop.create_task(self._rounds(seeds)))
        if self._identity.tokens.open:
            log.info("open cluster: whoever is on this network can join; cluster.token closes it")

    async def close(self) -> None:
        """Say goodbye, then stop. Without it (kill -9) the others notice all the same."""
        if self._leaving:
            return
        self._leaving = True
        if self._gossip is not None:
            self._do(self._gossip.leave(time.monotonic()))
            await self._links.close()
            closing = [asyncio.sleep(_GOODBYE_SECONDS)]
            if self._discovery is not None:
                closing.append(self._discovery.close())
            if self._interfaces is not None:
                closing.append(self._interfaces.close())
            await asyncio.gather(*closing)
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._gossip is not None:
            await self._remembered.close()
        await self._keeper.close()
        await self.calls.close()
        await self._peers.close()
        self._datagrams.close()

    async def _listen(self) -> None:
        """TCP and UDP on the same port; on IPv4 alone where there is no IPv6."""
        if self._host == "::":
            try:
                await self._listen_on("::")
                return
            except OSError as error:
                if error.errno not in _NO_IPV6:
                    raise
                log.info("no IPv6 here (%s): other nodes reach this one over IPv4", error.strerror)
                self._host = "0.0.0.0"
        await self._listen_on(self._host)

    async def _listen_on(self, host: str) -> None:
        port = self._settings.port
        for attempt in range(_TRIES):
            self._port = await self._peers.start(host, port)
            try:
                self._datagrams.start(host, self._port)
                return
            except PortTaken:
                await self._peers.close()
                if port or attempt == _TRIES - 1:
                    raise

    # What the other rooms see

    @property
    def me(self) -> Record:
        """This node's own record, with its version and claim."""
        return self._gossip.me if self._gossip is not None else self._draft

    @property
    def boot(self) -> int:
        """This process' number: another one after every start."""
        return self._boot

    @property
    def port(self) -> int:
        """The port for nodes; 0 before the start."""
        return self._port

    def live(self) -> tuple[Record, ...]:
        """Records of all nodes held alive, this one included, by node id."""
        if self._gossip is None:
            return (self._draft,)
        if self._live is None:
            self._live = self._gossip.live()
        return self._live

    def record(self, node: str) -> Record | None:
        """The last record of ``node``, alive or not; None when never seen."""
        if self._gossip is None:
            return self._draft if node == self._draft.node else None
        return self._gossip.record(node)

    def leader(self) -> Term:
        """The term that holds; ``leader`` is empty while there is none."""
        return self._gossip.leader() if self._gossip is not None else Term()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the answer ends that."""
        key = object()
        self._callbacks[key] = callback
        return lambda: self._callbacks.pop(key, None) and None

    def update_me(self, **changes: Any) -> None:
        """Replace fields of the own record, raise its version and spread it. Equal values do nothing."""
        before = self.me
        after = replace(before, **changes)
        if after == before:
            return
        if self._gossip is None:
            self._draft = after
            return
        self._do(self._gossip.update_record(after, time.monotonic()))
        self._changed()

    def observe_term(self, term: Term) -> None:
        """A term was seen outside of records (an owner refused a command as old)."""
        if self._gossip is not None:
            self._do(self._gossip.observe_term(term, time.monotonic()))

    def status(self) -> ClusterStatus:
        """How this part does."""
        gossip = self._gossip
        return ClusterStatus(
            self._discovery.status() if self._discovery is not None else None,
            self._links.up(),
            gossip.health if gossip is not None else 0,
            gossip.rejected if gossip is not None else 0,
            {str(reason): count for reason, count in self._sealer.refused.items()},
            self._datagrams.unsent,
            tuple(sorted(one.name for one in self.live() if one.node in self._unheard)),
            self._cloned,
        )

    # The core's clock and actions

    def _heard(self, opened: Opened, source: Address) -> None:
        if self._gossip is not None:
            self._do(self._gossip.handle_packet(opened.data, source, time.monotonic()))

    def _tick(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        if self._gossip is not None:
            self._do(self._gossip.tick(time.monotonic()))

    def _do(self, actions: list[Action]) -> None:
        """Carry out actions in order."""
        for action in actions:
            self._carry_out(action)
        assert self._gossip is not None
        wake = self._gossip.next_wake()
        if wake < self._timer_at - 0.001:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = wake
            delay = max(0.0, wake - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Send):
            self._datagrams.send(action.address, action.data)
        elif isinstance(action, Event):
            self._tell(action)
        elif isinstance(action, Persist):
            self._keeper.write(action.kept)
        elif isinstance(action, PushPullWith):
            self._own(asyncio.get_running_loop().create_task(self._push_pull(action)))
        elif self._exchanging < _EXCHANGES:
            self._own(asyncio.get_running_loop().create_task(self._tcp_ping(action)))

    def _persisted(self, kept: Kept) -> None:
        if self._gossip is not None and not self._leaving:
            self._do(self._gossip.persisted(kept, time.monotonic()))

    def _take(self, body: bytes, source: Address | None) -> bytes:
        if self._gossip is None:
            return b""
        answer, actions = self._gossip.push_pull(body, source, time.monotonic())
        self._do(actions)
        return answer

    async def _push_pull(self, asked: PushPullWith) -> None:
        assert self._gossip is not None
        done = ""
        stranger = not asked.node
        if self._exchanging < _EXCHANGES and not (stranger and self._strangers >= _STRANGERS):
            self._exchanging += 1
            self._strangers += stranger
            try:
                first = self._gossip.push_pull_open()
                done = await sync(self.reach, asked.node, asked.addresses, first, self._take)
            except (PeerError, TimeoutError, OSError) as error:
                log.debug("no exchange with %s at %s: %s", asked.node or "somebody", asked.addresses, error)
            finally:
                self._exchanging -= 1
                self._strangers -= stranger
        self._do(self._gossip.push_pull_done(asked.node or done, bool(done), time.monotonic()))

    async def _tcp_ping(self, asked: TcpPing) -> None:
        assert self._gossip is not None
        self._exchanging += 1
        try:
            await knock(self.reach, asked.node, asked.addresses, asked.timeout)
        except (PeerError, OSError):
            return
        finally:
            self._exchanging -= 1
        self._do(self._gossip.tcp_pong(asked.sequence, time.monotonic()))

    # What changed

    def _tell(self, event: Event) -> None:
        change, node = event.change, event.node
        name = self._name(node)
        if change is Change.JOINED:
            log.info("node %s joined", name)
        elif change is Change.DIED:
            log.warning("node %s is gone", name)
        elif change is Change.LEFT:
            log.info("node %s left", name)
        elif change is Change.RESTARTED:
            log.info("node %s was restarted", name)
        elif change is Change.LEADER and event.term.leader:
            me = " (this node)" if event.term.leader == self._identity.node else ""
            log.info("leader: %s%s, term %d", self._name(event.term.leader), me, event.term.counter)
        elif change is Change.LEADER:
            log.info("no leader")
        elif change is Change.CLONED:
            self._cloned = True
            log.error(
                "another machine uses the node id %s: its state folder is a copy of ours; "
                "delete the file node-id in one of them and restart that daemon", node,
            )  # fmt: skip
        else:
            log.debug("node %s: %s", name, change)
        if change in (Change.JOINED, Change.MOVED):
            self._remembered.write_soon()
        if change in (Change.DIED, Change.LEFT, Change.RESTARTED):
            back = change is Change.RESTARTED and self._gossip is not None
            self._links.drop(node, now=self._gossip.boot(node) if back and self._gossip else 0)
            self._peers.drop(node)
            self.calls.drop(node)
        self._changed()

    def _name(self, node: str) -> str:
        record = self.record(node)
        return f"{record.name} ({node})" if record is not None and record.name != node else node

    def _changed(self) -> None:
        self._live = None
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell_all)

    def _tell_all(self) -> None:
        self._telling = False
        if self._gossip is not None and not self._leaving:
            alive = [node for node, _ in self._gossip.contacts()]
            self._links.want(neighbours(self._identity.node, alive))
            if self._measures.keep(alive):
                self.update_me(links=self._measures.told())
        for callback in tuple(self._callbacks.values()):
            try:
                callback()
            except Exception:
                log.exception("a part failed to take note of a change in the cluster")

    # Links

    def _linked(self, node: str, address: Address) -> None:
        if self._gossip is not None:
            self.reach.worked(node, address)
            self._do(self._gossip.link_made(node, address, time.monotonic()))

    def _unlinked(self, node: str, silent: bool) -> None:
        if self._gossip is not None:
            self._do(self._gossip.link_lost(node, time.monotonic(), silent=silent))

    def _measured(self, node: str, trip: float, rate: float) -> None:
        if self._measures.note(node, trip, rate):
            self.update_me(links=self._measures.told())

    # Addresses and introductions

    def _addresses_of(self, node: str) -> tuple[Address, ...]:
        if node == self._identity.node:
            host = self._settings.host
            return (("127.0.0.1" if host in _ANY else host, self._port),)
        return self._gossip.addresses(node) if self._gossip is not None else ()

    def _use(self, found: tuple[Interface, ...]) -> None:
        """The interfaces are these now."""
        if self._gossip is None or self._leaving:
            return
        self._networks = tuple(network for one in found for network in one.networks)
        addresses = tellable(found, ipv6=self._host == "::")
        if addresses != self.me.addresses:
            log.info("addresses: %s", ", ".join(addresses) or "none")
            self._do(
                self._gossip.set_addresses(tuple((ip, self._port) for ip in addresses), time.monotonic())
            )
            self.update_me(addresses=addresses)
        if self._discovery is not None:
            self._discovery.use(found)

    def _announced(self, node: str, addresses: tuple[Address, ...]) -> None:
        if self._gossip is None or self._leaving:
            return
        if node == self._identity.node or not self._gossip.alive(node):
            self._do(self._gossip.introduce(addresses, time.monotonic()))

    async def _rounds(self, seeds: tuple[Seed, ...]) -> None:
        """Seeds and announcements once more every half minute, for ever."""
        assert self._gossip is not None
        while True:
            for seed in seeds:
                addresses = await resolve(seed)
                if addresses:
                    source = f"{seed.host}:{seed.port}"
                    self._do(self._gossip.introduce(addresses, time.monotonic(), keep=True, source=source))
            if self._discovery is not None:
                for node, addresses in self._discovery.seen().items():
                    self._announced(node, addresses)
                self._listen_for(self._discovery)
            await asyncio.sleep(_ROUND_SECONDS * random.uniform(0.9, 1.1))

    def _listen_for(self, discovery: Discovery) -> None:
        """Whom mDNS did not show in two rounds, though it lives on a network of ours."""
        assert self._gossip is not None
        silent: frozenset[str] = frozenset()
        if discovery.status().working:
            here = {
                node
                for node, addresses in self._gossip.contacts()
                if addresses and within(addresses[0][0], self._networks)
            }
            silent = frozenset(here - discovery.seen().keys())
        self._unheard, self._silent = silent & self._silent, silent

    def _contacts(self) -> tuple[Peer, ...]:
        contacts = self._gossip.contacts() if self._gossip is not None else ()
        return tuple(Peer(node, addresses) for node, addresses in contacts)

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the cluster failed", exc_info=error)
