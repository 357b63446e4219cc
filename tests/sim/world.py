"""A simulated network in one process, with virtual time, seeded randomness and faults.

Machines have addresses and a disk. A machine's daemon is a `Process`: the daemon's own `Gossip` with a clock
that may run fast or slow, or jump. Datagrams may be lost, delayed, duplicated, reordered and damaged; each
direction between two machines may be cut.
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
"""An address that several machines have: packets to it never leave the sender's machine."""
TOKEN = bytes(range(32))
_TCP_TIMEOUT = 3.0
_BUFFERED = 200
"""Datagrams that the system buffers for a stopped process."""


@dataclass(slots=True)
class Weather:
    """What the network does to datagrams: fractions of them, and delays in seconds."""

    loss: float = 0.0
    delay: float = 0.001
    jitter: float = 0.0
    slow: float = 0.0
    """Fraction of datagrams that are delayed by up to a second, and so reordered."""
    double: float = 0.0
    damage: float = 0.0


class Process:
    """One run of a daemon, with its gossip core and clock."""

    def __init__(self, machine: Machine, boot: int, tuning: Tuning) -> None:
        world = machine.world
        self.machine = machine
        self.world = world
        self.boot = boot
        self.alive = True
        self.stopped = False
        self.fuse = -1
        """Number of actions after which the process dies; negative: never."""
        self.rate = 1.0
        self._base = world.random.random() * 1000 - world.now
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._wake = float("inf")
        self._writing = False
        self._unwritten: PersistedState | None = None
        self.sealer = Sealer((TOKEN,), node=machine.node, boot=boot) if world.sealed else None
        self.lateness = 0.0
        """Seconds by which everything in this process is delayed, as on an overloaded machine."""
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
        """The monotonic time of this process, in seconds."""
        return self._base + self.world.now * self.rate

    def jump(self, seconds: float) -> None:
        """Advance its clock, as after a suspension of the machine."""
        self._base += seconds
        self.arm()

    def drift(self, rate: float) -> None:
        """Change the speed of its clock."""
        self._base += self.world.now * (self.rate - rate)
        self.rate = rate
        self.arm()

    # Running

    def later(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        """Call back after ``seconds`` if it is still running; deferred while it is stopped."""
        self.world.call_at(self.world.now + seconds, self.run, call, *args)

    def run(self, call: Callable[..., Any], *args: Any) -> None:
        if self.stopped:
            if len(self._held) < _BUFFERED:
                self._held.append((call, args))
        elif self.alive:
            call(*args)

    def arm(self) -> None:
        """Schedule the next tick of the core."""
        if not self.alive:
            return
        wake = self.world.now + max(0.0, (self.gossip.next_wake() - self.clock()) / self.rate) + self.lateness
        if wake < self._wake - 1e-9:
            self._wake = wake
            self.world.call_at(wake, self._tick, wake)

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

    def resume(self) -> None:
        """SIGCONT: deferred calls run first."""
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
        """Write the newest state, one write at a time, like the daemon."""
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
        """Handle a datagram."""
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
        """Whether its disk is full: nothing is written, but the daemon continues."""
        self.disk_seconds = 0.0
        """Seconds that its disk takes to write."""
        self.process: Process | None = None
        self.boots = 0

    def advertised(self) -> tuple[Address, ...]:
        """The addresses that the daemon advertises."""
        return ((BRIDGE, PORT), self.address) if self.bridge else (self.address,)

    def start(self, *, tuning: Tuning | None = None) -> Process:
        assert self.process is None
        self.boots += 1
        world = self.world
        boot = world.random.getrandbits(62)
        self.process = Process(self, boot, tuning or world.tuning)
        world.log(f"{self.name} starts (version {self.process.gossip.known.me.version})")
        self.process.arm()
        world.started(self.process)
        return self.process

    def introduce_all(self) -> None:
        """Introduce all other machines, as mDNS and remembered peers do."""
        for other in self.world.machines:
            if other is not self and self.process is not None:
                process = self.process
                process.apply(process.gossip.introduce(other.advertised(), process.clock(), keep=True))

    def crash(self, how: str = "killed") -> None:
        """kill -9: the system closes its connections, which reachable peers notice."""
        process = self.process
        if process is None:
            return
        self.world.log(f"{self.name} dies ({how})")
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
        """The connection with ``other`` times out on both sides; both daemons continue."""
        for here, there in ((self, other), (other, self)):
            process = here.process
            if process is not None:
                process.later(process.lateness, here._link_timed_out, process, there.node)

    def _link_timed_out(self, process: Process, node: str) -> None:
        process.apply(process.gossip.link_lost(node, process.clock(), silent=True))

    def _link_lost(self, peer: Process, dead: Process) -> None:
        gossip = peer.gossip
        if gossip.known.boot(self.node) == dead.boot:
            peer.apply(gossip.link_lost(self.node, peer.clock()))

    def leave(self) -> None:
        """Leave the cluster and stop."""
        process = self.process
        if process is None:
            return
        self.world.log(f"{self.name} leaves")
        process.apply(process.gossip.leave(process.clock()))
        self.world.call_at(self.world.now + 0.5, self._gone, process)

    def _gone(self, process: Process) -> None:
        if self.process is process:
            process.alive = False
            self.process = None
            self.world.ended(process)

    def renumber(self) -> None:
        """Change the address, as DHCP may."""
        number = self.world.fresh_number()
        self.address = (f"10.1.{number >> 8}.{number & 255}", PORT)
        self.world.index()
        self.world.log(f"{self.name} moves to {self.address[0]}")
        process = self.process
        if process is not None:
            process.apply(process.gossip.set_addresses(self.advertised(), process.clock()))


class World:
    """Machines, the network between them, and time.

    Args:
        trace: called with a line for each event, if given.
        sealed: whether datagrams are sealed as in the daemon (slower).
        links: whether machines have standing connections, which end at once when a process dies.
        signed: whether nodes sign their own state and reject unsigned state.
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
        """Pairs (sender, receiver) of machine numbers between which nothing passes."""
        self.lossy: dict[tuple[int, int], float] = {}
        """Fraction of datagrams lost, besides `weather`, by (sender, receiver); TCP passes."""
        self.big = 0.0
        """Fraction of record changes that exceed a datagram."""
        self.packets = 0
        self.bytes = 0
        self.tcp_bytes = 0
        self.watch: Callable[[Process, NodeEvent], None] | None = None
        self.started: Callable[[Process], None] = _ignore_process
        self.ended: Callable[[Process], None] = _ignore_process
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

    def log(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:9.3f}  {text}")

    def name(self, node: str) -> str:
        """The name of a node, for the trace."""
        return f"m{int(node, 16)}" if node else "nobody"

    # Time

    def call_at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heappush(self._heap, (when, self._order, call, args))

    def run_until(self, when: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= when:
            self.now, _, call, args = heappop(heap)
            call(*args)
        self.now = when

    def run_while(self, busy: Callable[[], bool], limit: float, step: float = 0.25) -> bool:
        """Run until ``busy`` returns false; return False if that takes more than ``limit`` seconds."""
        end = self.now + limit
        while busy():
            if self.now >= end:
                return False
            self.run_until(self.now + step)
        return True

    # Network

    def is_cut(self, source: Machine, target: Machine) -> bool:
        """Return whether no connection is possible, since that needs both directions."""
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
        if self.lossy and random.random() < self.lossy.get((machine.number, target.number), 0.0):
            return
        if weather.damage and random.random() < weather.damage:
            data = _damage(data, random)
        delay = weather.delay + sender.lateness
        if weather.jitter:
            delay += random.expovariate(1 / weather.jitter)
        if weather.slow and random.random() < weather.slow:
            delay += random.random()
        self.call_at(self.now + delay, self._arrive, target, data, machine.address)
        if weather.double and random.random() < weather.double:
            self.call_at(self.now + delay + random.random(), self._arrive, target, data, machine.address)

    def _arrive(self, target: Machine, data: bytes, source: Address) -> None:
        process = target.process
        if process is None:
            return
        if process.lateness:
            self.call_at(self.now + process.lateness, process.run, process.receive, data, source)
        elif process.stopped:
            process.run(process.receive, data, source)
        else:
            process.receive(data, source)

    def hop(self) -> float:
        """Seconds of one way over TCP, with retransmissions."""
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
        done: Callable[[Any, bool], None],
        timeout: float = _TCP_TIMEOUT,
    ) -> None:
        """A request over TCP: ``answer`` runs at the other side, then ``done(reply, ok)`` at this one.

        A failed request may have been executed.
        """
        settled = False

        def settle(reply: Any, ok: bool) -> None:
            nonlocal settled
            if not settled:
                settled = True
                done(reply, ok)

        def arrive() -> None:
            target = self.find(sender.machine, address)
            if target is None or target.process is None or self.is_cut(sender.machine, target):
                return
            process = target.process
            process.run(serve, process)

        def serve(process: Process) -> None:
            reply = answer(process, body)
            sender.later(self.hop() + process.lateness, respond, process, reply)

        def respond(process: Process, reply: Any) -> None:
            if not self.is_cut(sender.machine, process.machine):
                settle(reply, True)

        self.call_at(self.now + self.hop() + sender.lateness, arrive)
        sender.later(timeout, settle, None, False)

    def push_pull(self, sender: Process, action: PushPullWith) -> None:
        def answer(process: Process, body: bytes) -> bytes:
            reply, actions = process.gossip.push_pull(body, sender.machine.address, process.clock())
            process.apply(actions)
            self.tcp_bytes += len(body) + len(reply)
            return reply

        def attempt(addresses: tuple[Address, ...], body: bytes) -> None:
            def done(reply: bytes | None, ok: bool) -> None:
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

            self.call(sender, addresses[0], body, answer, done)

        if action.addresses:
            attempt(action.addresses, sender.gossip.push_pull_open())

    def tcp_ping(self, sender: Process, action: TcpPing) -> None:
        def done(reply: str | None, ok: bool) -> None:
            if ok and reply == action.node:
                sender.apply(sender.gossip.tcp_pong(action.sequence, sender.clock()))

        for address in action.addresses[:2]:
            self.call(sender, address, None, lambda process, _: process.machine.node, done, action.timeout)

    # Events

    def changed(self, process: Process, event: NodeEvent) -> None:
        if self.watch is not None:
            self.watch(process, event)
        if self.trace is not None and event.change is not Change.UPDATED:
            name = process.machine.name
            if event.change is Change.LEADER:
                self.log(f"  {name}: term {event.term.counter} of {self.name(event.term.leader)} holds")
            else:
                self.log(f"  {name}: {self.name(event.node)} {event.change}")

    # State

    def running(self) -> list[Process]:
        """All running processes."""
        return [machine.process for machine in self.machines if machine.process is not None]

    def disagreement(self) -> str:
        """Return a difference between the views of the running nodes, or an empty string."""
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
            # Does not fit into a datagram, even compressed.
            record = replace(record, setup=f"{self.random.getrandbits(16000):x}")
        process.apply(gossip.update_record(record, process.clock()))


def _damage(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    return bytes(damaged[: random.randint(1, len(damaged))]) if random.random() < 0.2 else bytes(damaged)


def _ignore_process(process: Process) -> None:
    pass
