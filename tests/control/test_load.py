"""Explicit loads fulfil the request, or the caller learns what differs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend, Drafts, Endpoint, InOllama, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.control.cluster import ClusterService, KeepOrder
from sollold.engines.commands import Done
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Drop, Dropped, Ensure
from sollold.leader.wish import PlacementWish
from sollold.serving.loader import Need, Ready
from sollold.serving.request import Answer, Ask, Engine, Routing
from sollold.serving.routing import load_warnings
from tests.api.api_parts import singly

READY = Endpoint("demo-1", "demo:latest", "d1", Backend.LOCAL, State.READY, context=4096)


@dataclass
class Model:
    name: str = "demo:latest"
    digest: str = "d1"
    context_train: int = 32768


@dataclass
class Listed:
    model: Model = field(default_factory=Model)
    in_ollama: InOllama = field(default_factory=InOllama)


@dataclass
class Surroundings:
    """Doubles of the view, library, peers and loader of node ``a``; the deployment is on ``node``."""

    node: str = "a"
    endpoint: Endpoint = READY
    asked: list[Ensure] = field(default_factory=list)
    called: list[tuple[str, object]] = field(default_factory=list)
    kept: list[tuple[str, float]] = field(default_factory=list)
    served: list[Ask] = field(default_factory=list)
    refusal: Refusal | None = None
    limit: float = 5.0
    silent: bool = False
    unnamed: Refusal | None = None

    @property
    def me(self) -> Record:
        return Record("a", "host-a", 1, (), 1, 2, "0")

    def record(self, node: str) -> Record:
        return Record(node, f"host-{node}", 1, (), 1, 2, "0", endpoints=(self.endpoint,))

    async def named(self, name: str) -> Listed:
        if self.unnamed is not None:
            raise self.unnamed
        return Listed()

    def get(self, name: str) -> Listed:
        return Listed()

    async def ready(self, need: Need, on_wait: Any) -> Ready:
        self.asked.append(need.ask)
        if self.refusal is not None:
            raise self.refusal
        return Ready(self.node, self.endpoint, ("it is in use",))

    async def call(self, node: str, method: str, request: object, reply: type, *, timeout: float) -> object:
        if self.silent:
            raise PeerError(node, "it does not answer", transport=True)
        self.called.append((method, request))
        if isinstance(request, Drop):
            return Dropped(ended=tuple(deployment for _, deployment in request.seen))
        return Done(True)

    def leader(self) -> Term:
        return Term(1, "a")

    def live(self) -> tuple[Record, ...]:
        return self.record(self.node), self.record("c")

    async def serve(self, ask: Ask, on_wait: Any) -> Answer:
        self.served.append(ask)

        async def nothing() -> AsyncIterator[bytes]:
            return
            yield b""

        return Answer(Routing(Backend.OLLAMA, Engine.OLLAMA, ask.model, "host-c", ""), singly(nothing()))

    def service(self) -> ClusterService:
        any_: Any = self

        async def drain(on: bool) -> None:
            raise AssertionError("not asked")

        def keep(deployment: str, seconds: float) -> None:
            self.kept.append((deployment, seconds))

        return ClusterService(
            any_, any_, any_, any_, any_, any_, drain, keep, any_, any_, self.serve, self.limit, any_
        )


async def test_a_load_sets_the_keep_alive() -> None:
    surroundings = Surroundings()
    await surroundings.service().load(Ensure("demo:latest"))
    assert surroundings.kept == []
    await surroundings.service().load(Ensure("demo:latest", keep_alive=-1.0))
    assert surroundings.kept == [("demo-1", -1.0)]


async def test_the_keep_alive_is_set_on_the_deployments_node() -> None:
    surroundings = Surroundings(node="b")
    await surroundings.service().load(Ensure("demo:latest", keep_alive=3600.0))
    assert surroundings.called == [("keep", KeepOrder("demo-1", 3600.0))]
    assert surroundings.kept == []
    surroundings.silent = True
    with pytest.raises(Refusal, match="could not be set"):
        await surroundings.service().load(Ensure("demo:latest", keep_alive=3600.0))


async def test_less_context_than_requested_is_an_error() -> None:
    surroundings = Surroundings()
    with pytest.raises(Refusal, match="stays loaded with 4096 tokens of context") as refused:
        await surroundings.service().load(Ensure("demo:latest", context=8192, keep_alive=-1.0))
    assert refused.value.fault is Fault.UNAVAILABLE
    assert surroundings.kept == []
    surroundings.endpoint = replace(READY, context=32768)
    # A context above the trained length is limited to it.
    await surroundings.service().load(Ensure("demo:latest", context=100_000))


async def test_a_refusal_of_the_leader_is_passed_on() -> None:
    surroundings = Surroundings()
    surroundings.refusal = Refusal(Fault.UNAVAILABLE, "it runs without 2 slots")
    with pytest.raises(Refusal, match="without 2 slots"):
        await surroundings.service().load(Ensure("demo:latest", slots=2))
    assert surroundings.asked[0].slots == 2


async def test_an_unknown_draft_model_is_an_error() -> None:
    surroundings = Surroundings(
        unnamed=Refusal(Fault.NOT_FOUND, "model 'smal' not found; did you mean small?")
    )
    named = Ensure("demo:latest", placement=PlacementWish(speculation="smal"))
    for order in (surroundings.service().load, surroundings.service().plan):
        with pytest.raises(Refusal, match="invalid speculation: model 'smal' not found; did you") as refused:
            await order(named)
        assert refused.value.fault is Fault.NOT_FOUND
    assert surroundings.asked == []
    surroundings.unnamed = None
    await surroundings.service().load(named)
    assert surroundings.asked[0].placement.speculation == "demo:latest", "the library's name is sent"


IN_OLLAMA = Endpoint("ollama:demo:latest", "demo:latest", "d1", Backend.OLLAMA, State.READY, loaded=False)


async def test_an_ollama_is_asked_to_load() -> None:
    surroundings = Surroundings(endpoint=IN_OLLAMA)
    record, endpoint = await surroundings.service().load(Ensure("demo:latest", context=8192, keep_alive=-1.0))
    assert (record.name, endpoint.loaded) == ("host-c", True), "the node that loaded it"
    (ask,) = surroundings.served
    assert ask.load_only and ask.keep_alive == -1.0
    body = {"model": "demo:latest", "stream": False, "keep_alive": -1.0, "options": {"num_ctx": 8192}}
    assert ask.calls[Engine.OLLAMA].body == body
    assert surroundings.kept == []


@pytest.mark.parametrize(("loaded", "embedding"), [(True, False), (False, True)])
async def test_an_ollama_gets_no_unneeded_or_impossible_load(loaded: bool, embedding: bool) -> None:
    surroundings = Surroundings(endpoint=replace(IN_OLLAMA, loaded=loaded, embedding=embedding))
    record, endpoint = await surroundings.service().load(Ensure("demo:latest"))
    assert (record.name, endpoint) == ("host-a", surroundings.endpoint)
    assert surroundings.served == []


def test_warnings_about_less_than_requested() -> None:
    endpoint = replace(READY, context=32768, slots=1)
    assert load_warnings(Ensure("demo", context=32768, slots=1), endpoint) == ()
    assert load_warnings(Ensure("demo"), endpoint) == ()
    context, slots = load_warnings(Ensure("demo", context=100_000_000, slots=8), endpoint)
    assert "requested 100000000" in context and "has 32768 tokens" in context and "trained" in context
    assert "8 slots" in slots and "only 1" in slots
    nobody = Ensure("demo", placement=PlacementWish(speculation="nobody"))
    (drafts,) = load_warnings(nobody, endpoint)
    assert "no tokens are drafted, although speculation 'nobody' was requested" in drafts
    assert "`sollold plan demo:latest --speculation nobody` shows why" in drafts
    ngram = replace(nobody, placement=PlacementWish(speculation="ngram"))
    (drafts,) = load_warnings(ngram, replace(endpoint, drafts=Drafts("small:latest", 3)))
    assert drafts.startswith("tokens are drafted by small:latest, although")
    assert load_warnings(nobody, replace(endpoint, drafts=Drafts("nobody", 3))) == ()
    (drafts,) = load_warnings(nobody, replace(endpoint, reason="llama.cpp can't load it"))
    assert drafts.endswith("was requested: llama.cpp can't load it")
    (drafts,) = load_warnings(nobody, IN_OLLAMA)
    assert drafts.endswith("was requested: an Ollama answers")
    for usual in ("off", "auto"):
        assert load_warnings(replace(nobody, placement=PlacementWish(speculation=usual)), endpoint) == ()


@pytest.mark.parametrize("fault", [Fault.NOT_FOUND, Fault.UNAVAILABLE])
async def test_a_running_model_can_be_unloaded_without_its_file(fault: Fault) -> None:
    surroundings = Surroundings(unnamed=Refusal(fault, "nobody has it"))
    assert len((await surroundings.service().unload("demo", force=False)).ended) == 2
    ((_, drop),) = surroundings.called
    assert isinstance(drop, Drop) and drop.model == "demo:latest"
    with pytest.raises(Refusal, match="nobody has it"):
        await surroundings.service().unload("other", force=False)
    surroundings.endpoint = replace(READY, state=State.FAILED, loaded=False)
    with pytest.raises(Refusal, match="nobody has it"):
        await surroundings.service().unload("demo", force=False)
