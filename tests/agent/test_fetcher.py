"""Fetching a model's file for a future head: only from other nodes, on request, if the disk has space."""

from __future__ import annotations

import asyncio
import threading
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
from sollold.models.transfer.pull import Puller
from sollold.models.transfer.pull_progress import Progress
from sollold.settings.schema import GIB
from tests.doubles import until
from tests.models.pulling import PART, Node, ThreeNodes, big, unfinished

TERM = Term(1, "l")


@pytest.fixture
async def three_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ThreeNodes]:
    monkeypatch.setattr(PartialFile.__init__, "__defaults__", (PART,))
    monkeypatch.setattr(fetcher, "LEFT", 0)
    three_nodes = ThreeNodes(tmp_path)
    yield three_nodes
    for node in three_nodes.nodes:
        await node.close()


def register_fetcher(node: Node, *, allowed: bool = True, refusal: str = "") -> Fetcher:
    async def obey(caller: str, term: Term) -> str:
        return refusal

    fetcher_ = Fetcher(
        node.puller,
        lambda digest: node.catalogue.with_digest(digest) is not None,
        obey,
        node.catalogue.own,
        allowed,
    )
    fetcher_.register(node.server)
    return fetcher_


async def order(three_nodes: ThreeNodes, digest: str) -> Fetched:
    """The response of a to a fetch command of b."""
    b = three_nodes.nodes[1]
    return await b.calls.call("a", "fetch", Fetch(TERM, "tiny:F16", digest), Fetched, timeout=1.0)


async def order_until(
    three_nodes: ThreeNodes, digest: str, condition: Callable[[Fetched], object]
) -> Fetched:
    """Repeat the command, as the leader does, until the response fulfils ``condition``; return it."""
    for _ in range(1000):
        state = await order(three_nodes, digest)
        if condition(state):
            return state
        assert not state.failed and not state.done, state
        await asyncio.sleep(0.01)
    raise AssertionError("the condition was never fulfilled")


async def digest_of_tiny(three_nodes: ThreeNodes) -> str:
    """Start the nodes; return the digest of ``tiny``, which b has and a sees."""
    a = three_nodes.nodes[0]
    await three_nodes.start()
    await until(lambda: a.library.find("tiny"))
    return a.library.find("tiny")[0][1].digest


async def test_a_file_is_fetched_and_its_progress_reported(three_nodes: ThreeNodes) -> None:
    a, b, _ = three_nodes.nodes
    path = big(b.folder / "m" / "tiny-F16.gguf")
    register_fetcher(a)
    digest = await digest_of_tiny(three_nodes)
    gate = asyncio.Event()

    async def wait(request: object) -> None:
        await gate.wait()

    b.server.fault = wait
    assert await order(three_nodes, digest) == Fetched()
    state = await order_until(three_nodes, digest, lambda state: state.total)
    assert state == Fetched(completed=0, total=path.stat().st_size)
    gate.set()
    await order_until(three_nodes, digest, lambda state: state.done)
    model = a.catalogue.with_digest(digest)
    assert model is not None and model.source == "own"
    assert await asyncio.to_thread(Path(model.files[0]).read_bytes) == path.read_bytes()
    assert (await order(three_nodes, digest)).done, "an existing model is not fetched again"


async def test_a_fetch_without_further_requests_is_cancelled(
    three_nodes: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "UNASKED_SECONDS", -1.0)
    a, b, _ = three_nodes.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    fetcher_ = register_fetcher(a)
    digest = await digest_of_tiny(three_nodes)
    assert await order(three_nodes, digest) == Fetched()
    (fetch,) = fetcher_._fetches.values()
    await until(lambda: fetch.failed)
    await until(lambda: not a.puller._pulls, story=lambda: "the pull is still running")
    assert (await order(three_nodes, digest)).failed == "no request needs it any more"
    assert a.catalogue.with_digest(digest) is None


async def test_a_stop_command_ends_a_fetch_at_once(three_nodes: ThreeNodes) -> None:
    a, b, _ = three_nodes.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    fetcher_ = register_fetcher(a)
    digest = await digest_of_tiny(three_nodes)

    async def hang(request: object) -> None:
        await asyncio.Event().wait()

    b.server.fault = hang
    await order_until(three_nodes, digest, lambda state: state.total)
    stop = Fetch(TERM, "tiny:F16", digest, stop=True)
    response = await b.calls.call("a", "fetch", stop, Fetched, timeout=1.0)
    assert response.failed == "its load was cancelled"
    assert not fetcher_._fetches and not a.puller._pulls
    assert (await b.calls.call("a", "fetch", stop, Fetched, timeout=1.0)).failed
    assert not fetcher_._fetches, "a stop starts no fetch"


