"""One of five members lies in its packets: no node and no leader is lost, and no counter exhausted."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import msgspec
import pytest

from sollold.cluster.gossip.member import Status
from sollold.cluster.gossip.packet import (
    FORMAT,
    Alive,
    Dead,
    Delta,
    Left,
    MemberState,
    Message,
    Ping,
    PushPull,
    Suspect,
    Whole,
    compound,
    encode,
    head,
)
from sollold.cluster.gossip.record import (
    Backend,
    Endpoint,
    Grant,
    GrantState,
    Placed,
    Record,
    State,
    WaitingMachine,
)
from sollold.cluster.gossip.record_check import objection
from sollold.cluster.gossip.signing import alive_content, left_content, record_content
from sollold.cluster.gossip.term import Term
from sollold.machine.device import Device, Kind
from sollold.machine.external_worker import ExternalState, ExternalWorker
from tests.keys import ToySigner
from tests.sim.world import Machine, Process, World

HUGE = 2**62 - 1


class Liar:
    """A member with the cluster's secret and its own key that sends arbitrary messages."""

    def __init__(self, world: World, machine: Machine) -> None:
        assert machine.process is not None
        self.world = world
        self.machine = machine
        self.process = machine.process
        self.signer = ToySigner(machine.node)

    def send(self, *messages: Message, to: Machine | None = None) -> None:
        """Send a packet to one machine, or to all."""
        data = compound(head(self.machine.node, self.process.boot), [encode(message) for message in messages])
        for machine in self.world.machines:
            if machine is not self.machine and machine.process is not None and to in (None, machine):
                machine.process.receive(data, self.machine.address)

    def alive(self, node: str, boot: int, incarnation: int) -> Alive:
        """Return an alive message signed with the liar's key."""
        where = (self.machine.address,)
        signature = self.signer.sign(alive_content(node, boot, incarnation, where))
        return Alive(node, boot, incarnation, where, self.signer.public, signature)

    def left(self, node: str, incarnation: int) -> Left:
        return Left(node, incarnation, self.signer.sign(left_content(node, incarnation)))

    def delta(self, record: Record, boot: int, version: int) -> Delta:
        """Return a delta of the whole record signed with the liar's key."""
        names = [name for name in record.__slots__ if name not in ("node", "version")]
        parts = {name: encode(getattr(record, name)) for name in names}
        signature = self.signer.sign(record_content(record.node, boot, version, parts))
        fields = zlib.compress(encode({name: getattr(record, name) for name in names}))
        return Delta(record.node, boot, 0, version, fields, signature)


def world_with_liar(seed: int) -> tuple[World, Liar]:
    """Return a world of five machines with a leader, of which the last is the liar."""
    world = World(seed, 5, signed=True)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    world.run_until(world.now + 5.0)
    return world, Liar(world, world.machines[-1])


def process(machine: Machine) -> Process:
    assert machine.process is not None
    return machine.process


def check_agreement(world: World) -> None:
    """Check that the nodes agree, have a leader, and still receive each other's updates."""
    assert world.run_while(lambda: bool(world.disagreement()), 60.0), world.disagreement()
    for running in world.running():
        world.mark(running)
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    for running in world.running():
        assert running.gossip.known.leader().counter < 2**20
        assert running.gossip._membership.own.incarnation < 2**20
        assert running.gossip.known.me.version < 2**40


def restart(world: World) -> None:
    """Stop all machines at once and start them again."""
    for machine in world.machines:
        machine.crash()
    world.run_until(world.now + 1.0)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()


def suspect(liar: Liar, victim: Machine) -> None:
    liar.send(Suspect(victim.node, HUGE, liar.machine.node))


def declare_dead(liar: Liar, victim: Machine) -> None:
    liar.send(Dead(victim.node, HUGE, liar.machine.node))


