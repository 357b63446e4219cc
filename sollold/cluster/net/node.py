"""This node in the cluster: connects gossip, links, calls and admission, and offers a view of the cluster."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sollold.cluster.admission.admission import Admission
from sollold.cluster.admission.keyring import Keyring
from sollold.cluster.admission.node_admission import NodeAdmission
from sollold.cluster.admission.orders import door_seconds
from sollold.cluster.gossip.actions import Address, Change, NodeEvent
from sollold.cluster.gossip.double import boot_number
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.record_check import objection, oversize
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.change_log import log_change
from sollold.cluster.net.connections import NodeConnections
from sollold.cluster.net.datagrams import Datagrams
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.gossip_runner import GossipRunner
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.link_stats import LinkStats
from sollold.cluster.net.listening import listen
from sollold.cluster.net.packet_seal import OpenedPacket, Sealer
from sollold.cluster.net.peer_finder import PeerFinder
from sollold.cluster.net.push_pull_stream import SYNC, SyncServer
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import LINK, RpcServer
from sollold.cluster.net.seeds import read_seeds
from sollold.cluster.net.standing_link import StandingLinks, neighbours
from sollold.cluster.net.status import ClusterStatus
from sollold.cluster.net.view import name_of
from sollold.settings.schema import ClusterSettings
from sollold.subscribers import Subscribers

log = logging.getLogger("sollold.cluster")

_GOODBYE_SECONDS = 0.5
_ANY_HOST = ("0.0.0.0", "::", "")


class ClusterNode:
    """This node in the cluster; a `sollold.cluster.net.view.View`.

    The constructor is long because it creates all parts.

    Args:
        settings: the cluster's settings.
        identity: this node's identity.
        record: this node's initial record; addresses and port are filled in at the start.
        peers: the server side; everything is registered with it before `start`.
        ring: the secret of a cluster that was founded here or admitted this node; None if the settings have a
            token.
        state: folder of the persistent state.

    Attributes:
        reach: opens connections to nodes.
        calls: calls to other nodes.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        identity: Identity,
        record: Record,
        peers: RpcServer,
        state: Path,
        ring: Keyring | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._peers = peers
        self._first_record = record
        self._boot = boot_number(time.time(), secrets.randbits(62))
        self.reach = Dialer(identity, self._addresses_of, partial(name_of, self))
        self.calls = RpcClient(self.reach, peers)
        peers.name = self.reach.name
        self._sealer = Sealer(identity.tokens.accepted, node=identity.node, boot=self._boot)
        self._datagrams = Datagrams(self._sealer, self._heard)
        self._runner = GossipRunner(self.reach, state, send=self._datagrams.send, changed=self._note_change)
        self._links = StandingLinks(
            self.reach,
            made=self._linked,
            lost=self._unlinked,
            measured=self._measured,
            barred=lambda node, boot: self._gossip is not None and self._gossip.known.barred(node, boot),
        )
        self._connections = NodeConnections(self.reach, self.calls, peers, self._links)
        self._finder = PeerFinder(
            settings,
            identity,
            self._runner,
            state,
            addresses=lambda: self.me.addresses,
            use_addresses=self._use_addresses,
            lost=self._connections.drop_own_hosts,
        )
        self._measures = LinkStats()
        self._objection = ""
        self._cloned = False
        self._port = 0
        self._subscribers = Subscribers("the cluster")
        self._notify_due = False
        self._live: tuple[Record, ...] | None = None
        self._restarted: set[str] = set()
        """Nodes that `live` leaves out for one notification: what their former process ran has ended."""
        self._leaving = False
        self._admission: NodeAdmission | None = None
        if ring is not None:
            self._admission = NodeAdmission(
                self,
                identity,
                ring,
                state,
                door_seconds(settings.door),
                connections=self._connections,
                finder=self._finder,
                runner=self._runner,
                sealer=self._sealer,
            )
            self._admission.register(peers)
        peers.speak(LINK, self._links.accept)
        peers.speak(SYNC, lambda _: SyncServer(self._runner.answer_push_pull))

    @property
    def _gossip(self) -> Gossip | None:
        """The gossip core; None before the start."""
        return self._runner.gossip

    # Start and end

    async def start(self) -> None:
        """Listen, join, announce.

        Raises:
            PortTaken: the port for nodes is in use.
            BadSeed: a seed in the settings can't be read.
            OSError: listening failed, or the state folder can't be read.
        """
        settings = self._settings
        seeds = read_seeds(settings.seeds, settings.port)
        kept = await self._runner.read_kept()
        await self._finder.read_earlier()
        host, self._port = await listen(self._peers, self._datagrams, settings.host, settings.port)
        self._links.port, self._links.boot = self._port, self._boot
        fixed = "" if settings.host in _ANY_HOST else settings.host
        addresses = (fixed,) if fixed else self._first_record.addresses
        self._first_record = replace(self._first_record, peer_port=self._port, addresses=addresses)
        gossip = Gossip(
            self._first_record,
            boot=self._boot,
            addresses=self._with_port(addresses),
            kept=kept,
            now=time.monotonic(),
            random=random.Random(),
            signer=self._identity.key,
        )
        self._runner.start(gossip)
        await self._finder.start(
            seeds,
            boot=self._boot,
            port=self._port,
            host=host,
            fixed=fixed,
            https=self._first_record.tls,
        )
        if self._admission is not None:
            self._admission.start()
        if self._identity.tokens.open:
            log.info("open cluster: any machine on this network can join; cluster.token closes it")

    async def close(self) -> None:
        """Announce that this node leaves, then stop. Others also notice if it is killed instead."""
        if self._leaving:
            return
        self._leaving = True
        self._finder.stop()
        self._runner.leave()
        if self._gossip is not None:
            await self._links.close()
            await asyncio.gather(asyncio.sleep(_GOODBYE_SECONDS), self._finder.close())
        await self._runner.close_tasks()
        if self._gossip is not None:
            await self._finder.close_file()
        await self._runner.close_file()
        if self._admission is not None:
            await self._admission.admission.close()
        await self.calls.close()
        await self._peers.close()
        self._datagrams.close()

    # Public view

    @property
    def me(self) -> Record:
        """This node's own record, with its version and claim."""
        gossip = self._gossip
        return gossip.known.me if gossip is not None else self._first_record

    @property
    def port(self) -> int:
        """The port for nodes; 0 before the start."""
        return self._port

    def live(self) -> tuple[Record, ...]:
        """Return the records of all nodes considered alive, including this one, by node id."""
        if self._gossip is None:
            return (self._first_record,)
        if self._live is None:
            live = self._gossip.known.live()
            self._live = tuple(record for record in live if record.node not in self._restarted)
        return self._live

    def record(self, node: str) -> Record | None:
        """Return the last record of ``node``, alive or not; None if never seen."""
        if self._gossip is None:
            return self._first_record if node == self._first_record.node else None
        return self._gossip.known.record(node)

    def left(self, node: str) -> bool:
        """Whether ``node`` left and has not come back since."""
        return self._gossip is not None and self._gossip.known.left(node)

    @property
    def tokens(self) -> Tokens:
        """The cluster's tokens."""
        return self._identity.tokens

    def leader(self) -> Term:
        """Return the current term; ``leader`` is empty while there is none."""
        return self._gossip.known.leader() if self._gossip is not None else Term()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the returned function unsubscribes it."""
        return self._subscribers.add(callback)

    def update_me(self, **changes: Any) -> None:
        """Replace fields of this node's record, raise its version and spread it. Equal values do nothing."""
        before = self.me
        after = replace(before, **changes)
        if after == before:
            return
        if self._gossip is None:
            self._first_record = after
            return
        if why := objection(after, self._gossip.known.leader()) or oversize(after):
            if why != self._objection:
                log.error("the other nodes will reject this node's record: %s", why)
            self._objection = why
        self._runner.do(self._gossip.update_record(after, time.monotonic()))
        self._changed()

    def status(self) -> ClusterStatus:
        """Return the status of this node's part in the cluster."""
        status = ClusterStatus(
            self._finder.status(),
            self._links.up(),
            0,
            {str(reason): count for reason, count in self._sealer.refused.items()},
            tuple(sorted(record.name for record in self.live() if record.node in self._finder.unheard)),
            self._cloned,
        )
        if self._gossip is None:
            return status
        known, now = self._gossip.known, time.monotonic()
        return replace(
            status,
            rejected=known.rejected,
            disbelieved=known.refused,
            doubles=known.doubles(now),
            unread=known.unread(),
            formats=known.other_formats(now),
            unanswered=tuple(self.reach.name(node) for node in known.unanswered()),
        )

    def dropped(self) -> dict[str, int]:
        """Return counts of dropped messages of other nodes, by reason."""
        status = self.status()
        return {**status.refused, "unreadable": status.rejected, **status.disbelieved}

    # Changes

    def _note_change(self, event: NodeEvent) -> None:
        change, node = event.change, event.node
        doubles = self.status().doubles if change in (Change.CLONED, Change.DOUBLED) else ()
        double = next((entry for entry in doubles if entry.node == node), None)
        log_change(event, self._identity.node, self._name, double)
        if change is Change.CLONED:
            self._cloned = True
        if change in (Change.JOINED, Change.MOVED):
            self._finder.remember()
        if change is Change.MOVED and self._gossip is not None:
            self._connections.drop_hosts_of(self._name(node), self._gossip.known.lost_hosts(node))
        if change is Change.RESTARTED:
            self._restarted.add(node)
        if change in (Change.DIED, Change.LEFT, Change.RESTARTED):
            restarted = change is Change.RESTARTED and self._gossip is not None
            self._connections.drop_node(
                node, boot=self._gossip.known.boot(node) if restarted and self._gossip else 0
            )
        self._changed()

    def _name(self, node: str) -> str:
        record = self.record(node)
        return f"{record.name} ({node})" if record is not None and record.name != node else node

    def _changed(self) -> None:
        self._live = None
        if not self._notify_due:
            self._notify_due = True
            asyncio.get_running_loop().call_soon(self._notify_subscribers)

    def _notify_subscribers(self) -> None:
        self._notify_due = False
        if self._admission is not None and not self._leaving:
            self._admission.note_members()
        if self._gossip is not None and not self._leaving:
            alive = self._gossip.known.others()
            self._links.want(neighbours(self._identity.node, alive))
            if self._measures.keep(alive):
                self.update_me(links=self._measures.told())
        self._subscribers.notify()
        if self._restarted:
            self._restarted.clear()
            self._changed()

    # Received data

    def _heard(self, opened: OpenedPacket, source: Address) -> None:
        if self._admission is not None:
            self._admission.note_token(opened.token)
        self._runner.handle_packet(opened.data, source)

    def _linked(self, node: str, address: Address) -> None:
        if self._gossip is not None:
            self.reach.worked(node, address)
            self._runner.do(self._gossip.link_made(node, address, time.monotonic()))

    def _unlinked(self, node: str, silent: bool) -> None:
        if self._gossip is not None:
            self._runner.do(self._gossip.link_lost(node, time.monotonic(), silent=silent))

    def _measured(self, node: str, trip: float, rate: float) -> None:
        if self._measures.note(node, trip, rate, time.monotonic()):
            self.update_me(links=self._measures.told())

    # Addresses

    def _addresses_of(self, node: str) -> tuple[Address, ...]:
        if node == self._identity.node:
            host = self._settings.host
            return (("127.0.0.1" if host in _ANY_HOST else host, self._port),)
        return self._gossip.known.addresses(node) if self._gossip is not None else ()

    def _use_addresses(self, addresses: tuple[str, ...]) -> None:
        """Use and announce this node's changed addresses."""
        if self._gossip is not None:
            self._runner.do(self._gossip.set_addresses(self._with_port(addresses), time.monotonic()))
            self.update_me(addresses=addresses)

    def _with_port(self, addresses: Sequence[str]) -> tuple[Address, ...]:
        return tuple((ip, self._port) for ip in addresses)

    # Membership of the cluster

    @property
    def admission(self) -> Admission | None:
        """Manages the cluster's secret; None if the settings have a token."""
        return self._admission.admission if self._admission is not None else None

    def keyring(self) -> Keyring | None:
        """Return the cluster's secret and members; None if the settings have a token."""
        return self.admission.ring if self.admission is not None else None

    def evicted(self, node: str) -> bool:
        """Whether an admin evicted ``node``."""
        return node in self._identity.refused

    def set_aside(self, nodes: frozenset[str]) -> None:
        """Treat these nodes as dead, like evicted ones, until the next call, so that another node leads."""
        if self._gossip is not None:
            self._runner.do(self._gossip.evict(frozenset(self._identity.refused) | nodes, time.monotonic()))
