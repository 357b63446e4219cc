"""One Chromium for all tests, and a fictitious cluster for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.http.application import Listener, build_app
from sollold.api.http.services import AppServices
from sollold.cluster.gossip.record import Record
from sollold.settings.schema import HttpSettings
from tests.web.browser import PROGRAM, Browser, Page, chromium
from tests.web.scene import services

Show = Callable[..., Awaitable[tuple[AppServices, str]]]


@pytest.fixture(scope="package")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run one Chromium for all tests."""
    if PROGRAM is None:
        pytest.skip("no Chromium here (package chromium)")
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def page(devtools: str, show: Show) -> AsyncIterator[Page]:
    """Yield a tab, closed before the servers. Its console must be empty at the end."""
    async with ClientSession() as session, Browser(devtools, session).page() as tab:
        await tab.size(1180, 900)
        yield tab
        assert [line for line in tab.console if "status of" not in line] == []


@pytest.fixture
async def show() -> AsyncIterator[Show]:
    """Yield a function that serves a fictitious cluster and returns its services and URL."""
    async with AsyncExitStack() as stack:

        async def serve(*records: Record, service: Any = None, **settings: Any) -> tuple[AppServices, str]:
            given = await stack.enter_async_context(services(*records, service=service))
            facts = HttpSettings(host="127.0.0.1", port=0, **settings)
            listener = Listener(build_app(given, facts), facts, drain=0.2)
            await listener.start()
            stack.push_async_callback(listener.close)
            return given, f"http://127.0.0.1:{listener.port}"

        yield serve