def suspect_in_steps(liar: Liar, victim: Machine) -> None:
    """Raise the incarnation step by step towards the others; the victim would refuse the total increase."""
    for step in range(1, 50):
        for other in liar.world.machines[1:-1]:
            liar.send(Suspect(victim.node, 1000 * step, liar.machine.node), to=other)
    liar.send(Suspect(victim.node, 50_000, liar.machine.node), to=victim)


def claim_and_leave(liar: Liar, victim: Machine) -> None:
    me = liar.process.gossip.known.me
    liar.send(liar.delta(replace(me, claim=Term(HUGE, me.node)), liar.process.boot, me.version + 1))
    liar.send(liar.left(me.node, liar.process.gossip._membership.own.incarnation))
    liar.machine.crash()


def claim_for_the_victim(liar: Liar, victim: Machine) -> None:
    me = liar.process.gossip.known.me
    liar.send(liar.delta(replace(me, claim=Term(1000, victim.node)), liar.process.boot, me.version + 1))


def rewrite_the_record(liar: Liar, victim: Machine) -> None:
    state = process(victim)
    lie = replace(state.gossip.known.me, models="lie")
    for boot in (state.boot, state.boot + 1):
        liar.send(liar.delta(lie, boot, HUGE))
        liar.send(liar.delta(lie, boot, state.gossip.known.me.version + 5))


def impersonate_victim(liar: Liar, victim: Machine) -> None:
    state = process(victim)
    incarnation = state.gossip._membership.own.incarnation
    for higher in (incarnation + 1, HUGE):
        for boot in (state.boot, state.boot + 1):
            liar.send(liar.alive(victim.node, boot, higher))
        liar.send(liar.left(victim.node, higher))


def push_false_states(liar: Liar, victim: Machine) -> None:
    """Send lies about states and records of others in a push-pull."""
    state = process(victim)
    lie = liar.delta(replace(state.gossip.known.me, models="lie"), state.boot, HUGE)
    held = [
        MemberState(victim.node, state.boot, HUGE, status, (liar.machine.address,), HUGE, state.boot + 1)
        for status in Status
    ]
    record = msgspec.Raw(encode(replace(state.gossip.known.me, models="lie")))
    whole = Whole(victim.node, lie.boot, lie.version, record)
    body = encode(PushPull(FORMAT, 0, liar.machine.node, liar.process.boot, held, [], [whole]))
    for machine in liar.world.machines[:-1]:
        receiver = process(machine)
        receiver.apply(receiver.gossip.push_pull(body, liar.machine.address, receiver.clock())[1])


def send_as_an_earlier_process(liar: Liar, victim: Machine) -> None:
    """Send datagrams in the name of processes of the victim, among them one that has ended."""
    former = process(victim).boot
    victim.crash()
    victim.start()
    victim.introduce_all()
    liar.world.run_until(liar.world.now + 10.0)
    for boot in (1, former, process(victim).boot + 1):
        data = compound(head(victim.node, boot), [encode(Ping(7, ""))])
        for machine in liar.world.machines[:-1]:
            process(machine).receive(data, liar.machine.address)


