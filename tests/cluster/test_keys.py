"""API keys and administrative requests between real daemons, each in its own network namespace."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from tests import netns
from tests.daemons import Cluster, Node, until

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(netns.available()), reason=netns.available())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Cluster]:
    with Cluster(2, tmp_path_factory.mktemp("keys"), llama, memory="200 MB") as cluster:
        cluster.together()
        yield cluster


def ask(here: Node, there: Node, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a request to ``there`` from the machine of ``here``."""
    with here.network():
        connection = http.client.HTTPConnection(there.address, there.http, timeout=30)
        connection.connect()
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def sollold(here: Node, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line on the machine of ``here``."""
    assert here.machine is not None
    environment = {**os.environ, "SOLLOLD_API_KEY": "", "SOLLOLD_CONFIG": ""}
    return here.machine.run([sys.executable, "-m", "sollold", *words], check=False, env=environment)


def test_administration_from_other_machines_needs_a_key(cluster: Cluster) -> None:
    a, b = cluster[0], cluster[1]
    assert ask(b, a, "GET", "/api/cluster")[0] == 200, "reading needs no key before the first one exists"
    drain = {"node": "", "on": False}
    status, error = ask(b, a, "POST", "/api/cluster/drain", drain)
    assert status == 401 and "API key" in error["error"]
    assert ask(a, a, "POST", "/api/cluster/drain", drain)[0] == 200, "the own machine needs no key"
    # The command line on a member needs no key.
    done = sollold(b, "undrain", "--node", a.url, a.name)
    assert done.returncode == 0, done.stderr

    created = sollold(a, "key", "new", "laptop", "--scope", "admin")
    assert created.returncode == 0, created.stderr
    secret = created.stdout.strip()
    until(lambda: ask(b, a, "GET", "/api/tags")[0] == 401, "node0 requires a key", 10)
    until(lambda: ask(a, b, "GET", "/api/tags")[0] == 401, "node1 requires it too", 10)
    shown = {"Authorization": f"Bearer {secret}"}
    assert ask(a, b, "GET", "/api/tags", **shown)[0] == 200
    assert ask(a, b, "POST", "/api/cluster/drain", drain, **shown)[0] == 200
    done = sollold(b, "key", "list", "--node", a.url)
    assert done.returncode == 0 and "laptop" in done.stdout, done.stderr

    assert sollold(b, "key", "revoke", "laptop").returncode == 0
    until(lambda: ask(b, a, "POST", "/api/cluster/drain", drain, **shown)[0] == 401, "the key is revoked", 10)
    # Members still serve each other.
    assert a.ask("GET", "/api/tags").status == 200
    for node in (a, b):
        assert not [
            file
            for file in (node.folder / "state").rglob("*")
            if file.is_file() and file.stat().st_mode & 0o077
        ]
        assert secret not in node.log() and secret.encode() not in b"".join(_state_files(node))


def _state_files(node: Node) -> Iterator[bytes]:
    for file in Path(node.folder / "state").rglob("*"):
        if file.is_file():
            yield file.read_bytes()
