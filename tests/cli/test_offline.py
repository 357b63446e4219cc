"""Offline nodes: shown by ``status`` and ``nodes``, removed by ``forget``."""

from __future__ import annotations

import asyncio

import pytest

from sollold.cli.main import main
from tests.api.api_parts import PlainCluster, monitor_of, parts, record
from tests.api.conftest import Serve, serve
from tests.doubles import until

__all__ = ["serve"]


async def test_an_offline_node_is_shown_until_it_is_forgotten(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = PlainCluster(record(), record("1" * 16, "beta", endpoints=()))
    monitor = monitor_of(cluster)
    url = await serve(parts(cluster=cluster, monitor=monitor))
    await monitor.start()
    try:
        cluster.change(record())
        await until(monitor.offline)

        async def shown(*words: str) -> str:
            assert await asyncio.to_thread(main, ["--node", url, *words]) == 0
            return " ".join(capsys.readouterr().out.split())

        assert "beta is offline since 20" in await shown("status")
        assert "it held 600 B of demo:latest" in await shown("status")
        assert "beta 10.0.0.1:11435 offline since 20" in await shown("nodes")
        assert await shown("nodes", "--offline", "--quiet") == "beta"
        assert "no node is offline" not in await shown("nodes", "--offline")
        assert await shown("forget", "beta") == "beta is removed from the list of offline nodes"
        assert "beta" not in await shown("status") and "beta" not in await shown("nodes")
        assert await shown("nodes", "--offline") == "no node is offline"
        assert await asyncio.to_thread(main, ["--node", url, "forget", "beta"]) == 4
        assert "no offline node 'beta'; no node is offline" in capsys.readouterr().err
    finally:
        await monitor.close()
