"""A machine that changes to another cluster brings nothing of its former one along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sollold.cluster.admission import admission
from sollold.cluster.admission.orders import AdmitOrder, DoorOrder
from sollold.cluster.net.identity import Tokens
from sollold.cluster.net.rpc import PeerError
from tests.cluster.lan import Lan
from tests.doubles import until


@pytest.fixture
async def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lan]:
    """Two young clusters with two machines each; those of the second ask the first, whose door is closed."""
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.05)
    lan = Lan(tmp_path)
    first = await lan.start(0)
    await lan.start(1, 0)
    await until(lambda: lan.led(0, 1))
    for number in (0, 1):
        await first.calls.call(lan.running[number].me.node, "door", DoorOrder(0), bool, timeout=3)
    await lan.start(2)
    await lan.start(3, 2)
    await until(lambda: lan.led(2, 3))
    for number in (2, 3):
        found = lan.running[number].admission
        assert found is not None
        found.search.hear(("127.0.0.1", lan.ports[0]))
    await until(lambda: len(first.me.waiting) == 2)
    yield lan
    await lan.close()


async def admit(lan: Lan, number: int) -> None:
    """Admit a machine of the second cluster to the first, and wait until it is there."""
    first = lan.running[0]
    node = lan.running[number].me.node
    assert await first.calls.call(first.me.node, "admit", AdmitOrder(node), bool, timeout=3)
    await until(lambda: lan.ring(number).secret == lan.ring(0).secret)
    await until(lambda: lan.joined(0, 1, number))


async def test_the_former_peers_of_an_admitted_machine_are_not_admitted(lan: Lan) -> None:
    await admit(lan, 2)
    await asyncio.sleep(1.0)
    assert lan.ring(3).secret != lan.ring(0).secret
    for number in (0, 1, 2):
        assert lan.running[3].me.node not in lan.ring(number).known


async def test_the_former_peers_of_an_admitted_machine_lose_their_connections_to_it(lan: Lan) -> None:
    moved, former = lan.running[2], lan.running[3]
    order = DoorOrder(0)
    assert await former.calls.call(moved.me.node, "door", order, bool, timeout=3)  # its connection is kept
    await admit(lan, 2)
    with pytest.raises(PeerError):
        await former.calls.call(moved.me.node, "door", order, bool, timeout=3)


async def test_an_admitted_machine_admits_nobody_by_decisions_about_its_former_cluster(lan: Lan) -> None:
    moved = lan.running[2].admission
    assert moved is not None
    moved.open_for(3600)
    moved.invitations.invite()
    await admit(lan, 2)
    assert not moved.open_seconds and not moved.invitations.shown
    assert not lan.running[2].me.door_until and not lan.running[2].me.inviting


async def test_a_change_that_fails_at_first_is_completed_later(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making the new certificate fails once."""
    identity = lan.running[2]._identity
    change, failed = identity.change_tokens, 0

    def failing_once(tokens: Tokens) -> None:
        nonlocal failed
        if not failed:
            failed += 1
            raise OSError(24, "Too many open files")
        change(tokens)

    monkeypatch.setattr(identity, "change_tokens", failing_once)
    await admit(lan, 2)
    assert failed
