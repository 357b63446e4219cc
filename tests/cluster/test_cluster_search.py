"""The search for a cluster to join: which machines are contacted, and what may change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sollold.cluster.admission import search
from sollold.cluster.admission.exchange import AdmissionState, Answer
from sollold.cluster.admission.keyring import Keyring
from sollold.cluster.admission.policy import Standing, standing_of
from sollold.cluster.admission.search import _MAX_CANDIDATES, ClusterSearch
from sollold.cluster.gossip.actions import Address
from tests.keys import key

ME, MEMBER = key(0), key(1)
THERE: Address = ("10.0.0.1", 11436)


def group(number: int) -> tuple[Address, ...]:
    return ((f"10.1.{number // 250}.{number % 250 + 1}", 11436),)


@dataclass
class World:
    """A search by a new machine, and an established cluster's member at `THERE`."""

    monkeypatch: pytest.MonkeyPatch
    ring: Keyring = field(default_factory=lambda: Keyring.found(ME.node))
    groups: list[tuple[Address, ...]] = field(default_factory=lambda: [(THERE,)])
    state: AdmissionState = AdmissionState.ADMITTED
    contacted: list[Address] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    while_greeted: Callable[[], None] = lambda: None
    while_asked: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.monkeypatch.setattr(search, "greeted", self._greeted)
        self.monkeypatch.setattr(search, "ask", self._ask)
        self.search = ClusterSearch(
            ME,
            "me",
            ring=lambda: self.ring,
            reach=None,  # type: ignore[arg-type]
            port=lambda: 11436,
            candidates=lambda: self.groups,
            present=frozenset,
            announced=lambda nodes: False,
            got=self._got,
            changed=lambda: None,
        )

    async def look(self) -> None:
        await self.search.look(standing_of(self.ring, ME.node, "me", True))

    async def _greeted(
        self, reach: Any, port: int, addresses: Sequence[Address]
    ) -> tuple[Standing, Address] | None:
        self.contacted.append(addresses[0])
        if addresses[0] != THERE:
            return None
        self.while_greeted()
        return Standing(MEMBER.node, "member", "there", MEMBER.node, 1e6, False, True), THERE

    async def _ask(self, reach: Any, own: Any, name: str, port: int, member: str, address: Address) -> Answer:
        self.asked.append(member)
        self.while_asked()
        return Answer(self.state, "ab" * 32, MEMBER.node, 1e6)

    async def _got(
        self, node: str, name: str, address: Address, ring: Keyring, newer: bool, before: Keyring | None
    ) -> None:
        self.joined.append(node)

    def admit_another(self) -> None:
        self.ring = replace(self.ring, alone=False)


async def test_a_new_machine_joins_an_established_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    await world.look()
    assert world.joined == [MEMBER.node]


async def test_every_one_of_many_candidates_is_contacted_sooner_or_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, groups=[*(group(number) for number in range(100)), (THERE,)])
    for _ in range(200):
        before = len(world.contacted)
        await world.look()
        assert len(world.contacted) - before <= _MAX_CANDIDATES
    assert len(set(world.contacted)) == 101 and world.joined


async def test_the_machine_where_it_waits_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, state=AdmissionState.WAITING)
    await world.look()
    world.groups = [*(group(number) for number in range(100)), (THERE,)]
    for _ in range(5):
        await world.look()
    assert len(world.asked) == 6


@pytest.mark.parametrize("moment", ["while_greeted", "while_asked"])
async def test_a_machine_that_admitted_another_meanwhile_does_not_leave_it(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    world = World(monkeypatch)
    setattr(world, moment, world.admit_another)
    await world.look()
    assert not world.joined


async def test_one_machine_does_not_crowd_out_others_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, groups=[])
    for port in range(1, 2 * _MAX_CANDIDATES):
        world.search.hear(("10.0.0.66", port))
    world.search.hear(THERE)
    await world.look()
    assert THERE in world.contacted and world.joined == [MEMBER.node]
