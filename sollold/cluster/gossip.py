"""Membership, records and election as one state machine: bytes and a clock in, actions out.

The shell owns the socket, the clock (monotonic seconds) and the disk. It calls `handle_packet` for every
datagram opened by `sollold.cluster.seal`, `tick` at `next_wake`, and carries out the actions in order.
"""

from __future__ import annotations

from random import Random

from sollold.cluster.actions import Action, Address, Kept
from sollold.cluster.record import Record
from sollold.cluster.term import Term
from sollold.cluster.tuning import LAN, Tuning


class Gossip:
    """One node's part in the cluster.

    Args:
        record: what this node says of itself at first; ``version`` and ``claim`` are set here.
        boot: random positive integer below 2**63, new with every start of the process.
        addresses: where peers can reach this node, the best first; may be empty at first.
        kept: what the last run wrote with `Persist`; the default when there is nothing.
        now: monotonic seconds, as everywhere here.
        random: for the order of probes and the choice of peers.
    """

    def __init__(
        self,
        record: Record,
        *,
        boot: int,
        addresses: tuple[Address, ...],
        kept: Kept,
        now: float,
        random: Random,
        tuning: Tuning = LAN,
    ) -> None:
        raise NotImplementedError

    # What comes in

    def handle_packet(self, data: bytes, source: Address, now: float) -> list[Action]:
        """A datagram, already opened. What is not a packet is counted in ``rejected`` and dropped."""
        raise NotImplementedError

    def tick(self, now: float) -> list[Action]:
        """Do what is due. Called at `next_wake` or whenever convenient."""
        raise NotImplementedError

    def next_wake(self) -> float:
        """When `tick` has something to do next; may move closer after any other call."""
        raise NotImplementedError

    def introduce(self, addresses: tuple[Address, ...], now: float, *, keep: bool = False) -> list[Action]:
        """Somebody may be at one of ``addresses`` (one machine's): from mDNS, seeds or memory.

        ``keep``: try again for ever (with growing pauses) while no live node is known there.
        """
        raise NotImplementedError

    def tcp_pong(self, sequence: int, now: float) -> list[Action]:
        """The node of a `TcpPing` answered."""
        raise NotImplementedError

    def link_made(self, node: str, address: Address, now: float) -> list[Action]:
        """The standing link to ``node`` is up; ``address`` is its IP and *gossip* port."""
        raise NotImplementedError

    def link_lost(self, node: str, now: float) -> list[Action]:
        """The standing link broke without goodbye: find out within a second whether ``node`` is dead."""
        raise NotImplementedError

    # Push-pull over TCP

    def push_pull_open(self) -> bytes:
        """The first body of an exchange, for who begins it."""
        raise NotImplementedError

    def push_pull(self, data: bytes, source: Address | None, now: float) -> tuple[bytes, list[Action]]:
        """A body from the other side → what to send back (empty: nothing more), and actions.

        ``source``: the peer's IP and gossip port, when known. A body that is no push-pull is counted and
        ends the exchange.
        """
        raise NotImplementedError

    def push_pull_done(self, node: str, ok: bool, now: float) -> list[Action]:
        """A `PushPullWith` for ``node`` ended."""
        raise NotImplementedError

    # What this node does

    def update_record(self, record: Record, now: float) -> list[Action]:
        """Say something new of this node. ``version`` and ``claim`` of ``record`` are ignored."""
        raise NotImplementedError

    def set_addresses(self, addresses: tuple[Address, ...], now: float) -> list[Action]:
        """This node's own addresses changed."""
        raise NotImplementedError

    def observe_term(self, term: Term, now: float) -> list[Action]:
        """A term was seen outside of records (an owner refused ours as old): never claim below it."""
        raise NotImplementedError

    def leave(self, now: float) -> list[Action]:
        """Say goodbye. Tick on for half a second, so that it spreads, then stop."""
        raise NotImplementedError

    # What is known

    @property
    def me(self) -> Record:
        """This node's record, with its version and claim."""
        raise NotImplementedError

    @property
    def rejected(self) -> int:
        """Packets and push-pull bodies that were not understood."""
        raise NotImplementedError

    @property
    def health(self) -> int:
        """0: this node keeps up; up to 8: its probes fail, its time-outs are stretched."""
        raise NotImplementedError

    def leader(self) -> Term:
        """The term that holds; ``leader`` is empty while there is none."""
        raise NotImplementedError

    def live(self) -> tuple[Record, ...]:
        """Records of the live nodes, this one included, by node id. Without those whose record is due."""
        raise NotImplementedError

    def record(self, node: str) -> Record | None:
        """The last record of ``node``, alive or not."""
        raise NotImplementedError

    def alive(self, node: str) -> bool:
        """Whether ``node`` is held alive (suspected ones are)."""
        raise NotImplementedError

    def addresses(self, node: str) -> tuple[Address, ...]:
        """Where to reach ``node``: the address it really reached us at first. Empty: unknown."""
        raise NotImplementedError

    def boot(self, node: str) -> int:
        """The boot id of ``node``; 0 when unknown."""
        raise NotImplementedError

    def contacts(self) -> tuple[tuple[str, tuple[Address, ...]], ...]:
        """Every other node held alive with its addresses: what to remember on disk."""
        raise NotImplementedError
