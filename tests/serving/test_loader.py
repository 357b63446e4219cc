"""Loads through the leader: shared by callers, repeated after a change of leader, limited in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from aiohttp import web

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Dropped, Ensure, Ensured, Verdict
from sollold.serving.candidate import EndpointQuery
from sollold.serving.loader import Loader, Need, Ready, ensure_of
from sollold.serving.request import Engine, Waiting
from tests.doubles import until
from tests.serving.cluster_double import MODEL, Cluster

WISH = EndpointQuery(MODEL, frozenset((Engine.LLAMA,)))
ASK = ensure_of(WISH, None)
LOADING = Endpoint("d1", MODEL, "", Backend.SHARDED, State.LOADING, progress=0.25, context=4096)


class Scene:
    """Node a with a leader that gives scripted answers and a head h that reports scripted loads."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.answers: list[Ensured | Exception] = []
        self.asked: list[tuple[str, Ensure]] = []
        self.endpoint = LOADING
        self.changed = asyncio.Event()

    async def start(self) -> None:
        self.a = await self.cluster.node("a")
        self.head = await self.cluster.node("h")
        self.loader = Loader(self.a.view, self.a.calls)
        self.a.calls.answers["ensure"] = self.ensure
        self.tell(LOADING)

    def ensure(self, node: str, request: Ensure) -> Ensured:
        self.asked.append((node, request))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, *endpoints: Endpoint) -> None:
        self.head.view.update_me(endpoints=endpoints)


@pytest.fixture
async def scene(cluster: Cluster) -> AsyncIterator[Scene]:
    scene = Scene(cluster)
    await scene.start()
    yield scene
    await scene.loader.close()


def need(limit: float = 5.0) -> Need:
    return Need(ASK, limit)


WAIT = Ensured(Verdict.WAIT, deployment="d1", node="h", state=State.LOADING)


async def test_many_callers_share_one_load_with_progress(scene: Scene) -> None:
    scene.answers = [WAIT]
    waits: list[list[Waiting]] = [[] for _ in range(5)]
    tasks = [asyncio.create_task(scene.loader.ready(need(), waits[n].append)) for n in range(5)]
    await until(lambda: all(Waiting("loading", 0.25) in heard for heard in waits))
    scene.tell(replace(LOADING, progress=0.75))
    await until(lambda: all(heard[-1].progress == 0.75 for heard in waits))
    scene.tell(replace(LOADING, state=State.READY))
    assert [ready and ready.node for ready in await asyncio.gather(*tasks)] == ["h"] * 5
    assert len(scene.asked) == 1
    assert scene.loader._loads == {}


async def test_callers_over_the_limit_are_refused_but_running_answers_are_not(scene: Scene) -> None:
    scene.answers = [WAIT]
    scene.loader = Loader(scene.a.view, scene.a.calls, queue=2)
    heard: list[Waiting] = []
    # Requests with another context or keep-alive are loaded separately and count.
    needs = [need(), Need(replace(ASK, context=512, keep_alive=60.0), 5.0)]
    tasks = [asyncio.create_task(scene.loader.ready(wanted, heard.append)) for wanted in needs]
    await until(lambda: Waiting("loading", 0.25) in heard)
    with pytest.raises(Refusal) as refusal:
        await scene.loader.ready(need(), lambda _: None)
    assert refusal.value.fault is Fault.UNAVAILABLE and refusal.value.retry_after >= 5
    assert "2 requests already wait" in refusal.value.message
    elsewhere = asyncio.create_task(
        scene.loader.ready(replace(need(), ask=replace(ASK, model="other")), lambda _: None)
    )
    under_way = asyncio.create_task(scene.loader.ready(replace(need(), begun=True), lambda _: None))
    done, _ = await asyncio.wait([elsewhere, under_way], timeout=0.1)
    assert not done
    scene.tell(replace(LOADING, state=State.READY))
    await asyncio.gather(*tasks, elsewhere, under_way)
    assert scene.loader._loads == {}


async def test_a_load_survives_changes_of_the_leader(scene: Scene) -> None:
    scene.cluster.world.leader = Term()
    scene.answers = [
        PeerError("x", "gone", transport=True),
        Ensured(Verdict.ELSEWHERE, leader="h"),
        Ensured(Verdict.ELSEWHERE, leader="dead"),
        Ensured(Verdict.PLANNING, message="making room"),
        Ensured(Verdict.USE, node="h", deployment="d1"),
    ]
    waits: list[Waiting] = []
    asking = asyncio.create_task(scene.loader.ready(need(), waits.append))
    await until(lambda: any("no leader" in wait.message for wait in waits))
    scene.cluster.world.leader = Term(2, "x")
    scene.cluster.world.changed()
    ready = await asking
    assert isinstance(ready, Ready)
    assert ready.endpoint.state is State.READY
    assert [node for node, _ in scene.asked] == ["x", "x", "h", "x", "x"]
    assert any(wait.message == "making room" for wait in waits)


async def test_a_refusal_keeps_its_message(scene: Scene) -> None:
    scene.answers = [Ensured(Verdict.REFUSED, fault="too_big", message="needs 9 GiB", retry_after=7)]
    with pytest.raises(Refusal) as refusal:
        await scene.loader.ready(need(), lambda _: None)
    assert (refusal.value.fault, refusal.value.message) == (Fault.TOO_BIG, "needs 9 GiB")


