"""Histories that everybody fears, one by one, with the times they may take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sollold.cluster.gossip.actions import Change, PersistedState
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.standing_link import SILENT_SECONDS

from .deployments import Deployments
from .world import Machine, Process, Weather, World

Told = list[tuple[float, str, Change, str]]


def cluster(machines: int, *, seed: int = 1, loss: float = 0.0, links: bool = True) -> World:
    """A cluster that has come together and has a leader."""
    world = World(seed, machines, links=links)
    world.weather = Weather(loss=loss, jitter=0.001)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    world.run_until(world.now + 10.0)
    return world


def listen(world: World) -> Told:
    """All changes from now on: (time, who tells, what, of whom), by machine name."""
    told: Told = []
    world.watch = lambda process, event: told.append(
        (world.now, process.machine.name, event.change, world.name(event.node))
    )
    return told


def others(world: World, *apart: Machine) -> list[Process]:
    return [process for process in world.running() if process.machine not in apart]


def until_all(world: World, limit: float, true: Callable[[Process], bool], *apart: Machine) -> float:
    """Seconds until ``true`` of every process but those apart."""
    began = world.now
    done = world.run_while(lambda: not all(true(one) for one in others(world, *apart)), limit, 0.02)
    assert done, f"not in {limit} s"
    return world.now - began


def split(world: World, one: list[Machine], *, back: bool = True) -> None:
    for here in one:
        for there in world.machines:
            if there not in one:
                world.cut.add((here.number, there.number))
                if back:
                    world.cut.add((there.number, here.number))


def leader(world: World) -> Machine:
    term = world.running()[0].gossip.known.leader()
    return next(machine for machine in world.machines if machine.node == term.leader)


@pytest.mark.parametrize("seed", range(10))
def test_a_machine_that_joins_is_known_to_all_at_once(seed: int) -> None:
    world = cluster(5, seed=seed, loss=0.05)
    machine = world.machines[2]
    machine.leave()
    world.run_until(world.now + 5.0)
    machine.start()
    machine.introduce_all()
    until_all(world, 2.0, lambda one: one.gossip.known.alive(machine.node), machine)
    assert world.run_while(lambda: bool(world.disagreement()), 3.0), world.disagreement()


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_daemon_is_known_everywhere_within_a_second(seed: int) -> None:
    world = cluster(5, seed=seed, loss=0.05)
    machine = world.machines[seed % 5]
    machine.crash()
    assert until_all(world, 1.0, lambda one: not one.gossip.known.alive(machine.node)) <= 1.0


@pytest.mark.parametrize("machines", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_cut_cable_is_known_within_six_seconds(machines: int, seed: int) -> None:
    world = cluster(machines, seed=seed)
    machine = world.machines[seed % machines]
    split(world, [machine])
    until_all(world, 6.0, lambda one: not one.gossip.known.alive(machine.node), machine)


@pytest.mark.parametrize("seed", range(10))
def test_a_dead_leader_is_followed_within_three_seconds_of_its_detection(seed: int) -> None:
    world = cluster(5, seed=seed)
    dead = leader(world)
    dead.crash()
    until_all(world, 1.0, lambda one: not one.gossip.known.alive(dead.node))
    until_all(world, 3.0, lambda one: one.gossip.known.leader().leader not in ("", dead.node))
    world.run_until(world.now + 1.0)
    assert len({one.gossip.known.leader() for one in world.running()}) == 1


def test_a_machine_that_joins_unseats_nobody() -> None:
    world = cluster(4)
    first = world.machines[0]
    assert leader(world) is first
    first.leave()
    world.run_until(world.now + 5.0)
    term = world.running()[0].gossip.known.leader()
    first.start()
    first.introduce_all()
    world.run_until(world.now + 10.0)
    assert {one.gossip.known.leader() for one in world.running()} == {term}


def test_two_halves_that_meet_keep_the_higher_term() -> None:
    world = cluster(5)
    apart = world.machines[:2]
    split(world, apart)
    world.run_until(world.now + 30.0)
    terms = {one.gossip.known.leader() for one in world.running()}
    assert len(terms) == 2
    world.cut.clear()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()
    assert {one.gossip.known.leader() for one in world.running()} == {max(terms)}


def test_two_clusters_that_never_met_become_one() -> None:
    world = World(1, 6)
    left, right = world.machines[:3], world.machines[3:]
    for side in (left, right):
        for machine in side:
            process = machine.start()
            process.apply(
                process.gossip.introduce((side[0].address,), process.clock(), keep=True),
            )
    world.run_until(20.0)
    assert len({one.gossip.known.leader() for one in world.running()}) == 2
    process = left[1].process
    assert process is not None
    process.apply(process.gossip.introduce((right[1].address,), process.clock()))
    assert world.run_while(lambda: bool(world.disagreement()), 10.0), world.disagreement()


def test_one_that_was_cut_off_makes_nobody_doubt_the_others() -> None:
    for seed in range(5):
        world = cluster(6, seed=seed)
        lonely = world.machines[3]
        split(world, [lonely])
        world.run_until(world.now + 60.0)
        world.cut.clear()
        told = listen(world)
        world.run_until(world.now + 30.0)
        wrong = [one for one in told if one[2] is Change.DIED and one[1] != lonely.name]
        assert not wrong
        assert not world.disagreement()


def test_a_leader_that_stands_still_longer_than_anything_lasts_steps_down() -> None:
    world = cluster(4)
    old = leader(world)
    term = world.running()[0].gossip.known.leader()
    process = old.process
    assert process is not None
    process.stop()
    world.run_until(world.now + 120.0)
    process.go_on()
    assert world.run_while(lambda: bool(world.disagreement()), 10.0), world.disagreement()
    assert process.gossip.known.leader() > term
    assert leader(world) is not old


def test_a_clock_that_jumps_kills_nobody() -> None:
    world = cluster(4)
    told = listen(world)
    for seconds in (2.0, 60.0, 1e6):
        for process in world.running():
            process.jump(seconds)
            world.run_until(world.now + 7.0)
    assert not [one for one in told if one[2] is Change.DIED]


def test_a_goodbye_is_no_death() -> None:
    world = cluster(5)
    told = listen(world)
    world.machines[1].leave()
    until_all(world, 1.0, lambda one: not one.gossip.known.alive(world.machines[1].node), world.machines[1])
    world.run_until(world.now + 30.0)
    assert {one[2] for one in told if one[3] == "m2"} == {Change.LEFT}


def test_another_address_is_no_death() -> None:
    world = cluster(4)
    told = listen(world)
    world.machines[2].renumber()
    world.run_until(world.now + 30.0)
    assert not [one for one in told if one[2] is Change.DIED]
    assert not world.disagreement()


@pytest.mark.parametrize("keep", [True, False])
def test_a_power_cut_is_survived(keep: bool) -> None:
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


def test_restarts_one_after_another_leave_one_leader_and_no_dead() -> None:
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


def test_a_way_that_is_closed_in_one_direction_is_survived() -> None:
    world = cluster(5)
    split(world, [world.machines[1]], back=False)
    world.run_until(world.now + 60.0)
    world.cut.clear()
    assert world.run_while(lambda: bool(world.disagreement()), 15.0), world.disagreement()


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_loss_kills_nobody(loss: float) -> None:
    world = cluster(8, loss=loss, links=False)
    told = listen(world)
    world.run_until(world.now + 300.0)
    assert not [one for one in told if one[2] is Change.DIED]


def test_a_slow_machine_is_not_dead_and_kills_nobody() -> None:
    world = cluster(10, links=False)
    process = world.machines[4].process
    assert process is not None
    process.lateness = 0.5
    told = listen(world)
    world.run_until(world.now + 300.0)
    assert not [one for one in told if one[2] is Change.DIED]


@pytest.mark.parametrize("machines", [2, 3, 5])
@pytest.mark.parametrize("lateness", [0.0, 0.3, 0.6, 0.9])
def test_a_link_that_breaks_kills_nobody_who_lives(machines: int, lateness: float) -> None:
    world = cluster(machines)
    late = world.machines[-1]
    assert late.process is not None
    late.process.lateness = lateness
    world.run_until(world.now + 20.0)
    told = listen(world)
    for _ in range(20):
        world.random.choice(world.machines[:-1]).break_link(late)
        world.run_until(world.now + 8.0)
    assert not [one for one in told if one[2] is Change.DIED]


@pytest.mark.parametrize("machines", [2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_a_cut_cable_is_known_soon_after_the_links_fell_silent(machines: int, seed: int) -> None:
    world = cluster(machines, seed=seed)
    machine = world.machines[seed % machines]
    split(world, [machine])
    world.run_until(world.now + SILENT_SECONDS)
    for other in world.machines:
        if other is not machine:
            machine.break_link(other)
    until_all(world, 1.9, lambda one: not one.gossip.known.alive(machine.node), machine)


@pytest.mark.parametrize("seconds", [5.0, 20.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_slow_disk_kills_nobody(seconds: float, seed: int) -> None:
    world = cluster(5, seed=seed, links=False)
    machine = world.machines[2]
    machine.disk_seconds = seconds
    told = listen(world)
    accuser = world.machines[0].process
    assert accuser is not None
    # To refute it the accused raises its incarnation, which is kept on disk.
    accuser.gossip._membership.suspect(machine.node, accuser.clock())
    world.run_until(world.now + 40.0)
    assert (accuser.machine.name, Change.CLEARED, machine.name) in {one[1:] for one in told}
    assert not [one for one in told if one[2] is Change.DIED]


def test_who_can_not_write_its_claim_does_not_lead_and_lives_on() -> None:
    world = cluster(4)
    dead = leader(world)
    first, second = (machine for machine in world.machines[:3] if machine is not dead)
    first.disk_seconds = 60.0
    told = listen(world)
    dead.crash()
    until_all(world, 6.0, lambda one: one.gossip.known.leader().leader == second.node)
    world.run_until(world.now + 120.0)
    assert leader(world) is second
    assert {one[3] for one in told if one[2] is Change.DIED} == {dead.name}


def test_twenty_splits_end_with_one_leader_and_every_grant_in_order() -> None:
    world = World(5, 5)
    deployments = Deployments(world)
    for machine in world.machines:
        machine.start()
        machine.introduce_all()
    world.run_until(10.0)
    for turn in range(20):
        apart = world.random.sample(world.machines, 2)
        split(world, apart)
        world.run_until(world.now + world.random.choice((3.0, 12.0)))
        world.cut.clear()
        deployments.frozen = True
        quiet = world.run_while(lambda: bool(world.disagreement() or deployments.strays()), 25.0)
        assert quiet, f"{turn}: {world.disagreement() or deployments.strays()}"
        deployments.frozen = False
        world.run_until(world.now + 5.0)


def test_the_leader_s_death_ends_no_deployment_of_others() -> None:
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
    assert not deployments.strays()
