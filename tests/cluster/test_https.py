"""HTTPS on the HTTP API's port: real daemons, and common clients."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests import netns
from tests.daemons import Cluster, Node

pytestmark = [pytest.mark.cluster, pytest.mark.llama]
pytestmark += [pytest.mark.skipif(bool(netns.available()), reason=netns.available())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Cluster]:
    settings = {"http.tls": "cluster", "cluster.token": "5e" * 32, "placement.context": 1024}
    with Cluster(2, tmp_path_factory.mktemp("https"), llama, memory="300 MB", settings=settings) as cluster:
        write(cluster[0].models / "count.gguf", Recital(counting(50), name="count"))
        cluster.together()
        yield cluster


def run(here: Node, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the machine of ``here``."""
    assert here.machine is not None
    environment = {**os.environ, "SOLLOLD_CONFIG": "", **environment}
    return here.machine.run(words, timeout=120, check=False, env=environment)


def sollold(here: Node, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(here, sys.executable, "-m", "sollold", *words, **environment)


@pytest.fixture(scope="module")
def authority(cluster: Cluster) -> Path:
    """A file with the cluster's CA certificate, from ``sollold cluster ca``."""
    printed = [sollold(node, "cluster", "ca") for node in cluster]
    assert [done.returncode for done in printed] == [0, 0], printed[0].stderr
    assert printed[0].stdout == printed[1].stdout, "all nodes have the same CA"
    file = cluster.folder / "ca.pem"
    file.write_text(printed[0].stdout)
    return file


def test_one_ca_certificate_is_valid_for_all_nodes(cluster: Cluster, authority: Path) -> None:
    a, b = cluster
    for here, there in ((b, a), (a, b)):
        for host in (there.address, f"{there.name}.local"):
            url = f"https://{host}:{there.http}/api/version"
            place = f"{there.name}.local:{there.http}:{there.address}"
            done = run(here, "curl", "-sS", "--cacert", str(authority), "--resolve", place, url)
            assert "version" in done.stdout, done.stderr
    stranger = run(b, "curl", "-sS", f"https://{a.address}:{a.http}/api/version")
    assert stranger.returncode == 60, "curl rejects a certificate of an unknown CA"
    plain = run(b, "curl", "-sS", "-w", "%{http_code}", f"http://{a.address}:{a.http}/api/version")
    assert "https://" in plain.stdout and plain.stdout.endswith("400"), plain
    assert '"version"' in run(a, "curl", "-sS", f"http://127.0.0.1:{a.http}/api/version").stdout
    assert (
        '"version"'
        in run(a, "curl", "-sS", "--cacert", str(authority), f"https://localhost:{a.http}/api/version").stdout
    )
    assert {node["url"] for node in a.state()["nodes"]} == {
        f"https://{node.address}:{node.http}" for node in cluster
    }


def test_the_ollama_client_and_httpx_work_over_https(cluster: Cluster, authority: Path) -> None:
    httpx, ollama = pytest.importorskip("httpx"), pytest.importorskip("ollama")
    a, b = cluster
    trust = ssl.create_default_context(cafile=str(authority))
    body = {"model": "count", "messages": [{"role": "user", "content": "Count"}]}
    with b.network():
        client = ollama.Client(host=f"https://{a.address}:{a.http}", verify=trust)
        assert [model.model for model in client.list().models] == ["count:latest"]
        words = [part.message.content for part in client.chat(**body, stream=True)]
    with b.network(), httpx.Client(verify=trust, timeout=60) as http:
        answer = http.post(f"https://{b.address}:{b.http}/v1/chat/completions", json=body)
    # The second node forwarded the request to the first.
    assert answer.json()["choices"][0]["message"]["content"] == "".join(words) != ""


def test_the_command_line_and_the_library_work_over_https(cluster: Cluster, authority: Path) -> None:
    a, b = cluster
    for target in (a.name, f"https://{a.address}:{a.http}"):
        done = sollold(b, "status", "--node", target)
        assert done.returncode == 0 and "node0" in done.stdout, done.stderr
    code = """
import asyncio, sys
from sollold.client.discovery import on_the_lan
from sollold.client.http import Client
async def main():
    found = []
    while not found:
        found = await on_the_lan()
    for url in found:
        async with Client(url) as client:
            print(url, len((await client.get("/api/cluster"))["nodes"]))
asyncio.run(main())
"""
    done = run(b, sys.executable, "-c", code, SOLLOLD_CA=str(authority))
    # Either node may be found first.
    assert done.stdout, done.stderr
    assert set(done.stdout.splitlines()) <= {f"https://{node.address}:{node.http} 2" for node in cluster}
    refused = run(b, sys.executable, "-c", code)
    assert "sollold cluster ca" in refused.stderr, "the error names the command that shows the CA"


def test_idle_connections_do_not_block_others(cluster: Cluster, authority: Path) -> None:

    a, b = cluster
    with b.network():
        silent = [socket.create_connection((a.address, a.http)) for _ in range(100)]
    try:
        url = f"https://{a.address}:{a.http}/api/version"
        assert '"version"' in run(a, "curl", "-sS", "--cacert", str(authority), url).stdout
    finally:
        for connection in silent:
            connection.close()
