"""Scenarios of single faults, with limits on the recovery time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sollold.cluster.gossip.actions import Change, PersistedState
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.standing_link import SILENT_SECONDS

from .deployments import Deployments
from .world import Machine, Process, Weather, World

Events = list[tuple[float, str, Change, str]]


def cluster(machines: int, *, seed: int = 1, loss: float = 0.0, links: bool = True) -> World:
    """A cluster that has formed and has a leader."""
    world = World(seed, machines, links=links)
    world.weather = Weather(loss=loss, jitter=0.001)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    world.run_until(world.now + 10.0)
    return world


def listen(world: World) -> Events:
    """All changes from now on: (time, observing machine, change, changed machine)."""
    events: Events = []
    world.watch = lambda process, event: events.append(
        (world.now, process.machine.name, event.change, world.name(event.node))
    )
    return events


def others(world: World, *excluded: Machine) -> list[Process]:
    return [process for process in world.running() if process.machine not in excluded]


def until_all(world: World, limit: float, condition: Callable[[Process], bool], *excluded: Machine) -> float:
    """Run until ``condition`` holds for all but the excluded processes; return the seconds that took."""
    began = world.now
    done = world.run_while(
        lambda: not all(condition(process) for process in others(world, *excluded)), limit, 0.02
    )
    assert done, f"not in {limit} s"
    return world.now - began


def split(world: World, side: list[Machine], *, both: bool = True) -> None:
    for here in side:
        for there in world.machines:
            if there not in side:
                world.cut.add((here.number, there.number))
                if both:
                    world.cut.add((there.number, here.number))


def leader(world: World) -> Machine:
    term = world.running()[0].gossip.known.leader()
    return next(machine for machine in world.machines if machine.node == term.leader)


@pytest.mark.parametrize("seed", range(10))
def test_a_joining_machine_is_seen_by_all_within_two_seconds(seed: int) -> None:
    world = cluster(5, seed=seed, loss=0.05)
    machine = world.machines[2]
    machine.leave()
    world.run_until(world.now + 5.0)
    machine.start()
    machine.introduce_all()
    until_all(world, 2.0, lambda process: process.gossip.known.alive(machine.node), machine)
    assert world.run_while(lambda: bool(world.disagreement()), 3.0), world.disagreement()


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_daemon_is_found_dead_by_all_within_a_second(seed: int) -> None:
    world = cluster(5, seed=seed, loss=0.05)
    machine = world.machines[seed % 5]
    machine.crash()
    assert until_all(world, 1.0, lambda process: not process.gossip.known.alive(machine.node)) <= 1.0


@pytest.mark.parametrize("machines", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_cut_cable_is_detected_within_six_seconds(machines: int, seed: int) -> None:
    world = cluster(machines, seed=seed)
    machine = world.machines[seed % machines]
    split(world, [machine])
    until_all(world, 6.0, lambda process: not process.gossip.known.alive(machine.node), machine)


@pytest.mark.parametrize("seed", range(10))
def test_a_dead_leader_is_replaced_within_three_seconds_of_its_detection(seed: int) -> None:
    world = cluster(5, seed=seed)
    dead = leader(world)
    dead.crash()
    until_all(world, 1.0, lambda process: not process.gossip.known.alive(dead.node))
    until_all(world, 3.0, lambda process: process.gossip.known.leader().leader not in ("", dead.node))
    world.run_until(world.now + 1.0)
    assert len({process.gossip.known.leader() for process in world.running()}) == 1


def test_a_joining_machine_does_not_replace_the_leader() -> None:
    world = cluster(4)
    first = world.machines[0]
    assert leader(world) is first
    first.leave()
    world.run_until(world.now + 5.0)
    term = world.running()[0].gossip.known.leader()
    first.start()
    first.introduce_all()
    world.run_until(world.now + 10.0)
    assert {process.gossip.known.leader() for process in world.running()} == {term}


def test_the_higher_term_survives_a_partition() -> None:
    world = cluster(5)
    side = world.machines[:2]
    split(world, side)
    world.run_until(world.now + 30.0)
    terms = {process.gossip.known.leader() for process in world.running()}
    assert len(terms) == 2
    world.cut.clear()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    assert {process.gossip.known.leader() for process in world.running()} == {max(terms)}


def test_two_separate_clusters_merge() -> None:
    world = World(1, 6)
    left, right = world.machines[:3], world.machines[3:]
    for side in (left, right):
        for machine in side:
            process = machine.start()
            process.apply(
                process.gossip.introduce((side[0].address,), process.clock(), keep=True),
            )
    world.run_until(20.0)
    assert len({process.gossip.known.leader() for process in world.running()}) == 2
    meeting = left[1].process
    assert meeting is not None
    meeting.apply(meeting.gossip.introduce((right[1].address,), meeting.clock()))
    assert world.run_while(lambda: bool(world.disagreement()), 10.0), world.disagreement()


def test_an_isolated_machine_causes_no_deaths_when_it_returns() -> None:
    for seed in range(5):
        world = cluster(6, seed=seed)
        isolated = world.machines[3]
        split(world, [isolated])
        world.run_until(world.now + 60.0)
        world.cut.clear()
        events = listen(world)
        world.run_until(world.now + 30.0)
        wrong = [event for event in events if event[2] is Change.DIED and event[1] != isolated.name]
        assert not wrong
        assert not world.disagreement()


def test_a_leader_that_was_stopped_for_minutes_steps_down() -> None:
    world = cluster(4)
    old = leader(world)
    term = world.running()[0].gossip.known.leader()
    process = old.process
    assert process is not None
    process.stop()
    world.run_until(world.now + 120.0)
    process.resume()
    assert world.run_while(lambda: bool(world.disagreement()), 10.0), world.disagreement()
    assert process.gossip.known.leader() > term
    assert leader(world) is not old


def test_a_clock_jump_causes_no_deaths() -> None:
    world = cluster(4)
    events = listen(world)
    for seconds in (2.0, 60.0, 1e6):
        for process in world.running():
            process.jump(seconds)
            world.run_until(world.now + 7.0)
    assert not [event for event in events if event[2] is Change.DIED]


def test_leaving_is_not_a_death() -> None:
    world = cluster(5)
    events = listen(world)
    world.machines[1].leave()
    until_all(
        world, 1.0, lambda process: not process.gossip.known.alive(world.machines[1].node), world.machines[1]
    )
    world.run_until(world.now + 30.0)
    assert {event[2] for event in events if event[3] == "m2"} == {Change.LEFT}


def test_an_address_change_is_not_a_death() -> None:
    world = cluster(4)
    events = listen(world)
    world.machines[2].renumber()
    world.run_until(world.now + 30.0)
    assert not [event for event in events if event[2] is Change.DIED]
    assert not world.disagreement()


@pytest.mark.parametrize("keep", [True, False])
def test_a_cluster_recovers_from_a_power_cut(keep: bool) -> None:
    world = cluster(5)
    term = world.running()[0].gossip.known.leader()
    for machine in world.machines:
        machine.crash("the power is out")
        if not keep:
            machine.kept = PersistedState()
    world.run_until(world.now + 5.0)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    assert world.run_while(lambda: bool(world.disagreement()), 10.0), world.disagreement()
    if keep:
        assert world.running()[0].gossip.known.leader() > term


def test_a_rolling_restart_leaves_one_leader_and_no_dead_nodes() -> None:
    world = cluster(5)
    seen: list[Term] = []
    for machine in world.machines:
        machine.crash("restarted")
        machine.start()
        machine.introduce_all()
        world.run_until(world.now + 8.0)
        assert not world.disagreement()
        seen.append(world.running()[0].gossip.known.leader())
    assert seen == sorted(seen)


def test_a_cluster_recovers_from_a_one_way_partition() -> None:
    world = cluster(5)
    split(world, [world.machines[1]], both=False)
    world.run_until(world.now + 60.0)
    world.cut.clear()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_datagram_loss_causes_no_deaths(loss: float) -> None:
    world = cluster(8, loss=loss, links=False)
    events = listen(world)
    world.run_until(world.now + 300.0)
    assert not [event for event in events if event[2] is Change.DIED]


@pytest.mark.parametrize("gets", [True, False])
@pytest.mark.parametrize("loss", [0.5, 1.0])
def test_a_machine_that_loses_datagrams_in_one_direction_causes_no_deaths(loss: float, gets: bool) -> None:
    world = cluster(4)
    bad = world.machines[0]
    for other in world.machines[1:]:
        world.lossy[(other.number, bad.number) if gets else (bad.number, other.number)] = loss
    events = listen(world)
    world.run_until(world.now + 120.0)
    assert not [event for event in events if event[2] in (Change.DIED, Change.LEADER)]
    assert not world.disagreement()


@pytest.mark.parametrize(("down", "up"), [(0.3, 0.7), (1.0, 2.0)])
def test_a_flapping_port_of_the_leader_causes_no_deaths(down: float, up: float) -> None:
    world = cluster(4)
    events = listen(world)
    for _ in range(40):
        split(world, [leader(world)])
        world.run_until(world.now + down)
        world.cut.clear()
        world.run_until(world.now + up)
    assert not [event for event in events if event[2] in (Change.DIED, Change.LEADER)]
    assert not world.disagreement()


def test_a_slow_machine_causes_no_deaths() -> None:
    world = cluster(10, links=False)
    process = world.machines[4].process
    assert process is not None
    process.lateness = 0.5
    events = listen(world)
    world.run_until(world.now + 300.0)
    assert not [event for event in events if event[2] is Change.DIED]


@pytest.mark.parametrize("machines", [2, 3, 5])
@pytest.mark.parametrize("lateness", [0.0, 0.3, 0.6, 0.9])
def test_broken_links_cause_no_deaths(machines: int, lateness: float) -> None:
    world = cluster(machines)
    late = world.machines[-1]
    assert late.process is not None
    late.process.lateness = lateness
    world.run_until(world.now + 20.0)
    events = listen(world)
    for _ in range(20):
        world.random.choice(world.machines[:-1]).break_link(late)
        world.run_until(world.now + 8.0)
    assert not [event for event in events if event[2] is Change.DIED]


@pytest.mark.parametrize("machines", [2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_cut_cable_is_detected_soon_after_the_links_time_out(machines: int, seed: int) -> None:
    world = cluster(machines, seed=seed)
    machine = world.machines[seed % machines]
    split(world, [machine])
    world.run_until(world.now + SILENT_SECONDS)
    for other in world.machines:
        if other is not machine:
            machine.break_link(other)
    until_all(world, 1.9, lambda process: not process.gossip.known.alive(machine.node), machine)


@pytest.mark.parametrize("seconds", [5.0, 20.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_slow_disk_causes_no_deaths(seconds: float, seed: int) -> None:
    world = cluster(5, seed=seed, links=False)
    machine = world.machines[2]
    machine.disk_seconds = seconds
    events = listen(world)
    accuser = world.machines[0].process
    assert accuser is not None
    # The suspect refutes by raising its incarnation, which is saved to disk.
    accuser.gossip._membership.suspect(machine.node, accuser.clock())
    world.run_until(world.now + 40.0)
    assert (accuser.machine.name, Change.CLEARED, machine.name) in {event[1:] for event in events}
    assert not [event for event in events if event[2] is Change.DIED]


def test_a_node_that_cannot_save_its_claim_does_not_lead() -> None:
    world = cluster(4)
    dead = leader(world)
    first, second = (machine for machine in world.machines[:3] if machine is not dead)
    first.disk_seconds = 60.0
    events = listen(world)
    dead.crash()
    until_all(world, 6.0, lambda process: process.gossip.known.leader().leader == second.node)
    world.run_until(world.now + 120.0)
    assert leader(world) is second
    assert {event[3] for event in events if event[2] is Change.DIED} == {dead.name}


def test_twenty_partitions_end_with_one_leader_and_exact_grants() -> None:
    world = World(5, 5)
    deployments = Deployments(world)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    world.run_until(10.0)
    for turn in range(20):
        side = world.random.sample(world.machines, 2)
        split(world, side)
        world.run_until(world.now + world.random.choice((3.0, 12.0)))
        world.cut.clear()
        deployments.frozen = True
        consistent = world.run_while(lambda: bool(world.disagreement() or deployments.inconsistency()), 25.0)
        assert consistent, f"{turn}: {world.disagreement() or deployments.inconsistency()}"
        deployments.frozen = False
        world.run_until(world.now + 5.0)


def test_the_death_of_the_leader_ends_no_deployment_of_others() -> None:
    world = World(3, 5)
    deployments = Deployments(world)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    world.run_until(8.0)
    deployments.frozen = True
    world.run_until(12.0)
    dead = leader(world)
    before = {
        name
        for agent in deployments.agents.values()
        for name, headed in agent.headed.items()
        if agent.node != dead.node and dead.node not in headed.owners
    }
    assert before
    dead.crash()
    world.run_until(world.now + 30.0)
    after = {name for agent in deployments.agents.values() for name in agent.headed}
    assert before <= after
    assert not deployments.inconsistency()
