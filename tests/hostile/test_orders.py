"""A node accepts orders only from the leader, whatever the sender claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Commit, Deploy, Done, Release, Renew, Reserve, Unload
from sollold.engines.install.find import Llama
from sollold.models.model import Model
from sollold.settings.schema import MIB
from tests.agent_cluster import TERM, plan, running_agents

NO_LLAMA = Llama(Path("/nowhere/llama-server"), Path("/nowhere/ggml-rpc-server"), "b1", frozenset())
MODEL = Model("m:latest", "d" * 64, "folder", ("/m.gguf",), 1, 0.0, layers=6)
HUGE = 2**62 - 1


async def test_orders_of_a_member_in_the_leaders_name_are_refused(folder: Path) -> None:
    async with running_agents(folder, NO_LLAMA, "a") as cluster:
        ask = Reserve(TERM, "d", "liar", {"CPU": MIB})
        assert not (await cluster.call("liar", "a", "reserve", ask)).ok
        assert cluster.agents["a"].grants.ledger.grants() == ()
        await cluster.reserve("d", plan(MODEL, "a"))
        for order in (
            ("deploy", Deploy(TERM, "d", plan(MODEL, "a"), -1.0)),
            ("unload", Unload(TERM, "d", force=True)),
            ("release", Release(TERM, "d", "a")),
            ("renew", Renew("d", "a")),
            ("commit", Commit("d", "a", ("CPU",), "b1")),
        ):
            done = await cluster.call("liar", "a", *order)
            assert not done.ok and "liar" in done.reason
        assert {grant.deployment for grant in cluster.agents["a"].grants.ledger.grants()} == {"d"}


@pytest.mark.parametrize("counter", [HUGE, 2**40, TERM.counter + 2**21])
async def test_an_impossible_term_is_refused_and_not_stored(folder: Path, counter: int) -> None:
    async with running_agents(folder, NO_LLAMA, "a") as cluster:
        # The view knows the leader; the ledger has not seen any term yet.
        lie = Term(counter, "liar")
        for method, request in (
            ("release", Release(lie, "x", "x")),
            ("unload", Unload(lie, "x")),
            ("reserve", Reserve(lie, "x", "x", {"CPU": MIB})),
        ):
            await cluster.call("liar", "a", method, request)
        assert (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))).ok
    async with running_agents(folder, NO_LLAMA, "a") as cluster:
        done: Done = await cluster.call("l", "a", "unload", Unload(TERM, "d"))
        assert done.ok


async def test_a_poisoned_term_on_disk_is_forgotten(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = folder / "a/state"
    state.mkdir(parents=True)
    (state / "term.json").write_text(f'{{"counter": {HUGE}, "leader": "liar"}}')
    async with running_agents(folder, NO_LLAMA, "a") as cluster:
        assert (await cluster.call("l", "a", "reserve", Reserve(TERM, "d", "b", {"CPU": MIB}))).ok
    assert "which is impossible" in caplog.text
