"""A gossip core, and functions that feed it packets and read its actions."""

from __future__ import annotations

from random import Random
from typing import TypeVar

from sollold.cluster.gossip.actions import Action, Address, Change, NodeEvent, Persist, PersistedState, Send
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Ack, Alive, Dead, Message, Ping, compound, decode, encode, head
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.registry import Registry
from tests.keys import Unsigned

T = TypeVar("T")
ME, B, C, D, E = (f"{number:016x}" for number in range(10, 15))
BOOT = 77


def address_of(node: str) -> Address:
    return (f"10.0.0.{int(node, 16)}", 11436)


def record(node: str) -> Record:
    return Record(node, node, 0, (address_of(node)[0],), 11435, 11436, "0.1.0")


def core(node: str = ME, *, boot: int = BOOT, kept: PersistedState | None = None, now: float = 0.0) -> Gossip:
    return Gossip(
        record(node),
        boot=boot,
        addresses=(address_of(node),),
        kept=kept or PersistedState(),
        now=now,
        random=Random(1),
        signer=Unsigned(),
    )


def registry(mine: Record, boot: int = 1) -> Registry:
    return Registry(mine, boot, 0, signer=Unsigned(), key_of=lambda node: b"")


def alive(node: str, incarnation: int = 1, *, boot: int = 1, where: Address | None = None) -> Alive:
    return Alive(node, boot, incarnation, (where or address_of(node),))


def receive(gossip: Gossip, sender: str, *messages: Message, now: float = 1.0, boot: int = 1) -> list[Action]:
    packet = compound(head(sender, boot), [encode(message) for message in messages])
    return gossip.handle_packet(packet, address_of(sender), now)


def with_members(gossip: Gossip, *nodes: str, now: float = 0.5) -> Gossip:
    run(gossip, 0.0, now)
    for node in nodes:
        receive(gossip, node, alive(node), now=now)
    return gossip


def mark_dead(gossip: Gossip, node: str, now: float = 1.0) -> None:
    """Make ``gossip`` consider ``node`` dead: it suspects it, and E reports it dead."""
    gossip._membership.suspect(node, now)
    receive(gossip, E, Dead(node, gossip._membership.members[node].incarnation, E), now=now)
    assert not gossip.known.alive(node)


def only(kind: type[T], actions: list[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: list[Action], to: Address | None = None) -> list[Message]:
    return [
        message
        for send in only(Send, actions)
        if to is None or send.address == to
        for message in decode(send.data).messages
    ]


def changes(actions: list[Action]) -> list[tuple[Change, str]]:
    return [
        (event.change, event.node) for event in only(NodeEvent, actions) if event.change is not Change.UPDATED
    ]


def run(gossip: Gossip, since: float, until: float, *, silent: tuple[str, ...] = ()) -> list[Action]:
    """Tick until ``until``. Every node except the ``silent`` ones answers pings."""
    done: list[Action] = []
    now = since
    while True:
        now = max(now, gossip.next_wake())
        if now > until:
            return done
        actions = gossip.tick(now)
        for persist in only(Persist, actions):
            actions += gossip.persisted(persist.kept, now)
        done += actions
        for send in only(Send, actions):
            for message in decode(send.data).messages:
                if isinstance(message, Ping) and message.node and message.node not in silent:
                    done += receive(gossip, message.node, Ack(message.sequence, 0), now=now)


def exchange(first: Gossip, other: Gossip, now: float) -> list[Action]:
    """Run a push-pull that ``first`` opens; return the actions of both."""
    done: list[Action] = []
    body, sides = first.push_pull_open(), (other, first)
    while body:
        source = address_of(sides[1].known.me.node)
        body, actions = sides[0].push_pull(body, source, now)
        done += actions
        sides = (sides[1], sides[0])
    return done
