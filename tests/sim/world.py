"""A whole network in one process: virtual time, seeded chance, faults of every kind.

Machines have addresses and a disk. A machine's daemon is a `Process`: the very `Gossip` that runs in the
daemon, with its own clock, which may run fast or slow and may jump. Datagrams may be lost, delayed,
doubled, reordered and damaged; any direction between two machines may be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from random import Random
from typing import Any

from sollold.cluster.gossip.actions import (
    Action,
    Address,
    Change,
    NodeEvent,
    Persist,
    PersistedState,
    PushPullWith,
    Send,
    TcpPing,
)
from sollold.cluster.gossip.config import LAN, Tuning
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.record import Record
from sollold.cluster.net.packet_seal import Sealer
from sollold.cluster.net.standing_link import neighbours
from tests.keys import ToySigner, Unsigned

PORT = 11436
BRIDGE = "172.17.0.1"
"""Every machine has it: packets for it never leave the sender's machine."""
TOKEN = bytes(range(32))
_TCP_PATIENCE = 3.0
_BUFFERED = 200
"""Datagrams that the system keeps for a stopped process."""


@dataclass(slots=True)
class Weather:
    """What the network does to datagrams. Shares and seconds."""

    loss: float = 0.0
    delay: float = 0.001
    jitter: float = 0.0
    slow: float = 0.0
    """Share of datagrams that are late by up to a second: they overtake each other."""
    double: float = 0.0
    damage: float = 0.0


