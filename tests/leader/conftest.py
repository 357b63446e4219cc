"""A cluster of three nodes of which the first has the model and leads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.leader.cluster import MIB, SETTINGS, Cluster, model


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster(SETTINGS)
    made.add("a", 450 * MIB, model())
    made.add("b", 450 * MIB)
    made.add("c", 450 * MIB)
    await made.planner.start()
    yield made
    await made.planner.close()