ATTACKS: list[Callable[[Liar, Machine], None]] = [
    suspect,
    declare_dead,
    suspect_in_steps,
    claim_and_leave,
    claim_for_the_victim,
    rewrite_the_record,
    impersonate_victim,
    push_false_states,
    send_as_an_earlier_process,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_the_others_agree_after_an_attack_and_after_a_restart(
    seed: int, attack: Callable[[Liar, Machine], None]
) -> None:
    world, liar = world_with_liar(seed)
    victim = world.machines[0]
    attack(liar, victim)
    check_agreement(world)
    assert process(victim).gossip.known.me.models != "lie"
    restart(world)
    check_agreement(world)


@pytest.mark.parametrize(
    "lie",
    [
        {"name": "pc\n12:00:00 cluster: node pc9 joined"},
        {"name": "\x1b[2Jpc"},
        {"name": "x" * 65},
        {"http_port": 70_000},
        {"addresses": ("example.org",)},
        {"devices": (Device("CPU", Kind.CPU, "cpu", -1, 0, 0, 0, 0),)},
        {"devices": (Device("CPU", Kind.CPU, "cpu", 2**51, 0, 0, 0, 0),)},
        {"devices": (Device("CPU", Kind.CPU, "cpu", 1, 1, 1, 0, 1, bandwidth=float("inf")),)},
        {"devices": tuple(Device(f"GPU{n}", Kind.GPU, "gpu", 1, 1, 1, 0, 1) for n in range(65))},
        {"links": (("b" * 16, float("nan"), 1.0),)},
    ],
    ids=repr,
)
def test_an_impossible_record_is_refused_and_counted(lie: dict[str, Any]) -> None:
    world, liar = world_with_liar(1)
    me = liar.process.gossip.known.me
    liar.send(liar.delta(replace(me, **lie), liar.process.boot, me.version + 1))
    for machine in world.machines[:-1]:
        gossip = process(machine).gossip
        assert gossip.known.record(me.node) == me
        assert gossip.known.refused["record"] == 1


def test_a_record_with_default_values_is_accepted() -> None:
    """Some fields have a negative default for unknown values. A new field must not make records invalid."""
    endpoint = Endpoint(
        "d", "m", "a" * 64, Backend.SHARDED, State.READY, placed=(Placed("b" * 16, "CPU", 0, 1, 1),)
    )
    full = Record(
        "a" * 16, "pc", 1, ("10.0.0.1",), 11435, 11436, "1", "b1",
        devices=(Device("CPU", Kind.CPU, "cpu", 1, 1, 1, 0, 1),),
        grants=(Grant("d", "CPU", 1, "a" * 16, GrantState.COMMITTED),),
        endpoints=(endpoint,), plain=(ExternalWorker("pc:50052", ExternalState.CHECKING),),
        waiting=(WaitingMachine("c" * 16, "pc2", "ABCD-EFGH"),),
    )  # fmt: skip
    assert objection(full, Term()) == ""
    worse = replace(endpoint, placed=(replace(endpoint.placed[0], resident=-2),))
    assert "resident is -2" in objection(replace(full, endpoints=(worse,)), Term())


def test_invented_nodes_take_bounded_time() -> None:
    """A body names 4,000 nodes with invalid signatures. Only the first few are checked."""
    world, liar = world_with_liar(1)
    checked = 0

    class Counting(ToySigner):
        def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
            nonlocal checked
            checked += 1
            return super().verify(node, public, signature, content)

    target = process(world.machines[0])
    target.gossip._membership._signer = Counting(world.machines[0].node)
    held = [
        MemberState(blake2b(number.to_bytes(2), digest_size=8).hexdigest(), 1, 1, 0, (("10.9.0.1", 1),), 0, 0)
        for number in range(4000)
    ]
    body = encode(PushPull(FORMAT, 0, liar.machine.node, liar.process.boot, held, [], []))
    target.apply(target.gossip.push_pull(body, liar.machine.address, target.clock())[1])
    assert checked <= 32
    assert len(target.gossip.known.live()) == 5


def test_invented_nodes_with_valid_keys_displace_no_live_node() -> None:
    world, liar = world_with_liar(1)
    target = process(world.machines[0])
    for start in range(0, 8192, 512):
        held = []
        for number in range(start, start + 512):
            signer = ToySigner(f"{number + 2**32:016x}")
            node, where = signer.public.hex(), (("10.9.0.1", 1),)
            signature = signer.sign(alive_content(node, 1, 1, where))
            held.append(MemberState(node, 1, 1, 0, where, 0, 0, signer.public, signature))
        body = encode(PushPull(FORMAT, 2, liar.machine.node, liar.process.boot, held, [], []))
        target.apply(target.gossip.push_pull(body, liar.machine.address, target.clock())[1])
    assert len(target.gossip._membership.members) <= 4096
    assert len(target.gossip.known.live()) == 5
