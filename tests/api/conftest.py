"""What the API's tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.agent.llama_find import Llama
from sollold.api.app import Listener, build_app
from sollold.api.parts import Parts
from sollold.api.reply import Patience
from sollold.config import GIB, HttpSettings
from tests.api import reciters
from tests.api.api_parts import PlainLibrary, parts
from tests.api.direct_service import DirectService
from tests.daemons import Cluster, until

Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts an application over parts on a free port and gives its address."""
    listeners: list[Listener] = []

    async def start(
        given: Parts, patience: Patience | None = None, bodies: int = GIB, **settings: Any
    ) -> str:
        facts = HttpSettings(host="127.0.0.1", port=0, **settings)
        listener = Listener(build_app(given, facts, patience, bodies), facts, drain=0.2)
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


@pytest.fixture(scope="session")
def engines(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Real llama-servers that recite, name → address."""
    with reciters.serve(llama.server, tmp_path_factory.mktemp("reciters")) as urls:
        yield urls


@pytest.fixture
async def real(engines: dict[str, str], serve: Serve) -> str:
    """The application over real llama-servers."""
    return await serve(parts(DirectService(engines), library=PlainLibrary(*reciters.MODELS)))


@pytest.fixture(scope="session")
def far(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real node that holds no part of any model: another one has them all."""
    settings = {"placement.context": 1024, "placement.slots": 2}
    folder = tmp_path_factory.mktemp("far")
    with Cluster(2, folder, llama, settings=settings, loopback=True) as cluster:
        reciters.write_all(cluster[0].models, reciters.TEMPLATE.read_text())
        cluster.together()
        names = [model.name for model in reciters.MODELS]
        until(
            lambda: all(name in cluster[1].ask("GET", "/api/tags").body.decode() for name in names), "models"
        )
        yield cluster[1].url


@pytest.fixture
async def slow(engines: dict[str, str], serve: Serve) -> str:
    """The same behind loads that take a while, with signs of life all the while."""
    service = DirectService(engines, delay=0.25)
    library = PlainLibrary(*reciters.MODELS)
    return await serve(parts(service, library=library), Patience(grace=0.02, every=0.05))


WAYS = {"at once": "real", "after a load": "slow", "on a node without the model": "far"}


@pytest.fixture(params=WAYS)
def url(request: pytest.FixtureRequest) -> str:
    """Where the clients are pointed at: each of the ways to an answer."""
    return str(request.getfixturevalue(WAYS[request.param]))
