"""Calls to the leader from any node; `tests.serving.test_loader` tests its changes and failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sollold.cluster.gossip.term import Term
from sollold.errors import Fault, Refusal
from sollold.leader.client import LeaderClient
from sollold.leader.messages import Drop, Dropped, Ensure, Ensured, Verdict
from tests.doubles import until
from tests.leader.cluster import Cluster

ENSURE = Ensure("demo")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Node b leads, but the records name c, which redirects to b."""
    cluster = Cluster()
    for node in "abc":
        cluster.add(node, 0)
    cluster.term = Term(3, "c")
    cluster.nodes["c"].hook = answer_with(Ensured(Verdict.ELSEWHERE, leader="b"), Dropped(leader="b"))
    yield cluster


def answer_with(ensured: Ensured, dropped: Dropped) -> Callable[[str, object], Awaitable[object | None]]:
    async def hook(method: str, request: object) -> object | None:
        return {"ensure": ensured, "drop": dropped}.get(method)

    return hook


async def test_redirects_are_followed(cluster: Cluster) -> None:
    cluster.nodes["b"].hook = answer_with(Ensured(Verdict.USE, "x", "b"), Dropped(("x",)))
    client = LeaderClient(cluster, cluster)
    assert (await client.ensure(ENSURE, lambda message: None)).deployment == "x"
    assert (await client.unload(Drop("demo"))).ended == ("x",)
    assert [node for node, _, _ in cluster.calls_made] == ["c", "b", "c", "b"]


async def test_an_unreachable_leader_is_reported(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollold.leader.client.PATIENCE", 0.0)
    client = LeaderClient(cluster, cluster)
    del cluster.nodes["b"], cluster.nodes["c"]
    with pytest.raises(Refusal, match="the leader could not be reached") as refused:
        await client.unload(Drop("demo"))
    assert refused.value.fault is Fault.UNAVAILABLE
    cluster.term = Term()
    with pytest.raises(Refusal, match="no leader"):
        await client.unload(Drop("demo"))


async def test_an_unload_waits_for_the_next_leader(cluster: Cluster) -> None:
    cluster.nodes["b"].hook = answer_with(Ensured(Verdict.USE, "x", "b"), Dropped(("x",)))
    del cluster.nodes["c"]
    async with asyncio.TaskGroup() as group:
        unload = group.create_task(LeaderClient(cluster, cluster).unload(Drop("demo")))
        await until(lambda: bool(cluster.calls_made))
        cluster.term = Term()
        cluster.changed()
        await asyncio.sleep(0.01)
        assert not unload.done()
        cluster.term = Term(4, "b")
        cluster.changed()
    assert unload.result().ended == ("x",)
