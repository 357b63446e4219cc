"""A cluster of three nodes; the first has the model and leads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.leader.cluster import SETTINGS, Cluster, model
from tests.placement.fleets import MIB


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(SETTINGS)
    cluster.add("a", 450 * MIB, model())
    cluster.add("b", 450 * MIB)
    cluster.add("c", 450 * MIB)
    await cluster.planner.start()
    yield cluster
    await cluster.planner.close()