@pytest.mark.parametrize(
    ("left", "allowed", "refusal", "words"),
    [
        (1 << 60, True, "", "no space for"),
        (0, False, "", "models.fetch_seconds is 0 on this node"),
        (0, True, "the term is over", "the term is over"),
    ],
)
async def test_a_node_can_refuse_to_fetch(
    three_nodes: ThreeNodes,
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    allowed: bool,
    refusal: str,
    words: str,
) -> None:
    monkeypatch.setattr(fetcher, "LEFT", left)
    a, b, _ = three_nodes.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    register_fetcher(a, allowed=allowed, refusal=refusal)
    digest = await digest_of_tiny(three_nodes)
    assert words in (await order(three_nodes, digest)).failed
    assert not unfinished(a)


class EndlessPuller(Puller):
    """A puller of models of 10 GiB each that never finishes."""

    def __init__(self, *steps: dict[str, Any], error: Exception | None = None) -> None:
        self.steps = steps
        self.error = error

    def holders(self, name: str) -> tuple[tuple[str, Model], ...]:
        return (("b", Model(name, name, "folder", ("x",), 10 * GIB, 0.0)),)

    async def pull(
        self, name: str, *, nodes_only: bool = False, insecure: bool = False
    ) -> AsyncGenerator[Progress, None]:
        for step in self.steps:
            yield step
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()


async def fetch_of(puller: EndlessPuller, folder: Path) -> AsyncIterator[Callable[[str], Awaitable[Fetched]]]:
    async def obey(caller: str, term: Term) -> str:
        return ""

    fetcher_ = Fetcher(puller, lambda digest: False, obey, folder, True)
    yield lambda name: fetcher_._fetch("l", Fetch(TERM, name, name))
    await fetcher_.close()


async def test_space_reserved_by_a_fetch_is_not_available_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "_free", lambda folder: 16 * GIB)
    async for fetch in fetch_of(
        EndlessPuller({"digest": "x", "total": 10 * GIB, "completed": 4 * GIB}), tmp_path
    ):
        assert not (await fetch("one")).failed
        assert (await fetch("two")).failed == "its disk has no space for two"
        state = Fetched()
        while not state.completed:
            await asyncio.sleep(0)
            state = await fetch("one")
        monkeypatch.setattr(fetcher, "_free", lambda folder: 20 * GIB)
        assert "no space" in (await fetch("two")).failed, "6 of 20 GiB belong to the first, 5 stay free"
        monkeypatch.setattr(fetcher, "_free", lambda folder: 21 * GIB)
        assert not (await fetch("two")).failed
        monkeypatch.setattr(fetcher, "_free", lambda folder: 99 * GIB)
        assert (await fetch("three")).failed == "other models are being downloaded here"


async def test_a_stalled_fetch_without_further_requests_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "_free", lambda folder: 99 * GIB)
    monkeypatch.setattr(fetcher, "UNASKED_SECONDS", 0.05)
    async for fetch in fetch_of(EndlessPuller(), tmp_path):
        for name in ("one", "two"):
            assert not (await fetch(name)).failed
        await asyncio.sleep(0.1)
        assert not (await fetch("three")).failed, "the abandoned ones no longer count"


async def test_an_internal_error_is_reported_as_such(tmp_path: Path) -> None:
    async for fetch in fetch_of(EndlessPuller(error=RuntimeError("no thread left")), tmp_path):
        states = [await fetch("one")]
        while not states[-1].failed:
            await asyncio.sleep(0)
            states.append(await fetch("one"))
        assert states[-1].failed == "internal error: no thread left"


async def test_files_are_fetched_only_from_nodes(three_nodes: ThreeNodes) -> None:
    a, b, _ = three_nodes.nodes
    big(b.folder / "m" / "tiny-F16.gguf")
    fetcher_ = register_fetcher(a)
    digest = await digest_of_tiny(three_nodes)
    assert "does not know yet" in (await order(three_nodes, "0" * 64)).failed
    a.ollama = "http://127.0.0.1:9"
    a.calls.cut.add("b")
    await order(three_nodes, digest)
    state = await order_until(three_nodes, digest, lambda state: state.failed)
    assert "could not be reached" in state.failed and "Ollama" not in state.failed
    await fetcher_.close()


async def test_requests_at_the_same_time_count_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "_free", lambda folder: 16 * GIB)
    async for fetch in fetch_of(EndlessPuller(), tmp_path):
        states = await asyncio.gather(*(fetch(name) for name in ("one", "two", "one")))
        assert sorted(state.failed for state in states)[:2] == ["", ""]
        assert sum("no space" in state.failed for state in states) == 1


async def test_a_disk_that_does_not_respond_refuses_the_download(
    three_nodes: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, calls = threading.Event(), []

    def hang(folder: Path) -> int:
        calls.append(threading.current_thread().name)
        hanging.wait(60)
        return 0

    big(three_nodes.nodes[1].folder / "m" / "tiny.gguf")
    digest = await digest_of_tiny(three_nodes)
    register_fetcher(three_nodes.nodes[0])
    monkeypatch.setattr(fetcher, "_free", hang)
    monkeypatch.setattr(fetcher, "_DISK_SECONDS", 0.05)
    try:
        assert "does not answer" in (await order(three_nodes, digest)).failed
        # A thread of the loop would be missing for other work until the disk responds.
        assert calls[0].startswith("read ")
    finally:
        hanging.set()
