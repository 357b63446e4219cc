"""A file named by path in a request runs on a real llama-server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import GREETING
from tests.daemons import Cluster
from tests.external_worker import started

pytestmark = [pytest.mark.llama, pytest.mark.cluster]


def test_a_request_runs_a_file_outside_the_configured_folders(tmp_path: Path, llama: Llama) -> None:
    file = tmp_path / "elsewhere" / "own-model-Q8_0.gguf"
    file.parent.mkdir()
    demo_model.write(file)
    with Cluster(1, tmp_path / "cluster", llama, start=False, loopback=True) as cluster:
        cluster[0].start()
        cluster.together()
        body = {
            "model": "any-name",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": False,
            "placement": {"file": str(file), "workers": 0},
        }
        reply = cluster[0].ask("POST", "/api/chat", body)
        assert reply.status == 200, reply.body
        assert GREETING.startswith(reply.json["message"]["content"].strip()[:20])
        assert "own-model:Q8_0" in [
            model["name"] for model in cluster[0].ask("GET", "/api/tags").json["models"]
        ]
        plan = cluster[0].ask("POST", "/api/cluster/plan", {k: body[k] for k in ("model", "placement")})
        assert plan.json["ok"] is True


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_request_uses_an_external_worker_that_is_not_configured(
    tmp_path: Path, llama: Llama, allowed: bool
) -> None:
    settings = {"llama.allow_plain_workers": "on" if allowed else "off"}
    async with started(llama, tmp_path) as address:
        with Cluster(
            1, tmp_path / "cluster", llama, settings=settings, start=False, loopback=True
        ) as cluster:
            demo_model.write(cluster[0].models / "demo.gguf")
            cluster[0].start()
            cluster.together()
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": "hi"}],
                "stream": False,
                "placement": {"external": [address], "threshold": 1e-6},
            }
            reply = await asyncio.to_thread(cluster[0].ask, "POST", "/api/chat", body)
            if not allowed:
                assert reply.status == 400
                assert "set llama.allow_plain_workers = true" in reply.json["error"]
                return
            assert reply.status == 200, reply.body
            assert reply.json["_routing"]["backend"] == "llama.cpp-distributed"
            assert any(address in device for device in reply.json["_routing"]["devices"])
