"""A random schedule of a cluster from a seed: faults, then healing, with invariants checked throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sollold.cluster.gossip.actions import Change, NodeEvent, PersistedState
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.standing_link import SILENT_SECONDS

from .deployments import Deployments, InvariantError
from .world import Machine, Process, Weather, World

HEAL_SECONDS = 30.0
"""Seconds after the last fault within which all must agree again."""
FAULT_SECONDS = 12.0
"""Seconds within which every fault that ends by itself has ended."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a schedule. ``fault``: the violated invariant or ""; ``healed``: seconds to agreement."""

    seed: int
    machines: int
    fault: str
    healed: float
    packets: int


class Schedule:
    """The schedule of a seed."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        random = self.random = Random(f"schedule {seed}")
        self.seed = seed
        self.world = World(
            seed,
            random.choice((2, 3, 3, 4, 5, 5, 6, 7)),
            trace=trace,
            sealed=random.random() < 0.25,
            links=random.random() < 0.7,
        )
        self.world.big = 0.3
        self.deployments = Deployments(self.world)
        self.world.watch = self._watch
        self._remembering = random.random() < 0.5
        """Whether a node is introduced to all others when it starts, and never again."""
        self._claims: dict[Term, int] = {}
        self._forgetful: set[str] = set()
        for machine in self.world.machines:
            machine.bridge = random.random() < 0.2
        self._faults: tuple[Callable[[], None], ...] = (
            self.crash,
            self.crash,
            self.crash_within,
            self.restart,
            self.restart,
            self.restart_without_disk,
            self.leave,
            self.stop,
            self.partition,
            self.partition,
            self.isolate,
            self.one_way,
            self.lossy,
            self.flap,
            self.ring,
            self.swizzle,
            self.heal,
            self.weather,
            self.weather,
            self.late,
            self.jump,
            self.drift,
            self.renumber,
            self.fill,
            self.slow_disk,
            self.break_link,
            self.change,
            self.change,
        )

    # Invariants

    def _watch(self, process: Process, event: NodeEvent) -> None:
        if event.change is not Change.LEADER or event.term.leader != process.machine.node:
            return
        if event.node in self._forgetful:
            return
        boot = self._claims.setdefault(event.term, process.boot)
        if boot != process.boot:
            raise InvariantError(f"{event.term} was claimed by two runs of {process.machine.name}")

    # Faults

    def _up(self) -> list[Machine]:
        return [machine for machine in self.world.machines if machine.process is not None]

    def _pick(self) -> Machine | None:
        up = self._up()
        return self.random.choice(up) if up else None

    def crash(self) -> None:
        machine = self._pick()
        if machine is not None:
            machine.crash()

    def crash_within(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None:
            machine.process.fuse = self.random.randrange(30)

    def _start(self, machine: Machine) -> None:
        machine.start()
        if self._remembering or self.random.random() < 0.8:
            machine.introduce_all()
        else:
            process = machine.process
            other = self.random.choice(self.world.machines)
            if process is not None:
                process.apply(process.gossip.introduce((other.address,), process.clock(), keep=True))

    def restart(self) -> None:
        machine = self.random.choice(self.world.machines)
        machine.crash("restarted")
        self._start(machine)

    def restart_without_disk(self) -> None:
        machine = self.random.choice(self.world.machines)
        machine.crash("its disk is lost")
        machine.kept = PersistedState()
        self.deployments.lose_disk(machine)
        self._claims = {term: boot for term, boot in self._claims.items() if term.leader != machine.node}
        self._start(machine)

    def leave(self) -> None:
        machine = self._pick()
        if machine is not None:
            machine.leave()

    def stop(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None and not machine.process.stopped:
            process = machine.process
            seconds = self.random.choice((0.5, 2.0, 5.0, FAULT_SECONDS))
            self.world.log(f"{machine.name} is stopped for {seconds} s")
            process.stop()
            self.world.call_at(self.world.now + seconds, process.resume)

    def _split(self, side: list[Machine]) -> None:
        self.world.log(f"the network is split: {[machine.name for machine in side]} are separated")
        for here in side:
            for there in self.world.machines:
                if there not in side:
                    self.world.cut |= {(here.number, there.number), (there.number, here.number)}
                    if self.world.links:
                        self.world.call_at(self.world.now + SILENT_SECONDS, self._time_out_link, here, there)

    def _time_out_link(self, machine: Machine, other: Machine) -> None:
        """Time the link out, as keep-alives do, if the two are still separated."""
        if self.world.is_cut(machine, other):
            machine.break_link(other)

    def partition(self) -> None:
        machines = self.world.machines
        self._split(self.random.sample(machines, self.random.randint(1, len(machines) - 1)))

    def isolate(self) -> None:
        self._split([self.random.choice(self.world.machines)])

    def one_way(self) -> None:
        sender, receiver = self.random.sample(self.world.machines, 2)
        self.world.log(f"nothing gets from {sender.name} to {receiver.name}")
        self.world.cut.add((sender.number, receiver.number))

    def lossy(self) -> None:
        """Lose datagrams of one machine in one direction: a bad cable, or a firewall that drops UDP."""
        machine = self.random.choice(self.world.machines)
        loss = self.random.choice((0.3, 0.7, 1.0))
        hears = self.random.random() < 0.5
        self.world.log(
            f"{machine.name} loses {loss:.0%} of the datagrams that it {'gets' if hears else 'sends'}"
        )
        for other in self.world.machines:
            if other is not machine:
                pair = (other.number, machine.number) if hears else (machine.number, other.number)
                self.world.lossy[pair] = loss

    def flap(self) -> None:
        """Disconnect and reconnect a machine repeatedly, as a switch with a bad port does."""
        machine = self.random.choice(self.world.machines)
        down, up = self.random.choice(((0.3, 0.7), (1.0, 2.0), (2.0, 2.0)))
        for number in range(int(FAULT_SECONDS / (down + up))):
            begin = self.world.now + number * (down + up)
            self.world.call_at(begin, self._split, [machine])
            self.world.call_at(begin + down, self._rejoin, machine)

    def ring(self) -> None:
        self.world.log("each machine reaches only its neighbours")
        numbers = [machine.number for machine in self.world.machines]
        count = len(numbers)
        self.world.cut = {
            (sender, receiver)
            for a, sender in enumerate(numbers)
            for b, receiver in enumerate(numbers)
            if (a - b) % count not in (0, 1, count - 1)
        }

    def swizzle(self) -> None:
        """Separate machines one by one and reconnect them in another order."""
        chosen = self.random.sample(self.world.machines, self.random.randint(1, len(self.world.machines)))
        for index, machine in enumerate(chosen):
            self.world.call_at(self.world.now + index * 0.7, self._split, [machine])
        self.random.shuffle(chosen)
        for index, machine in enumerate(chosen):
            self.world.call_at(self.world.now + 6.0 + index * 0.7, self._rejoin, machine)

    def _rejoin(self, machine: Machine) -> None:
        self.world.log(f"{machine.name} is connected again")
        self.world.cut = {pair for pair in self.world.cut if machine.number not in pair}

    def heal(self) -> None:
        self.world.log("the network is whole")
        self.world.cut.clear()
        self.world.lossy.clear()

    def weather(self) -> None:
        random = self.random
        self.world.weather = Weather(
            loss=random.choice((0.0, 0.05, 0.2, 0.4)),
            jitter=random.choice((0.0, 0.002, 0.05)),
            slow=random.choice((0.0, 0.05, 0.2)),
            double=random.choice((0.0, 0.1)),
            damage=random.choice((0.0, 0.05)) if self.world.sealed else 0.0,
        )
        self.world.log(f"{self.world.weather}")

    def late(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None:
            machine.process.lateness = self.random.choice((0.0, 0.1, 0.4, 0.8))
            self.world.log(f"{machine.name} is late by {machine.process.lateness} s")

    def jump(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None:
            seconds = self.random.choice((1.5, 10.0, 100000.0))
            self.world.log(f"the clock of {machine.name} jumps {seconds} s")
            machine.process.jump(seconds)

    def drift(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None:
            machine.process.drift(self.random.choice((0.9, 0.99, 1.01, 1.1)))

    def renumber(self) -> None:
        machine = self.random.choice(self.world.machines)
        machine.renumber()

    def fill(self) -> None:
        machine = self.random.choice(self.world.machines)
        machine.full = not machine.full
        self.world.log(f"the disk of {machine.name} is {'full' if machine.full else 'free again'}")
        # A node with a full disk may claim the same term again after a restart.
        self._forgetful.add(machine.node)

    def break_link(self) -> None:
        if self.world.links:
            machine, other = self.random.sample(self.world.machines, 2)
            self.world.log(f"the connection of {machine.name} and {other.name} breaks")
            machine.break_link(other)

    def slow_disk(self) -> None:
        machine = self.random.choice(self.world.machines)
        machine.disk_seconds = self.random.choice((0.0, 0.5, 3.0, 20.0))
        self.world.log(f"the disk of {machine.name} takes {machine.disk_seconds} s to write")

    def change(self) -> None:
        machine = self._pick()
        if machine is not None and machine.process is not None:
            self.world.mark(machine.process)

    # The schedule

    def run(self) -> Outcome:
        """Run the schedule."""
        world = self.world
        try:
            for machine in world.machines:
                world.call_at(self.random.random() * 2, self._begin, machine)
            world.run_until(self.random.choice((1.0, 5.0, 8.0)))
            for _ in range(self.random.randint(2, 14)):
                self.random.choice(self._faults)()
                world.run_until(world.now + self.random.choice((0.1, 0.5, 1.0, 3.0, 6.0)))
            healed = self._heal()
            fault = ""
        except InvariantError as error:
            fault, healed = str(error), 0.0
        return Outcome(self.seed, len(world.machines), fault, healed, world.packets)

    def _begin(self, machine: Machine) -> None:
        if machine.process is None:
            self._start(machine)

    def _heal(self) -> float:
        world = self.world
        # Pending faults (a stopped machine, a swizzle) end first.
        world.run_until(world.now + FAULT_SECONDS)
        world.log("all faults end")
        world.cut.clear()
        world.lossy.clear()
        world.weather = Weather()
        self.deployments.frozen = True
        for machine in world.machines:
            machine.disk_seconds = 0.0
            if machine.process is None and self.random.random() < 0.5:
                self._start(machine)
            if machine.process is not None:
                machine.process.fuse = -1
                machine.process.lateness = 0.0
                if not self._remembering:
                    machine.introduce_all()
        if not self._up():
            self._start(world.machines[0])
        began = world.now
        if not world.run_while(
            lambda: bool(world.disagreement() or self.deployments.inconsistency()), HEAL_SECONDS
        ):
            raise InvariantError(
                f"after {HEAL_SECONDS} s: {world.disagreement() or self.deployments.inconsistency()}"
            )
        return world.now - began


def run(seed: int, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run the schedule of ``seed``."""
    return Schedule(seed, trace).run()
