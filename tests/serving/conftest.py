from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.serving.cluster_double import Cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        await cluster.stop()