async def test_a_begun_request_waits_while_the_load_progresses(scene: Scene) -> None:
    scene.answers = [WAIT]
    loop = asyncio.get_running_loop()
    began = loop.time()
    patient = asyncio.create_task(scene.loader.ready(Need(ASK, 0.3, begun=True), lambda _: None))
    hasty = asyncio.create_task(scene.loader.ready(need(0.3), lambda _: None))
    for n in range(30, 60):
        await asyncio.sleep(0.03)
        scene.tell(replace(LOADING, progress=n / 100))
    assert not patient.done()
    with pytest.raises(Refusal):
        await hasty
    # The progress stops.
    with pytest.raises(Refusal, match="59%"):
        await patient
    assert loop.time() - began > 1.0


async def test_a_timeout_states_the_progress(scene: Scene) -> None:
    scene.answers = [WAIT]
    with pytest.raises(Refusal) as refusal:
        await scene.loader.ready(need(0.3), lambda _: None)
    assert refusal.value.fault is Fault.UNAVAILABLE
    assert "25%" in refusal.value.message
    assert refusal.value.retry_after >= 5
    assert scene.loader._loads == {}
    with pytest.raises(Refusal, match="was not ready after 10 min"):
        await scene.loader.ready(replace(need(0.1), waited=600.0), lambda _: None)


async def test_a_failed_load_is_retried_a_limited_number_of_times(scene: Scene) -> None:
    scene.answers = [WAIT]
    scene.tell(replace(LOADING, state=State.FAILED, reason="llama-server: out of memory"))
    with pytest.raises(Refusal) as refusal:
        await scene.loader.ready(need(), lambda _: None)
    assert refusal.value.fault is Fault.ENGINE
    assert "out of memory" in refusal.value.message
    assert 1 < len(scene.asked) < 10


async def test_a_forcibly_ended_load_is_not_repeated(scene: Scene) -> None:
    scene.answers = [WAIT]
    asking = asyncio.create_task(scene.loader.ready(need(), lambda _: None))
    await until(lambda: scene.asked)
    scene.tell(replace(LOADING, state=State.DRAINING, forced=True))
    with pytest.raises(Refusal, match="was unloaded with --force") as refusal:
        await asking
    assert refusal.value.fault is Fault.INTERRUPTED
    assert len(scene.asked) == 1


async def test_a_load_is_planned_again_after_its_head_dies(scene: Scene) -> None:
    scene.answers = [WAIT, Ensured(Verdict.USE, node="a", deployment="d2")]
    asking = asyncio.create_task(scene.loader.ready(need(), lambda _: None))
    await until(lambda: scene.asked)
    scene.cluster.world.dead.add("h")
    scene.cluster.world.changed()
    assert await asking is None
    assert len(scene.asked) == 2


async def test_a_load_is_cancelled_with_its_last_caller(scene: Scene) -> None:
    scene.answers = [WAIT]
    tasks = [asyncio.create_task(scene.loader.ready(need(), lambda _: None)) for _ in range(2)]
    await until(lambda: scene.asked)
    (load,) = scene.loader._loads.values()
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    assert load.task is not None and not load.task.done()
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert load.task.done()
    assert scene.loader._loads == {}


async def test_the_head_reports_progress_directly(cluster: Cluster) -> None:
    scene = Scene(cluster)
    ready = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(msgspec.json.encode(LOADING) + b"\n")
        await ready.wait()
        await response.write(msgspec.json.encode(replace(LOADING, state=State.READY)) + b"\n")
        return response

    from tests.serving import cluster_double

    class Peers(cluster_double.FakePeers):
        def __init__(self) -> None:
            super().__init__()
            self.route("GET", "/deployments/{id}/wait", wait)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster_double, "FakePeers", Peers)
        await scene.start()
    scene.answers = [WAIT]
    asking = asyncio.create_task(scene.loader.ready(need(), lambda _: None))
    await until(lambda: scene.asked)
    ready.set()
    found = await asking
    assert found is not None
    assert found.endpoint.state is State.READY
    assert scene.head.view.me.endpoints[0].state is State.LOADING
    await scene.loader.close()


class _Own:
    """A double of the node's own deployments."""

    async def loading(self, deployment: str) -> AsyncIterator[Endpoint]:
        yield LOADING
        yield replace(LOADING, progress=0.5)
        yield replace(LOADING, state=State.READY)


async def test_progress_of_a_local_load_does_not_use_the_network(scene: Scene) -> None:
    scene.answers = [replace(WAIT, node="a")]
    own: Any = _Own()
    scene.loader = Loader(scene.a.view, scene.a.calls, own=own)
    heard: list[Waiting] = []
    ready = await scene.loader.ready(need(), heard.append)
    assert ready == Ready("a", replace(LOADING, state=State.READY))
    assert [waiting.progress for waiting in heard if waiting.stage == "loading"][:2] == [0.25, 0.5]


async def test_an_unload_follows_the_leader(scene: Scene) -> None:
    asked = []

    def drop(node: str, request: Any) -> Dropped:
        asked.append((node, request.model))
        return Dropped(leader="b") if node == "a" else Dropped(refused=(("d1", "in use"),))

    scene.a.calls.answers["drop"] = drop
    await scene.loader.unload(WISH, "asked for")
    assert asked == [("a", MODEL), ("b", MODEL)]
    scene.cluster.world.leader = Term()
    with pytest.raises(Refusal):
        await scene.loader.unload(WISH, "asked for")


async def test_time_waited_earlier_counts_towards_the_limit(scene: Scene) -> None:
    scene.answers = [Ensured(Verdict.PLANNING, message="making room")]
    with pytest.raises(Refusal, match=r"not ready after 7\.0 s: planning \(making room"):
        await scene.loader.ready(replace(need(0.2), waited=6.8), lambda _: None)
