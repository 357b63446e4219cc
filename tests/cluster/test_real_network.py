"""Nodes in network namespaces with real mDNS: joins, deaths, cut cables, partitions."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from tests import netns

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(netns.available()), reason=netns.available())]

ROOT = Path(__file__).parents[2]
TRIALS = 3
"""Repetitions of each timed test; the median counts, since a busy machine may delay one of them."""
SETTLED = 5.0
"""Seconds after which every suspicion has been refuted or has expired."""


class Seen(NamedTuple):
    """A member's view of the cluster since ``time`` (seconds of the monotonic clock)."""

    time: float
    live: list[str]
    leader: str
    term: int
    links: list[str]


class Member:
    """The process of a node on a machine, and the views it logged."""

    def __init__(self, machine: netns.Machine, name: str, folder: Path) -> None:
        self.machine = machine
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        with (self.folder / f"{self.name}.out").open("ab") as out:
            self.process = self.machine.popen(
                [sys.executable, "-m", "tests.cluster.member", self.folder / self.name, self.log, *options],
                cwd=ROOT, stdout=out, stderr=out,
            )  # fmt: skip

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def history(self) -> list[Seen]:
        if not self.log.exists():
            return []
        return [Seen(*json.loads(line)) for line in self.log.read_text().splitlines() if line.endswith("]")]

    def live(self) -> list[str]:
        seen = self.history()
        return seen[-1].live if seen else []

    def leader(self) -> tuple[str, int]:
        seen = self.history()
        return (seen[-1].leader, seen[-1].term) if seen else ("", 0)

    def links(self) -> int:
        seen = self.history()
        return len(seen[-1].links) if seen else 0