class Process:
    """One run of a daemon: its gossip core, and its clock."""

    def __init__(self, machine: Machine, boot: int, tuning: Tuning) -> None:
        world = machine.world
        self.machine = machine
        self.world = world
        self.boot = boot
        self.alive = True
        self.stopped = False
        self.fuse = -1
        """Actions left until the process dies in the middle of them; negative: it does not."""
        self.rate = 1.0
        self._base = world.random.random() * 1000 - world.now
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._wake = float("inf")
        self._writing = False
        self._unwritten: PersistedState | None = None
        self.sealer = Sealer((TOKEN,), node=machine.node, boot=boot) if world.sealed else None
        self.lateness = 0.0
        """Seconds by which this process is late with everything: a machine with too much to do."""
        record = Record(machine.node, machine.name, 0, (machine.address[0],), 11435, PORT, "0.1.0")
        self.gossip = Gossip(
            record,
            boot=boot,
            addresses=machine.advertised(),
            kept=machine.kept,
            now=self.clock(),
            random=Random(world.random.getrandbits(64)),
            tuning=tuning,
            signer=ToySigner(machine.node) if world.signed else Unsigned(),
        )
        self.on_change: Callable[[NodeEvent], None] = _ignore

    def clock(self) -> float:
        """This process's monotonic seconds."""
        return self._base + self.world.now * self.rate

    def jump(self, seconds: float) -> None:
        """Its clock goes on from further ahead (the machine slept, or a hypervisor did)."""
        self._base += seconds
        self.arm()

    def drift(self, rate: float) -> None:
        """Its clock runs fast or slow from now on."""
        self._base += self.world.now * (self.rate - rate)
        self.rate = rate
        self.arm()

    # Running

    def later(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """Call back after so long, if it still runs then; held back while it is stopped."""
        self.world.at(self.world.now + seconds, self.run, call, *args)

    def run(self, call: Callable[..., Any], *args: Any) -> None:
        if self.stopped:
            if len(self._held) < _BUFFERED:
                self._held.append((call, args))
        elif self.alive:
            call(*args)

    def arm(self) -> None:
        """See to it that the core is ticked when it wants to be."""
        if not self.alive:
            return
        wake = self.world.now + max(0.0, (self.gossip.next_wake() - self.clock()) / self.rate) + self.lateness
        if wake < self._wake - 1e-9:
            self._wake = wake
            self.world.at(wake, self._tick, wake)

    def _tick(self, wake: float) -> None:
        if wake != self._wake or not self.alive:
            return
        self._wake = float("inf")
        if not self.stopped:
            now = self.clock() + 1e-6
            if self.gossip.next_wake() <= now:
                self.apply(self.gossip.tick(now))
            self.arm()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT: what waited comes first."""
        self.stopped = False
        held, self._held = self._held, []
        for call, args in held:
            self.run(call, *args)
        self._wake = float("inf")
        self.arm()

    def apply(self, actions: list[Action]) -> None:
        world = self.world
        for action in actions:
            if self.fuse >= 0:
                self.fuse -= 1
                if self.fuse < 0:
                    self.machine.crash("in the middle of its actions")
                    return
            if type(action) is Send:
                world.datagram(self, action.address, action.data)
            elif type(action) is NodeEvent:
                world.changed(self, action)
                self.on_change(action)
            elif type(action) is Persist:
                self._keep(action.kept)
            elif type(action) is PushPullWith:
                world.push_pull(self, action)
            elif type(action) is TcpPing:
                world.tcp_ping(self, action)
        self.arm()

    def _keep(self, kept: PersistedState) -> None:
        """One write at a time, always the newest, as the daemon does."""
        self._unwritten = kept
        if not self._writing:
            self._write()

    def _write(self) -> None:
        kept, self._unwritten = self._unwritten, None
        self._writing = kept is not None
        if kept is not None:
            self.later(self.machine.disk_seconds, self._written, kept)

    def _written(self, kept: PersistedState) -> None:
        if not self.machine.full:
            self.machine.kept = kept
        self.apply(self.gossip.persisted(kept, self.clock()))
        self._write()

    def receive(self, data: bytes, source: Address) -> None:
        """A datagram came."""
        if self.sealer is not None:
            opened = self.sealer.open(data)
            if opened is None:
                return
            data = opened.data
        self.apply(self.gossip.handle_packet(data, source, self.clock()))


def _ignore(event: NodeEvent) -> None:
    pass


class Machine:
    """A computer: its node id, address and disk."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.node = f"{number:016x}"
        self.name = f"m{number}"
        self.address: Address = (f"10.0.{number >> 8}.{number & 255}", PORT)
        self.bridge = False
        self.kept = PersistedState()
        self.full = False
        """Its disk: nothing is written any more, and the daemon goes on."""
        self.disk_seconds = 0.0
        """How long its disk takes to write."""
        self.process: Process | None = None
        self.boots = 0

    def advertised(self) -> tuple[Address, ...]:
        """What the daemon believes are its addresses."""
        return ((BRIDGE, PORT), self.address) if self.bridge else (self.address,)

    def start(self, *, tuning: Tuning | None = None) -> Process:
        """Start the daemon."""
        assert self.process is None
        self.boots += 1
        world = self.world
        boot = world.random.getrandbits(62)
        self.process = Process(self, boot, tuning or world.tuning)
        world.say(f"{self.name} starts (version {self.process.gossip.known.me.version})")
        self.process.arm()
        world.started(self.process)
        return self.process

    def introduce_all(self) -> None:
        """mDNS and memory: everybody's address."""
        for other in self.world.machines:
            if other is not self and self.process is not None:
                process = self.process
                process.apply(process.gossip.introduce(other.advertised(), process.clock(), keep=True))

    def crash(self, how: str = "killed") -> None:
        """kill -9: the system ends its connections, so all that have one and can be reached see it break."""
        process = self.process
        if process is None:
            return
        self.world.say(f"{self.name} dies ({how})")
        process.alive = False
        self.process = None
        self.world.ended(process)
        if not self.world.links:
            return
        running = {other.node: other for other in self.world.machines if other.process is not None}
        for node in sorted(neighbours(self.node, running)):
            other = running[node]
            peer = other.process
            if peer is not None and not self.world.is_cut(self, other):
                peer.later(0.001, self._link_lost, peer, process)

    def break_link(self, other: Machine) -> None:
        """The connection with ``other`` is given up on both sides for silence; both daemons go on."""
        for here, there in ((self, other), (other, self)):
            process = here.process
            if process is not None:
                process.later(process.lateness, here._fell_silent, process, there.node)

    def _fell_silent(self, process: Process, node: str) -> None:
        process.apply(process.gossip.link_lost(node, process.clock(), silent=True))

    def _link_lost(self, peer: Process, dead: Process) -> None:
        gossip = peer.gossip
        if gossip.known.boot(self.node) == dead.boot:
            peer.apply(gossip.link_lost(self.node, peer.clock()))

    def leave(self) -> None:
        """Stop in good order."""
        process = self.process
        if process is None:
            return
        self.world.say(f"{self.name} leaves")
        process.apply(process.gossip.leave(process.clock()))
        self.world.at(self.world.now + 0.5, self._gone, process)

    def _gone(self, process: Process) -> None:
        if self.process is process:
            process.alive = False
            self.process = None
            self.world.ended(process)

    def renumber(self) -> None:
        """Another address (DHCP)."""
        number = self.world.fresh_number()
        self.address = (f"10.1.{number >> 8}.{number & 255}", PORT)
        self.world.index()
        self.world.say(f"{self.name} moves to {self.address[0]}")
        process = self.process
        if process is not None:
            process.apply(process.gossip.set_addresses(self.advertised(), process.clock()))


class World:
    """Machines, the network between them, and time.

    Args:
        trace: called with a line for each thing that happens; None: quiet.
        sealed: datagrams are sealed as in the daemon (slower).
        links: machines have standing connections, which break at once when a process dies.
        signed: nodes sign what they say of themselves, and believe nothing else.
    """

    def __init__(
        self,
        seed: int,
        machines: int,
        *,
        tuning: Tuning = LAN,
        trace: Callable[[str], None] | None = None,
        sealed: bool = False,
        links: bool = True,
        signed: bool = False,
    ) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.tuning = tuning
        self.trace = trace
        self.sealed = sealed
        self.links = links
        self.signed = signed
        self.weather = Weather()
        self.cut: set[tuple[int, int]] = set()
        """Directions (machine number, machine number) in which nothing passes."""
        self.big = 0.0
        """Share of changes of records that are big."""
        self.packets = 0
        self.bytes = 0
        self.tcp_bytes = 0
        self.watch: Callable[[Process, NodeEvent], None] | None = None
        self.started: Callable[[Process], None] = _nothing
        self.ended: Callable[[Process], None] = _nothing
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._numbers = machines
        self.machines = [Machine(self, number) for number in range(1, machines + 1)]
        self._at: dict[Address, Machine] = {}
        self.index()

    def index(self) -> None:
        self._at = {machine.address: machine for machine in self.machines}

    def fresh_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def say(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:9.3f}  {text}")

    def name(self, node: str) -> str:
        """For the trace."""
        return f"m{int(node, 16)}" if node else "nobody"

    # Time

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heappush(self._heap, (when, self._order, call, args))

    def run_until(self, when: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= when:
            self.now, _, call, args = heappop(heap)
            call(*args)
        self.now = when

    def run_while(self, busy: Callable[[], bool], limit: float, step: float = 0.25) -> bool:
        """Run until ``busy`` is no longer so; False when that takes more than ``limit`` seconds."""
        end = self.now + limit
        while busy():
            if self.now >= end:
                return False
            self.run_until(self.now + step)
        return True

    # Network

    def is_cut(self, source: Machine, target: Machine) -> bool:
        """Whether a connection from one to the other can't work: it needs both ways."""
        cut = self.cut
        return bool(cut) and ((source.number, target.number) in cut or (target.number, source.number) in cut)

    def find(self, sender: Machine, address: Address) -> Machine | None:
        if address[0] == BRIDGE:
            return sender
        return self._at.get(address)

    def datagram(self, sender: Process, address: Address, data: bytes) -> None:
        self.packets += 1
        if sender.sealer is not None:
            data = sender.sealer.seal(data)
        self.bytes += len(data)
        machine = sender.machine
        target = self.find(machine, address)
        if target is None or (self.cut and (machine.number, target.number) in self.cut):
            return
        weather, random = self.weather, self.random
        if weather.loss and random.random() < weather.loss:
            return
        if weather.damage and random.random() < weather.damage:
            data = _damage(data, random)
        delay = weather.delay + sender.lateness
        if weather.jitter:
            delay += random.expovariate(1 / weather.jitter)
        if weather.slow and random.random() < weather.slow:
            delay += random.random()
        self.at(self.now + delay, self._arrive, target, data, machine.address)
        if weather.double and random.random() < weather.double:
            self.at(self.now + delay + random.random(), self._arrive, target, data, machine.address)

    def _arrive(self, target: Machine, data: bytes, source: Address) -> None:
        process = target.process
        if process is None:
            return
        if process.lateness:
            self.at(self.now + process.lateness, process.run, process.receive, data, source)
        elif process.stopped:
            process.run(process.receive, data, source)
        else:
            process.receive(data, source)

    def hop(self) -> float:
        """Seconds of one way over TCP: what is lost is sent again."""
        weather, random = self.weather, self.random
        delay = weather.delay + weather.jitter * random.random()
        while weather.loss and random.random() < weather.loss:
            delay += 0.2
        return delay

    def call(
        self,
        sender: Process,
        address: Address,
        body: Any,
        answer: Callable[[Process, Any], Any],
        then: Callable[[Any, bool], None],
        patience: float = _TCP_PATIENCE,
    ) -> None:
        """A request over TCP: ``answer`` at the other side, then ``then(reply, ok)`` at this one.

        When it fails it may have been carried out, as in life.
        """
        settled = False

        def settle(reply: Any, ok: bool) -> None:
            nonlocal settled
            if not settled:
                settled = True
                then(reply, ok)

        def arrive() -> None:
            target = self.find(sender.machine, address)
            if target is None or target.process is None or self.is_cut(sender.machine, target):
                return
            process = target.process
            process.run(serve, process)

        def serve(process: Process) -> None:
            reply = answer(process, body)
            sender.later(self.hop() + process.lateness, back, process, reply)

        def back(process: Process, reply: Any) -> None:
            if not self.is_cut(sender.machine, process.machine):
                settle(reply, True)

        self.at(self.now + self.hop() + sender.lateness, arrive)
        sender.later(patience, settle, None, False)

    def push_pull(self, sender: Process, action: PushPullWith) -> None:
        def answer(process: Process, body: bytes) -> bytes:
            reply, actions = process.gossip.push_pull(body, sender.machine.address, process.clock())
            process.apply(actions)
            self.tcp_bytes += len(body) + len(reply)
            return reply

        def attempt(addresses: tuple[Address, ...], body: bytes) -> None:
            def then(reply: bytes | None, ok: bool) -> None:
                gossip = sender.gossip
                if not ok and len(addresses) > 1:
                    attempt(addresses[1:], body)
                    return
                if ok and reply:
                    more, actions = gossip.push_pull(reply, addresses[0], sender.clock())
                    sender.apply(actions)
                    if more and sender.alive:
                        attempt(addresses[:1], more)
                        return
                if sender.alive:
                    sender.apply(gossip.push_pull_done(action.node, ok, sender.clock()))

            self.call(sender, addresses[0], body, answer, then)

        if action.addresses:
            attempt(action.addresses, sender.gossip.push_pull_open())

    def tcp_ping(self, sender: Process, action: TcpPing) -> None:
        def then(reply: str | None, ok: bool) -> None:
            if ok and reply == action.node:
                sender.apply(sender.gossip.tcp_pong(action.sequence, sender.clock()))

        for address in action.addresses[:2]:
            self.call(sender, address, None, lambda process, _: process.machine.node, then, action.timeout)

    # What happens

    def changed(self, process: Process, event: NodeEvent) -> None:
        if self.watch is not None:
            self.watch(process, event)
        if self.trace is not None and event.change is not Change.UPDATED:
            name = process.machine.name
            if event.change is Change.LEADER:
                self.say(f"  {name}: term {event.term.counter} of {self.name(event.term.leader)} holds")
            else:
                self.say(f"  {name}: {self.name(event.node)} {event.change}")

    # What is so

    def running(self) -> list[Process]:
        """Every process that runs."""
        return [machine.process for machine in self.machines if machine.process is not None]

    def disagreement(self) -> str:
        """What the running nodes do not agree on, or empty."""
        processes = self.running()
        nodes = {process.machine.node for process in processes}
        versions = {process.machine.node: process.gossip.known.me for process in processes}
        for process in processes:
            gossip = process.gossip
            for machine in self.machines:
                if gossip.known.alive(machine.node) != (machine.node in nodes):
                    state = "lives" if gossip.known.alive(machine.node) else "is dead"
                    return f"{process.machine.name} thinks that {machine.name} {state}"
            for node, record in versions.items():
                held = gossip.known.record(node)
                if held != record:
                    version = held.version if held else 0
                    return (
                        f"{process.machine.name} has version {version} of {self.name(node)}, "
                        f"which is at {record.version}"
                    )
        leaders = {process.gossip.known.leader() for process in processes}
        if len(leaders) > 1:
            return f"leaders: {sorted(leaders)}"
        if leaders and next(iter(leaders)).leader not in nodes:
            return "nobody leads"
        return ""

    def mark(self, process: Process) -> None:
        """Change something in a node's record."""
        gossip = process.gossip
        record = replace(gossip.known.me, models=f"{self.random.getrandbits(32):08x}")
        if self.random.random() < self.big:
            # Does not fit a datagram, however compressed.
            record = replace(record, setup=f"{self.random.getrandbits(16000):x}")
        process.apply(gossip.update_record(record, process.clock()))


def _damage(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    return bytes(damaged[: random.randint(1, len(damaged))]) if random.random() < 0.2 else bytes(damaged)


def _nothing(process: Process) -> None:
    pass
