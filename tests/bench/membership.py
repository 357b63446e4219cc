"""Membership in the simulator: detection times, network load, and false positives.

``python -m tests.bench.membership [--quick]``. It uses the state machines of the daemon, virtual time
and fixed seeds, so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import xor
from statistics import median, quantiles

from sollold.cluster.gossip.actions import Change, NodeEvent
from sollold.cluster.gossip.config import LAN, Tuning
from sollold.cluster.gossip.member import Member
from sollold.cluster.gossip.packet import Alive
from sollold.cluster.gossip.registry import Register
from tests.sim.world import Machine, Process, Weather, World

MEMBERLIST = replace(LAN, suspicion_multiplier=4.0, probes=1)
"""memberlist's LAN defaults. Probes on suspicion, broken links and digests remain those of sollold."""
_LAN_WEATHER = Weather(delay=0.0003, jitter=0.0005)
_LIMIT = 120.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution of the seconds until nodes learned of an event.

    Attributes:
        median, p99: over all nodes in all trials.
        last: median over the trials of the time of the last node; ``worst``: the maximum.
    """

    median: float
    p99: float
    last: float
    worst: float

    def __str__(self) -> str:
        return f"{self.median:6.2f} {self.p99:6.2f} {self.last:6.2f} {self.worst:6.2f}"


def spread_of(trials: list[list[float]]) -> Spread:
    """Return the distribution of the seconds of each node in each trial."""
    cuts = quantiles([seconds for trial in trials for seconds in trial], n=100, method="inclusive")
    lasts = [max(trial) for trial in trials]
    return Spread(cuts[49], cuts[98], median(lasts), max(lasts))


class Cluster:
    """A cluster of nodes that already know each other, with some spare machines."""

    def __init__(self, nodes: int, *, spare: int = 0, seed: int = 1, tuning: Tuning = LAN) -> None:
        self.world = World(seed, nodes + spare, tuning=tuning, links=False)
        self.world.weather = _LAN_WEATHER
        machines = self.world.machines
        self.spare = machines[nodes:]
        for machine in machines[:nodes]:
            machine.start()
        self._introduce_all(machines[:nodes])
        self.deaths = 0
        self.world.watch = self._watch
        self._waiting: tuple[str, Change] = ("", Change.JOINED)
        self._heard: dict[str, float] = {}
        # The first leader is elected and the remaining updates spread.
        self.world.run_until(20.0)

    def _introduce_all(self, machines: list[Machine]) -> None:
        """Write the state that a long-running cluster would have directly into the tables."""
        gossips = [machine.process.gossip for machine in machines if machine.process is not None]
        messages = [
            Alive(
                g.known.me.node,
                g._membership.own.boot,
                g._membership.own.incarnation,
                g._membership.own.addresses,
            )
            for g in gossips
        ]
        # Copies, since a node changes its own register in place.
        registers = {
            g.known.me.node: Register(
                g._membership.own.boot, g.known.me.version, g.known.me, g._registry._parts, b""
            )
            for g in gossips
        }
        marks = {node: mark for g in gossips for node, mark in g._anti_entropy._marks.items()}
        digest = reduce(xor, marks.values())
        for machine, gossip in zip(machines, gossips, strict=True):
            membership = gossip._membership
            for alive in messages:
                if alive.node != machine.node:
                    member = membership.members[alive.node] = Member(alive, 0.0)
                    membership._enter(member)
            gossip._registry._registers.update(
                (node, register) for node, register in registers.items() if node != machine.node
            )
            gossip._anti_entropy._marks = dict(marks)
            gossip._anti_entropy.digest = digest
            gossip._news._tiers.clear()
            gossip._news._tier.clear()

    def _watch(self, process: Process, event: NodeEvent) -> None:
        if event.change is Change.DIED and any(
            machine.node == event.node and machine.process is not None for machine in self.world.machines
        ):
            self.deaths += 1
        if (event.node, event.change) == self._waiting:
            self._heard.setdefault(process.machine.node, self.world.now)

    def _wait_for_all(self, node: str, change: Change) -> list[float]:
        """Return the seconds until each of the other nodes has reported this change."""
        began = self.world.now
        self._waiting = (node, change)
        self._heard = {}
        others = [process for process in self.world.running() if process.machine.node != node]
        if not self.world.run_while(lambda: len(self._heard) < len(others), _LIMIT, 0.05):
            raise RuntimeError(f"{len(others) - len(self._heard)} have not heard after {_LIMIT} s")
        return [heard - began for heard in self._heard.values()]

    def join(self) -> list[float]:
        """Return the seconds from the start of a machine until each other node has its record."""
        machine = self.spare.pop()
        other = self.world.random.choice(self.world.running()).machine
        process = machine.start()
        process.apply(process.gossip.introduce((other.address,), process.clock(), keep=True))
        return self._wait_for_all(machine.node, Change.UPDATED)

    def crash(self, *, links: bool) -> list[float]:
        """Return the seconds from the crash of a machine until each other node knows."""
        world = self.world
        world.run_until(world.now + world.random.random())
        machine = world.random.choice(world.running()).machine
        world.links = links
        machine.crash()
        world.links = False
        seconds = self._wait_for_all(machine.node, Change.DIED)
        self.spare.append(machine)
        return seconds

    def load(self, seconds: float, *, every: float = 0.0) -> tuple[float, float]:
        """Return messages and bytes per second and node. ``every``: seconds between changes of a record."""
        world = self.world
        packets, sent, began = world.packets, world.bytes + world.tcp_bytes, world.now
        running = world.running()
        if every:
            changes = int(seconds / every * len(running))
            for _ in range(changes):
                world.call_at(
                    began + world.random.random() * seconds, world.mark, world.random.choice(running)
                )
        world.run_until(began + seconds)
        per = seconds * len(running)
        return (world.packets - packets) / per, (world.bytes + world.tcp_bytes - sent) / per


def speed(plan: list[tuple[int, int]], tuning: Tuning) -> Iterator[str]:
    """Yield the lines of the table of times and loads."""
    yield "  Seconds until a node knows: median and 99th percentile of all nodes in all trials;"
    yield "  until the last of a trial knows: median and worst of the trials"
    yield (
        "  nodes trials      join, has its record             kill -9 known"
        "               cut cable known         idle, per node"
    )
    yield f"              {'   median    p99   last  worst' * 3}   msg/s  bytes/s"
    for nodes, trials in plan:
        cluster = Cluster(nodes, spare=trials, tuning=tuning)
        world = cluster.world
        joins, kills, cuts = [], [], []
        load = cluster.load(60.0)
        for _ in range(trials):
            joins.append(cluster.join())
            world.run_until(world.now + 3.0)
            kills.append(cluster.crash(links=True))
            world.run_until(world.now + 3.0)
            cluster.join()
            cuts.append(cluster.crash(links=False))
            world.run_until(world.now + 3.0)
        yield (
            f"  {nodes:5} {trials:6}   {spread_of(joins)}   {spread_of(kills)}   {spread_of(cuts)}"
            f"  {load[0]:6.1f} {load[1]:8.0f}"
        )


def mistakes(plan: list[tuple[int, float, float]], tuning: Tuning) -> Iterator[str]:
    """Yield the lines of the table of false deaths. ``plan``: (nodes, seconds at 5 % loss, other seconds)."""
    yield "  False deaths in so many seconds of virtual time (the target: none in an hour at 5 % loss)"
    yield "  nodes                  0 % loss        5 % loss       20 % loss    10 % of the nodes 0.5 s late"
    for nodes, long, short in plan:
        cells = []
        for loss, slow, seconds in (
            (0.0, 0.0, short),
            (0.05, 0.0, long),
            (0.2, 0.0, short),
            (0.0, 0.1, short),
        ):
            cluster = Cluster(nodes, tuning=tuning)
            cluster.world.weather = replace(_LAN_WEATHER, loss=loss)
            for process in cluster.world.running()[: max(1, round(nodes * slow))] if slow else []:
                process.lateness = 0.5
            cluster.deaths = 0
            cluster.world.run_until(cluster.world.now + seconds)
            cells.append(f"{cluster.deaths} in {seconds:.0f} s")
        yield f"  {nodes:5}{cells[0]:>27}{cells[1]:>16}{cells[2]:>16}{cells[3]:>32}"


def busy(plan: list[int]) -> Iterator[str]:
    """Yield the lines of the table of loads while records change."""
    yield "  nodes   every node changes its record once in 5 s: msg/s   bytes/s per node"
    for nodes in plan:
        packets, size = Cluster(nodes).load(30.0, every=5.0)
        yield f"  {nodes:5}   {packets:47.1f}  {size:8.0f}"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small clusters and short times")
    quick = parser.parse_args().quick
    began = time.monotonic()
    times = [(8, 20), (64, 5)] if quick else [(8, 100), (64, 40), (256, 10), (1000, 3)]
    print("Membership (simulated LAN, 0.3 to 3 ms a datagram)")
    for line in speed(times, LAN):
        print(line, flush=True)
    print("The same with memberlist's own settings (one probe a second, suspicion multiplier 4)")
    for line in speed(times[:2], MEMBERLIST):
        print(line, flush=True)
    print(
        "memberlist as published: suspicion 4 s up to 3 nodes, 4 to 24 s at 5 to 10, 8 to 48 s at 100,\n"
        "after 1 to 2 s until a probe fails; one ping and one ack a second, gossip only when there is news."
    )
    for line in busy([8, 32] if quick else [8, 32, 64]):
        print(line, flush=True)
    errors = [(8, 600.0, 600.0), (64, 60.0, 60.0)]
    if not quick:
        # One hour of a thousand nodes would take an hour of CPU time.
        errors = [(8, 3600.0, 3600.0), (64, 3600.0, 3600.0), (256, 3600.0, 600.0), (1000, 300.0, 60.0)]
    for line in mistakes(errors, LAN):
        print(line, flush=True)
    print(f"Real time: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
