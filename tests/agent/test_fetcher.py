"""The head-to-be gets a file: from other nodes alone, while somebody waits for it, where there is room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sollold.agent import fetcher
from sollold.agent.fetcher import Fetcher
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Fetch, Fetched
from sollold.models.model import Model
from sollold.models.transfer.partial_file import PartialFile
from sollold.settings.schema import GIB
from tests.doubles import until
from tests.models.pulling import PART, Node, ThreeNodes, big, unfinished

TERM = Term(1, "l")


@pytest.fixture
async def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ThreeNodes]:
    monkeypatch.setattr(PartialFile.__init__, "__defaults__", (PART,))
    monkeypatch.setattr(fetcher, "LEFT", 0)
    three = ThreeNodes(tmp_path)
    yield three
    for node in three.nodes:
        await node.close()


def fetching(node: Node, *, allowed: bool = True, refusal: str = "") -> Fetcher:
    async def obey(caller: str, term: Term) -> str:
        return refusal

    made = Fetcher(
        node.puller,
        lambda digest: node.catalogue.with_digest(digest) is not None,
        obey,
        node.catalogue.own,
        allowed,
    )
    made.register(node.server)  # type: ignore[arg-type]
    return made


async def order(three: ThreeNodes, digest: str) -> Fetched:
    """What a says to b's order."""
    b = three.nodes[1]
    return await b.calls.call("a", "fetch", Fetch(TERM, "tiny:F16", digest), Fetched, timeout=1.0)


async def until_told(three: ThreeNodes, digest: str, told: Callable[[Fetched], object]) -> Fetched:
    """Order it again and again, as the leader does, until what a says is what is waited for."""
    for _ in range(1000):
        state = await order(three, digest)
        if told(state):
            return state
        assert not state.failed and not state.done, state
        await asyncio.sleep(0.01)
    raise AssertionError("it never said so")


async def known(three: ThreeNodes) -> str:
    """The digest of ``tiny``, which b has and a knows of."""
    a = three.nodes[0]
    await three.start()
    await until(lambda: a.library.find("tiny"))
    return a.library.find("tiny")[0][1].digest


async def test_it_comes_and_the_leader_hears_how_far_it_is(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny-F16.gguf")
    fetching(a)
    digest = await known(three)
    gate = asyncio.Event()

    async def wait(request: object) -> None:
        await gate.wait()

    b.server.fault = wait
    assert await order(three, digest) == Fetched()
    state = await until_told(three, digest, lambda state: state.total)
    assert state == Fetched(completed=0, total=path.stat().st_size)
    gate.set()
    await until_told(three, digest, lambda state: state.done)
    model = a.catalogue.with_digest(digest)
    assert model is not None and model.source == "own"
    assert await asyncio.to_thread(Path(model.files[0]).read_bytes) == path.read_bytes()
    assert (await order(three, digest)).done, "and what is there is not fetched again"


async def test_what_nobody_asks_about_any_more_is_given_up(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "UNASKED_SECONDS", -1.0)
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    made = fetching(a)
    digest = await known(three)
    assert await order(three, digest) == Fetched()
    (fetch,) = made._fetches.values()
    await until(lambda: fetch.failed)
    await until(lambda: not a.puller._pulls, story=lambda: "it runs on behind it")
    assert (await order(three, digest)).failed == "no request needs it any more"
    assert a.catalogue.with_digest(digest) is None


async def test_an_order_ends_it_at_once_and_what_has_come_is_kept(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    made = fetching(a)
    digest = await known(three)

    async def hang(request: object) -> None:
        await asyncio.Event().wait()

    b.server.fault = hang
    await until_told(three, digest, lambda state: state.total)
    stop = Fetch(TERM, "tiny:F16", digest, stop=True)
    told = await b.calls.call("a", "fetch", stop, Fetched, timeout=1.0)
    assert told.failed == "its load was cancelled"
    assert not made._fetches and not a.puller._pulls
    assert (await b.calls.call("a", "fetch", stop, Fetched, timeout=1.0)).failed
    assert not made._fetches, "a stop begins nothing"


@pytest.mark.parametrize(
    ("left", "allowed", "refusal", "words"),
    [
        (1 << 60, True, "", "no space for"),
        (0, False, "", "models.fetch_seconds is 0 on this node"),
        (0, True, "the term is over", "the term is over"),
    ],
)
async def test_a_node_may_refuse(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch, left: int, allowed: bool, refusal: str, words: str
) -> None:
    monkeypatch.setattr(fetcher, "LEFT", left)
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    fetching(a, allowed=allowed, refusal=refusal)
    digest = await known(three)
    assert words in (await order(three, digest)).failed
    assert not unfinished(a)


class Endless:
    """Fetches models of 10 GiB each, and never ends."""

    def __init__(self, *steps: dict[str, Any], error: Exception | None = None) -> None:
        self.steps = steps
        self.error = error

    def holders(self, name: str) -> tuple[tuple[str, Model], ...]:
        return (("b", Model(name, name, "folder", ("x",), 10 * GIB, 0.0)),)

    async def pull(self, name: str, *, nodes_only: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        for step in self.steps:
            yield step
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()


async def alone(puller: Endless, folder: Path) -> AsyncIterator[Callable[[str], Awaitable[Fetched]]]:
    async def obey(caller: str, term: Term) -> str:
        return ""

    made = Fetcher(puller, lambda digest: False, obey, folder, True)
    yield lambda name: made._fetch("l", Fetch(TERM, name, name))
    await made.close()


async def test_what_another_fetch_will_write_is_not_there_for_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "_free", lambda folder: 16 * GIB)
    async for fetch in alone(Endless({"digest": "x", "total": 10 * GIB, "completed": 4 * GIB}), tmp_path):
        assert not (await fetch("one")).failed
        assert (await fetch("two")).failed == "its disk has no space for two"
        heard = Fetched()
        while not heard.completed:
            await asyncio.sleep(0)
            heard = await fetch("one")
        monkeypatch.setattr(fetcher, "_free", lambda folder: 20 * GIB)
        assert "no space" in (await fetch("two")).failed, "6 of 20 GiB are the first one's, 5 stay free"
        monkeypatch.setattr(fetcher, "_free", lambda folder: 21 * GIB)
        assert not (await fetch("two")).failed
        monkeypatch.setattr(fetcher, "_free", lambda folder: 99 * GIB)
        assert (await fetch("three")).failed == "other models are being downloaded here"


async def test_a_fault_of_our_own_is_not_told_as_a_wrong_file(tmp_path: Path) -> None:
    async for fetch in alone(Endless(error=RuntimeError("no thread left")), tmp_path):
        states = [await fetch("one")]
        while not states[-1].failed:
            await asyncio.sleep(0)
            states.append(await fetch("one"))
        assert states[-1].failed == "internal error: no thread left"


async def test_it_comes_from_nodes_and_from_nowhere_else(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    made = fetching(a)
    digest = await known(three)
    assert "does not know yet" in (await order(three, "0" * 64)).failed
    a.ollama = "http://127.0.0.1:9"
    a.calls.cut.add("b")
    await order(three, digest)
    state = await until_told(three, digest, lambda state: state.failed)
    assert "could not be reached" in state.failed and "Ollama" not in state.failed
    await made.close()
