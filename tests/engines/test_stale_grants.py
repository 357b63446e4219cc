"""Grants on other nodes that an earlier run of a killed head left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sollold.cluster.gossip.record import Grant, GrantState
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import Done, Release
from sollold.engines.llamacpp.stale_grants import _MAX_DEPLOYMENTS, StaleGrants
from tests.doubles import FakeView, record, until


class Owners(RpcClient):
    """Calls to owners, answered only after ``free`` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Release]] = []
        self.free = asyncio.Event()

    async def call(self, node: str, method: str, request: object, reply: type[Any], *, timeout: float) -> Any:
        assert method == "release" and isinstance(request, Release) and timeout > 0
        self.asked.append((node, request))
        await self.free.wait()
        return Done(True)


def grant(deployment: str, head: str = "me", state: GrantState = GrantState.COMMITTED) -> Grant:
    return Grant(deployment, "cpu", 1 << 20, head, state)


async def test_grants_of_an_earlier_run_are_released_once() -> None:
    view, owners = FakeView(record("me")), Owners()
    stale_grants = StaleGrants(view, owners)
    stale_grants.register_own("ours")
    view.world.records["b"] = record(
        "b",
        grants=(
            grant("old"),
            grant("ours"),
            grant("planned", state=GrantState.RESERVED),
            grant("another's", head="c"),
        ),
    )
    for _ in range(3):
        stale_grants.release_stale()
        await asyncio.sleep(0)
    assert [(node, request.deployment, request.head) for node, request in owners.asked] == [
        ("b", "old", "me")
    ]
    # Another owner of the same deployment may appear later.
    view.world.records["c"] = replace(record("c"), grants=(grant("old"),))
    owners.free.set()
    stale_grants.release_stale()
    await asyncio.sleep(0)
    assert [node for node, _ in owners.asked] == ["b", "c"]
    await stale_grants.close()
    await until(lambda: not stale_grants._tasks)


async def test_grants_of_a_deployment_older_than_many_others_are_kept() -> None:
    view, owners = FakeView(record("me")), Owners()
    stale_grants = StaleGrants(view, owners)
    stale_grants.register_own("pinned")
    view.world.records["b"] = record("b", grants=(grant("pinned"),))
    for number in range(3 * _MAX_DEPLOYMENTS):
        stale_grants.register_own(f"d{number}")
        stale_grants.release_stale()
    await asyncio.sleep(0)
    assert not owners.asked
    assert len(stale_grants._own) == _MAX_DEPLOYMENTS
    await stale_grants.close()


async def test_closing_does_not_wait_for_owners() -> None:
    view, owners = FakeView(record("me")), Owners()
    stale_grants = StaleGrants(view, owners)
    view.world.records["b"] = record("b", grants=(grant("old"),))
    stale_grants.release_stale()
    await asyncio.sleep(0)
    await stale_grants.close()
    assert owners.asked and not stale_grants._tasks