class Cluster:
    """Three members on a LAN."""

    def __init__(self, lan: netns.Lan, folder: Path) -> None:
        self.lan = lan
        self.members = [Member(machine, f"m{number}", folder) for number, machine in enumerate(lan)]
        self.names = [member.name for member in self.members]

    def __getitem__(self, number: int) -> Member:
        return self.members[number]

    def until(self, condition: Callable[[], object], seconds: float) -> float:
        """Wait until ``condition`` holds. Returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                seen = {member.name: member.history()[-3:] for member in self.members}
                raise AssertionError(f"not true within {seconds} s: {seen}")
            time.sleep(0.01)
        return time.monotonic() - began

    def when(self, members: list[Member], since: float, holds: Callable[[Seen], bool]) -> float:
        """Wait until all ``members`` have seen a view that ``holds``; return when the last one first did."""

        def firsts() -> list[float]:
            return [
                min(
                    (line.time for line in member.history() if line.time >= since and holds(line)),
                    default=0.0,
                )
                for member in members
            ]

        self.until(lambda: all(firsts()), 20)
        return max(firsts())

    def whole(self) -> bool:
        """Return whether all see each other, are linked and have the same leader."""
        leaders = {member.leader() for member in self.members}
        return (
            all(member.live() == self.names for member in self.members)
            and all(member.links() == len(self.names) - 1 for member in self.members)
            and len(leaders) == 1
            and leaders.pop()[0] in self.names
        )

    def others(self, excluded: int) -> list[Member]:
        return [member for number, member in enumerate(self.members) if number != excluded]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with netns.Lan(3) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        cluster.until(cluster.whole, 20)
        yield cluster


def test_a_joining_node_is_seen_within_two_seconds(cluster: Cluster) -> None:
    took = []
    for _ in range(TRIALS):
        cluster[2].kill()
        cluster.until(lambda: all(len(member.live()) == 2 for member in cluster.others(2)), 10)
        seen = len(cluster[2].history())
        cluster[2].start()
        # Its first line is written when it has started.
        cluster.until(lambda: len(cluster[2].history()) > seen, 20)  # noqa: B023
        ready = cluster[2].history()[seen].time
        # The others may see it slightly earlier.
        whole = cluster.when(cluster.members, ready - 0.5, lambda line: line.live == cluster.names)
        took.append(whole - ready)
        cluster.until(cluster.whole, 20)
    assert median(took) < 2.0, took


def test_a_killed_node_is_found_dead_within_a_second(cluster: Cluster) -> None:
    took = []
    for victim in (1, 2, 0):
        name, killed = cluster.names[victim], time.monotonic()
        cluster[victim].kill()
        took.append(
            cluster.when(cluster.others(victim), killed, lambda line: name not in line.live) - killed  # noqa: B023
        )
        cluster[victim].start()
        cluster.until(cluster.whole, 20)
    assert median(took) < 1.0, took


def test_a_cut_cable_is_detected_within_six_seconds_and_affects_no_others(
    cluster: Cluster,
) -> None:
    took = []
    for _ in range(TRIALS):
        marks = {member.name: len(member.history()) for member in cluster.members}
        cut = time.monotonic()
        cluster.lan[1].cut()
        took.append(cluster.when(cluster.others(1), cut, lambda line: "m1" not in line.live) - cut)
        cluster.until(lambda: all(member.leader()[0] in ("m0", "m2") for member in cluster.others(1)), 5)
        cluster.until(lambda: cluster[1].live() == ["m1"], 20)
        time.sleep(1)
        cluster.lan[1].restore()
        cluster.until(cluster.whole, 20)
        # The isolated node's view of the two must not separate them.
        for observer, other in ((cluster[0], "m2"), (cluster[2], "m0")):
            assert all(other in line.live for line in observer.history()[marks[observer.name] :])
        time.sleep(SETTLED)
    assert median(took) < 6.0, took


def test_a_dead_leader_is_replaced_within_three_seconds(cluster: Cluster) -> None:
    took = []
    for _ in range(TRIALS):
        name, term = cluster[0].leader()
        leader = cluster.names.index(name)
        others, killed = cluster.others(leader), time.monotonic()
        cluster[leader].kill()
        known = cluster.when(others, killed, lambda line: name not in line.live)  # noqa: B023
        led = cluster.when(others, killed, lambda line: line.leader not in ("", name))  # noqa: B023
        took.append(led - known)
        cluster.until(lambda: len({member.leader() for member in others}) == 1, 5)  # noqa: B023
        assert others[0].leader()[1] > term
        cluster[leader].start()
        cluster.until(cluster.whole, 20)
    assert median(took) < 3.0, took


def test_a_suspended_process_is_found_dead_and_rejoins(cluster: Cluster) -> None:
    cluster[0].signal(signal.SIGSTOP)
    cluster.until(lambda: all("m0" not in member.live() for member in cluster.others(0)), 20)
    cluster[0].signal(signal.SIGCONT)
    cluster.until(cluster.whole, 20)


def test_a_partition_heals_to_one_leader(cluster: Cluster) -> None:
    def cut_off(alone: int) -> None:
        cluster.lan.partition([alone], [number for number in range(3) if number != alone])
        cluster.until(lambda: cluster[alone].live() == [f"m{alone}"], 20)
        cluster.until(lambda: all(len(member.live()) == 2 for member in cluster.others(alone)), 20)
        cluster.until(lambda: cluster[alone].leader()[0] == f"m{alone}", 10)

    for number in (0, 2):
        cut_off(number)
        cluster.lan.heal()
        cluster.until(cluster.whole, 20)


def test_a_leaving_node_is_removed_within_a_second(cluster: Cluster) -> None:
    took = []
    for _ in range(TRIALS):
        signalled = time.monotonic()
        cluster[2].signal(signal.SIGTERM)
        took.append(
            cluster.when(cluster.others(2), signalled, lambda line: "m2" not in line.live) - signalled
        )
        assert cluster[2].process is not None
        assert cluster[2].process.wait(10) == 0
        cluster[2].start()
        cluster.until(cluster.whole, 20)
    assert median(took) < 1.0, took


def test_seeds_work_without_mdns_and_remembered_peers_without_seeds(tmp_path: Path) -> None:
    with netns.Lan(3) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start("mdns=false", f"seeds={lan[0].address}")
        cluster.until(cluster.whole, 20)
        for member in cluster.members:
            member.signal(signal.SIGTERM)
        for member in cluster.members:
            assert member.process is not None
            assert member.process.wait(10) == 0
            member.log.unlink()
        for member in cluster.members:
            member.start("mdns=false")
        cluster.until(cluster.whole, 20)


def test_two_machines_with_one_node_id_both_report_it(tmp_path: Path) -> None:
    with netns.Lan(2) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            (tmp_path / member.name).mkdir()
            (tmp_path / member.name / "node-key").write_text(f"{'aa' * 32}\n")
            member.start()
        outputs = [tmp_path / f"{member.name}.out" for member in cluster.members]
        cluster.until(
            lambda: all("another machine uses the node id" in output.read_text() for output in outputs), 15
        )


def test_a_copied_node_separates_no_others_and_is_reported_by_them(tmp_path: Path) -> None:
    with netns.Lan(4) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members[:3]:
            member.start()
        first = cluster.members[:3]
        cluster.until(lambda: all(len(member.live()) == 3 and member.leader()[0] for member in first), 20)
        cluster.until(lambda: len({member.leader() for member in first}) == 1, 20)
        name, _ = cluster[0].leader()
        copied = next(member for member in first if member.name == name)
        others = [member for member in first if member is not copied]
        shutil.copytree(copied.folder / copied.name, tmp_path / "m3")
        copy = cluster[3]
        copy.start()
        outputs = [tmp_path / f"{member.name}.out" for member in (*others, copied, copy)]
        cluster.until(
            lambda: all("two machines use the id" in output.read_text() for output in outputs[:2]), 30
        )
        cluster.until(
            lambda: all("another machine uses the node id" in output.read_text() for output in outputs[2:]),
            30,
        )
        time.sleep(SETTLED)
        marks = [len(member.history()) for member in others]
        time.sleep(2 * SETTLED)
        for member, mark in zip(others, marks, strict=True):
            leaders = {(line.leader, line.term) for line in member.history()[mark:]} | {member.leader()}
            assert len(leaders) == 1, leaders
        for output in outputs[:2]:
            (line,) = [line for line in output.read_text().splitlines() if "two machines use the id" in line]
            assert all(
                machine.address in line or machine.address6 in line
                for machine in (copied.machine, copy.machine)
            )


def test_an_interface_that_comes_up_later_is_used(tmp_path: Path) -> None:
    with netns.Lan(2) as lan:
        cluster = Cluster(lan, tmp_path)
        lan[1].link(False)
        for member in cluster.members:
            member.start()
        cluster.until(lambda: all(member.live() == [member.name] for member in cluster.members), 20)
        lan[1].link(True)
        cluster.until(cluster.whole, 20)


@pytest.mark.parametrize("mdns", [True, False])
def test_ipv6_alone_is_sufficient(tmp_path: Path, mdns: bool) -> None:
    with netns.Lan(3) as lan:
        for machine in lan:
            machine.remove_address(f"{machine.address}/24")
        cluster = Cluster(lan, tmp_path)
        options = () if mdns else ("mdns=false", f"seeds=[{lan[0].address6}]:11436")
        for member in cluster.members:
            member.start(*options)
        cluster.until(cluster.whole, 20)


def test_nodes_that_listen_on_different_families_join(tmp_path: Path) -> None:
    with netns.Lan(3) as lan:
        cluster = Cluster(lan, tmp_path)
        for member, host in zip(cluster.members, ("::", "0.0.0.0", "::"), strict=True):
            member.start(f"host={host}")
        cluster.until(cluster.whole, 20)


def test_an_ipv4_only_and_an_ipv6_only_node_see_each_other_through_a_dual_stack_node(tmp_path: Path) -> None:
    with netns.Lan(3) as lan:
        lan[0].remove_address(f"{lan[0].address}/24")
        lan[1].remove_address(f"{lan[1].address6}/64")
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        # The two can't reach each other and have no link, but neither considers the other dead.
        cluster.until(lambda: all(member.live() == cluster.names for member in cluster.members), 20)
        marks = [len(member.history()) for member in cluster.members]
        time.sleep(2 * SETTLED)
        for member, mark in zip(cluster.members, marks, strict=True):
            assert all(line.live == cluster.names for line in member.history()[mark:])


def test_a_bridge_with_the_same_address_on_all_machines_is_harmless(tmp_path: Path) -> None:
    with netns.Lan(3) as lan:
        for machine in lan:
            machine.add_bridge("docker0", "172.17.0.1/16")
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        cluster.until(cluster.whole, 20)


def test_a_second_network_is_used_when_the_first_is_cut(tmp_path: Path) -> None:
    with netns.Lan(2) as lan:
        lan[0].add_wire(lan[1], "10.201.7")
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        cluster.until(cluster.whole, 20)
        time.sleep(SETTLED)
        marks = [len(member.history()) for member in cluster.members]
        lan[1].cut()
        # Longer than a link's timeout and than a suspicion lasts.
        time.sleep(2 * SETTLED)
        cluster.until(cluster.whole, 20)
        for member, mark in zip(cluster.members, marks, strict=True):
            assert all(line.live == cluster.names for line in member.history()[mark:])


def test_an_address_change_is_not_a_death(tmp_path: Path) -> None:
    with netns.Lan(3) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start("host=0.0.0.0")
        cluster.until(cluster.whole, 20)
        time.sleep(SETTLED)
        marks = [len(member.history()) for member in cluster.members]
        # In this order, since removing a network's primary address removes its other addresses too.
        lan[1].remove_address(f"{lan[1].address}/24")
        lan[1].add_address(f"{lan.network}.77/24")
        time.sleep(2 * SETTLED)
        cluster.until(cluster.whole, 20)
        for member, mark in zip(cluster.members, marks, strict=True):
            assert all(line.live == cluster.names for line in member.history()[mark:])


def test_a_cable_unplugged_for_a_moment_closes_no_connection(tmp_path: Path) -> None:
    with netns.Lan(2) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        cluster.until(cluster.whole, 20)
        marks = [len(member.history()) for member in cluster.members]
        lan[1].cut()
        time.sleep(1.5)
        lan[1].restore()
        time.sleep(SETTLED)
        for member, mark in zip(cluster.members, marks, strict=True):
            assert all(len(line.links) == 1 for line in member.history()[mark:])
            assert "lost the address" not in (tmp_path / f"{member.name}.out").read_text()
