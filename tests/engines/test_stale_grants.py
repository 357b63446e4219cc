"""What a head that was killed and started again has left at others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sollold.cluster.gossip.record import Grant, GrantState
from sollold.engines.commands import Done, Release
from sollold.engines.llamacpp.stale_grants import StaleGrants
from tests.doubles import FakeView, record


class Owners:
    """Answers no call before ``free`` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Release]] = []
        self.free = asyncio.Event()

    async def call(self, node: str, method: str, request: Release, reply: type, *, timeout: float) -> Any:
        assert method == "release" and timeout > 0
        self.asked.append((node, request))
        await self.free.wait()
        return Done(True)


def grant(deployment: str, head: str = "me", state: GrantState = GrantState.COMMITTED) -> Grant:
    return Grant(deployment, "cpu", 1 << 20, head, state)


async def test_grants_that_only_an_earlier_run_can_have_are_given_back_once() -> None:
    view, owners = FakeView(record("me")), Owners()
    strays = StaleGrants(view, owners)  # type: ignore[arg-type]
    strays.register_own("ours")
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
        strays.release_stale()
        await asyncio.sleep(0)
    assert [(node, one.deployment, one.head) for node, one in owners.asked] == [("b", "old", "me")]
    # It may come again: another owner of the same deployment, say.
    view.world.records["c"] = replace(record("c"), grants=(grant("old"),))
    owners.free.set()
    strays.release_stale()
    await asyncio.sleep(0)
    assert [node for node, _ in owners.asked] == ["b", "c"]
    await strays.close()
    assert not strays._tasks


async def test_the_end_waits_for_no_owner() -> None:
    view, owners = FakeView(record("me")), Owners()
    strays = StaleGrants(view, owners)  # type: ignore[arg-type]
    view.world.records["b"] = record("b", grants=(grant("old"),))
    strays.release_stale()
    await asyncio.sleep(0)
    await strays.close()
    assert owners.asked and not strays._tasks
