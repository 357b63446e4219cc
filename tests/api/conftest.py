"""Fixtures of the API's tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.http.application import Listener, build_app
from sollold.api.http.response import KeepAlive
from sollold.api.http.services import AppServices
from sollold.engines.install.find import Llama
from sollold.settings.schema import GIB, HttpSettings
from tests.api import client_table, reciters
from tests.api.api_parts import PlainLibrary, parts
from tests.api.direct_service import DirectService
from tests.daemons import Cluster, Node, until
from tests.ollama_standin import Known, Standin

Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A function that starts an application on a free port and returns its URL."""
    listeners: list[Listener] = []

    async def start(
        services: AppServices,
        keepalive: KeepAlive | None = None,
        bodies: int = GIB,
        logged: str = "inference",
        **settings: Any,
    ) -> str:
        http_settings = HttpSettings(host="127.0.0.1", port=0, **settings)
        listener = Listener(
            build_app(services, http_settings, keepalive, bodies, logged), http_settings, drain=0.2
        )
        await listener.start()
        listeners.append(listener)
        return f"http://127.0.0.1:{listener.port}"

    yield start
    for listener in listeners:
        await listener.close()


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


@pytest.fixture(scope="package")
def engines(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """llama-servers with the models of `reciters`, model → URL."""
    with reciters.serve(llama.server, tmp_path_factory.mktemp("reciters")) as urls:
        yield urls


@pytest.fixture
async def real(engines: dict[str, str], serve: Serve) -> str:
    """URL of an application over real llama-servers."""
    return await serve(parts(DirectService(engines), library=PlainLibrary(*reciters.MODELS)))


@pytest.fixture(scope="package")
def far(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real node without models, beside a node that has them all."""
    settings = {"placement.context": 1024, "placement.slots": 2}
    folder = tmp_path_factory.mktemp("far")
    with Cluster(2, folder, llama, settings=settings, loopback=True) as cluster:
        reciters.write_all(cluster[0].models, reciters.TEMPLATE.read_text())
        cluster.together()
        _wait_for_all_models(cluster[1])
        yield cluster[1].url


@pytest.fixture(scope="package")
def at_ollama(
    engines: dict[str, str], llama: Llama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a real node beside one whose Ollama has all the models."""
    contexts = {"embed:latest": 128}
    models = [
        Known(
            served.name,
            capabilities=served.capabilities,
            context=contexts.get(served.name, 1024),
            engine=engines[served.name],
        )
        for served in reciters.MODELS
    ]
    with in_a_thread(models) as standin:
        each = [{"ollama.enabled": "on", "ollama.url": standin}, {}]
        with Cluster(2, tmp_path_factory.mktemp("ollama"), llama, each=each, loopback=True) as cluster:
            cluster.together()
            _wait_for_all_models(cluster[1])
            yield cluster[1].url


@contextlib.contextmanager
def in_a_thread(models: list[Known]) -> Iterator[str]:
    """Run an Ollama stand-in on an event loop in a thread, as each test has its own loop. Yields its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ollama stand-in")
    thread.start()
    standin = Standin(models, parallel=4)
    try:
        yield asyncio.run_coroutine_threadsafe(standin.start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(standin.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _wait_for_all_models(node: Node) -> None:
    names = [model.name for model in reciters.MODELS]
    until(lambda: all(name in node.ask("GET", "/api/tags").body.decode() for name in names), "models")


@pytest.fixture
async def slow(engines: dict[str, str], serve: Serve) -> str:
    """As ``real``, but each load takes 0.12 s and keepalives are sent every 0.05 s."""
    service = DirectService(engines, delay=0.12)
    library = PlainLibrary(*reciters.MODELS)
    return await serve(parts(service, library=library), KeepAlive(grace=0.02, every=0.05))


OLLAMAS = "from another node's Ollama"
WAYS = {
    "at once": "real",
    "after a load": "slow",
    "on a node without the model": "far",
    OLLAMAS: "at_ollama",
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """How the answer is reached: a key of ``WAYS``."""
    return str(request.param)


@pytest.fixture
def url(request: pytest.FixtureRequest, way: str) -> str:
    """The URL for ``way``."""
    return str(request.getfixturevalue(WAYS[way]))


_outcomes: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcomes of the clients' tests."""
    if "/test_clients" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        name = report.nodeid.split("::")[-1].split("[")[0]
        _outcomes.setdefault(name, []).append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print client × feature if tests of clients ran."""
    if any(name.startswith(tuple(client_table.COLUMNS.values())) for name in _outcomes):
        terminalreporter.section(f"client × feature, each on {len(WAYS)} ways to an answer")
        for line in client_table.table_lines(_outcomes):
            terminalreporter.line(line)
