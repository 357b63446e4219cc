from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.serving.cluster_double import Cluster


@pytest.fixture(autouse=True)
def callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doubles speak no TLS: who calls is in a header."""
    monkeypatch.setattr("sollold.cluster.peer_server.caller", lambda request: request.headers["X-Peer"])


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        await cluster.stop()
