"""Over HTTP, a node reports no model as missing before it knows the models of the other nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import ClientSession

from sollold.api.http.application import Listener, build_app
from sollold.api.http.services import AppServices
from sollold.control.activity import Activity
from sollold.control.cluster import ClusterService
from sollold.control.logs import LogService
from sollold.control.models import ModelService
from sollold.control.monitor import Monitor
from sollold.errors import Fault, Refusal
from sollold.leader.leader import Leader
from sollold.leader.messages import Drop, Ensure
from sollold.machine.external_worker import ExternalWorker
from sollold.models.library import Library
from sollold.models.stores.catalogue import Catalogue
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.remote_header import RemoteError, RemoteHeaders
from sollold.serving.loader import Loader
from sollold.serving.router import Router
from sollold.settings.schema import HttpSettings, ModelSettings
from tests.api.api_parts import ScriptedService, chunk, usage_chunk
from tests.doubles import FakeView, record
from tests.models.fakes import FakeCalls, FakeServer
from tests.models.stores import write_gguf

QUESTION = [{"role": "user", "content": "hi"}]
ASKED = [
    ("/api/show", {"model": "beta"}),
    ("/api/chat", {"model": "beta", "messages": QUESTION}),
    ("/v1/chat/completions", {"model": "beta", "messages": QUESTION, "stream": True}),
    ("/v1/messages", {"model": "beta", "messages": QUESTION, "max_tokens": 4}),
    ("/api/cluster/plan", {"model": "beta"}),
    ("/api/cluster/load", {"model": "beta"}),
    ("/api/cluster/unload", {"model": "beta"}),
]


async def name_nothing(addresses: Sequence[str]) -> tuple[ExternalWorker, ...]:
    return ()


async def scan_nothing() -> tuple[ExternalWorker, ...]:
    return ()


class Refuses:
    """A leader that refuses every request, which shows that the name was resolved."""

    def __getattr__(self, name: str) -> Any:
        async def refuse(*_: object) -> None:
            raise Refusal(Fault.UNAVAILABLE, "the leader was asked")

        return refuse


async def refuse(caller: str, request: object) -> None:
    raise Refusal(Fault.UNAVAILABLE, "the leader was asked")


class Newcomer:
    """A node that has just met another node with the model ``beta`` and has not received its list yet."""

    def __init__(self, folder: Path) -> None:
        self.servers = {"a": FakeServer(), "b": FakeServer()}
        self.calls = FakeCalls("a", self.servers)
        self.views = {name: FakeView(record(name)) for name in self.servers}
        write_gguf(folder / "b" / "m" / "beta-F16.gguf", seed=1)
        self.libraries = []
        self.catalogues = []
        for name, view in self.views.items():
            settings = ModelSettings(folders=(str(folder / name / "m"),), ollama_stores=(str(folder / name),))
            catalogue = Catalogue(settings, folder / name / "state", environ={}, home=folder / name)
            self.catalogues.append(catalogue)
            self.libraries.append(Library(catalogue, view, self.calls, self.servers[name]))

    async def start(self) -> str:
        for catalogue in self.catalogues:
            await catalogue.start()
        for library in self.libraries:
            await library.lists.start()
        view, library = self.views["a"], self.libraries[0]
        self.servers["a"].method("ensure", Ensure, refuse)
        self.servers["a"].method("drop", Drop, refuse)
        self.calls.cut.add("b")
        view.others = {"b": self.views["b"].me}
        view.tell()
        router = Router("a", "intelligent")
        cluster = ClusterService(
            view,
            library,
            self.calls,
            cast(Leader, Refuses()),
            Loader(view, self.calls),
            router,
            lambda on: asyncio.sleep(0),
            lambda deployment, seconds: None,
            scan_nothing,
            name_nothing,
            ScriptedService().open,
            5.0,
            RemoteHeaders(Internet({})),
        )
        service = ScriptedService(chunk("hello"), chunk(finish="stop"), usage_chunk())
        monitor = Monitor(view, self.calls, Activity(), lambda node: False)
        logs = LogService(view, self.calls, library.resolve, Path("/nowhere"))
        parts = AppServices(service, ModelService(library, view, self.calls), cluster, monitor, logs)
        facts = HttpSettings(host="127.0.0.1", port=0)
        self.listener = Listener(build_app(parts, facts), facts, drain=0.2)
        await self.listener.start()
        return f"http://127.0.0.1:{self.listener.port}"

    def learn(self) -> None:
        """Receive the other node's list."""
        self.calls.cut.clear()
        self.libraries[0].lists._retry_at.clear()
        self.libraries[0].lists._wanted.set()

    async def close(self) -> None:
        await self.listener.close()
        for library in self.libraries:
            await library.lists.close()
        for catalogue in self.catalogues:
            await catalogue.close()


@pytest.fixture
async def newcomer(tmp_path: Path) -> AsyncIterator[Newcomer]:
    newcomer = Newcomer(tmp_path)
    yield newcomer
    await newcomer.close()


async def ask(
    url: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, str]:
    async with ClientSession() as session, session.post(url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[path for path, _ in ASKED])
async def test_a_model_of_an_unknown_list_is_awaited(
    newcomer: Newcomer, path: str, body: dict[str, Any]
) -> None:
    asking = asyncio.create_task(ask(await newcomer.start(), path, body))
    done, _ = await asyncio.wait([asking], timeout=0.3)
    assert not done, asking.result()
    newcomer.learn()
    status, text = await asking
    if path.startswith("/api/cluster/"):
        assert status == 503 and "the leader was asked" in text
    else:
        assert status == 200, text


async def test_once_all_lists_are_known_a_missing_model_is_reported_immediately(newcomer: Newcomer) -> None:
    url = await newcomer.start()
    newcomer.learn()
    assert (await ask(url, "/api/show", {"model": "beta"}))[0] == 200
    loop = asyncio.get_running_loop()
    before = loop.time()
    status, text = await ask(url, "/api/show", {"model": "nope"})
    assert status == 404 and "nope" in text
    assert loop.time() - before < 2.5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/cluster/plan", {"model": "hf.co/org/repo:Q4_0"}),
        ("/api/cluster/plan", {"model": "llama3.1:405b", "online": True}),
        ("/api/cluster/route", {"model": "hf.co/org/repo:Q4_0"}),
    ],
)
async def test_strangers_cause_no_download_of_a_header(
    newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    fetched: list[str] = []

    async def read(headers: RemoteHeaders, name: str) -> None:
        fetched.append(name)
        raise RemoteError("it is missing", missing=True)

    monkeypatch.setattr(RemoteHeaders, "read", read)
    url = await newcomer.start()
    newcomer.learn()
    status, text = await ask(url, path, body, {"Via": "another machine"})
    assert (status, fetched) == (401, []) and "scope models" in text
    assert (await ask(url, path, body))[0] == 404
    assert fetched == [body["model"]]
