"""What the API's tests share."""

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
    """Starts an application over parts on a free port and gives its address."""
    listeners: list[Listener] = []

    async def start(
        given: AppServices,
        keepalive: KeepAlive | None = None,
        bodies: int = GIB,
        logged: str = "inference",
        **settings: Any,
    ) -> str:
        facts = HttpSettings(host="127.0.0.1", port=0, **settings)
        listener = Listener(build_app(given, facts, keepalive, bodies, logged), facts, drain=0.2)
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
    """Real llama-servers that recite, name → address."""
    with reciters.serve(llama.server, tmp_path_factory.mktemp("reciters")) as urls:
        yield urls


@pytest.fixture
async def real(engines: dict[str, str], serve: Serve) -> str:
    """The application over real llama-servers."""
    return await serve(parts(DirectService(engines), library=PlainLibrary(*reciters.MODELS)))


@pytest.fixture(scope="package")
def far(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real node that holds no part of any model: another one has them all."""
    settings = {"placement.context": 1024, "placement.slots": 2}
    folder = tmp_path_factory.mktemp("far")
    with Cluster(2, folder, llama, settings=settings, loopback=True) as cluster:
        reciters.write_all(cluster[0].models, reciters.TEMPLATE.read_text())
        cluster.together()
        _has_all(cluster[1])
        yield cluster[1].url


@pytest.fixture(scope="package")
def at_ollama(
    engines: dict[str, str], llama: Llama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A real node beside one whose Ollama has all the models."""
    contexts = {"embed:latest": 128}
    models = [
        Known(
            one.name,
            capabilities=one.capabilities,
            context=contexts.get(one.name, 1024),
            engine=engines[one.name],
        )
        for one in reciters.MODELS
    ]
    with in_a_thread(models) as standin:
        each = [{"ollama.enabled": "on", "ollama.url": standin}, {}]
        with Cluster(2, tmp_path_factory.mktemp("ollama"), llama, each=each, loopback=True) as cluster:
            cluster.together()
            _has_all(cluster[1])
            yield cluster[1].url


@contextlib.contextmanager
def in_a_thread(models: list[Known]) -> Iterator[str]:
    """A stand-in for an Ollama that outlives the tests' own loops; its address."""
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


def _has_all(node: Node) -> None:
    names = [model.name for model in reciters.MODELS]
    until(lambda: all(name in node.ask("GET", "/api/tags").body.decode() for name in names), "models")


@pytest.fixture
async def slow(engines: dict[str, str], serve: Serve) -> str:
    """The same behind loads that take a while, with signs of life all the while."""
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
    """One of the ways to an answer."""
    return str(request.param)


@pytest.fixture
def url(request: pytest.FixtureRequest, way: str) -> str:
    """Where the clients are pointed at."""
    return str(request.getfixturevalue(WAYS[way]))


_outcomes: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each run of the clients' tests ended."""
    if "/test_clients" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        name = report.nodeid.split("::")[-1].split("[")[0]
        _outcomes.setdefault(name, []).append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show client × feature, where any client was run."""
    if any(name.startswith(tuple(client_table.COLUMNS.values())) for name in _outcomes):
        terminalreporter.section(f"client × feature, each on {len(WAYS)} ways to an answer")
        for line in client_table.shown(_outcomes):
            terminalreporter.line(line)
