"""Push, create and blob requests reach an Ollama on any node over the real peer port."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sollold.cluster.net import rpc_server
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.control import ollama_relay
from sollold.control.ollama_relay import Body, OllamaRelay
from sollold.engines.ollama.created_models import CreatedModels
from sollold.engines.ollama.service import LocalOllama
from sollold.errors import Fault, Refusal
from sollold.models.transfer.ollama_pull import PEER_PREFIX
from tests.doubles import FakeView, record
from tests.keys import key, key_of
from tests.ollama_standin import Known, Standin

GGUF = b"GGUF" * 100_000
DIGEST = f"sha256:{hashlib.sha256(GGUF).hexdigest()}"
CREATE = json.dumps({"model": "mine", "files": {"m.gguf": DIGEST}}).encode()


class FakeOllama(LocalOllama):
    """A double of a node's knowledge of its Ollama."""

    def __init__(self, folder: Path) -> None:
        self.standin: Standin | None = None
        self.created = CreatedModels(folder / "created.json")

    @property
    def url_of_api(self) -> str:
        return self.standin.url if self.standin is not None else ""

    def has(self, name: str) -> bool:
        return self.standin is not None and name in self.standin.models


class Node:
    def __init__(self, id: str, ports: dict[str, int], folder: Path) -> None:
        self.id, self.ports = id, ports
        self.ollama = FakeOllama(folder)
        self.learned: list[str] = []
        self.view = FakeView(record(id))
        identity = Identity(key_of(id), Tokens.read(""))
        self.peers = RpcServer(identity)
        reach = Dialer(identity, lambda other: (("127.0.0.1", ports[other]),) if other in ports else ())
        self.calls = RpcClient(reach, self.peers)
        self.relay = OllamaRelay(self.ollama, self.view, self.calls, self.learn)
        self.relay.register(self.peers)

    @property
    def standin(self) -> Standin:
        """Its Ollama, which must be there."""
        assert self.ollama.standin is not None
        return self.ollama.standin

    async def learn(self, node: str) -> None:
        self.learned.append(node)

    async def start(self) -> None:
        self.ports[self.id] = await self.peers.start("127.0.0.1", 0)

    async def close(self) -> None:
        await self.relay.close()
        await self.calls.close()
        await self.peers.close()

    async def ask(self, method: str, path: str, body: Body = b"", model: str = "") -> tuple[int, bytes]:
        answer = await self.relay.forward(method, path, body, model)
        assert answer is not None
        try:
            return answer.status, b"".join([piece async for piece in answer.chunks()])
        finally:
            await answer.close()


ThreeNodes = tuple[Node, Node, Node]


@pytest.fixture
async def three_nodes(tmp_path: Path) -> AsyncIterator[ThreeNodes]:
    ports: dict[str, int] = {}
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    a, b, c = (Node(key(number).node, ports, tmp_path / str(number)) for number in range(3))
    for node in (a, b, c):
        node.view.others = {other.id: other.view.me for other in (a, b, c) if other is not node}
        await node.start()
    yield a, b, c
    for node in (a, b, c):
        await node.close()


@pytest.fixture
async def with_two_ollamas(three_nodes: ThreeNodes) -> AsyncIterator[ThreeNodes]:
    """Three nodes with Ollamas on b and c."""
    async with Standin([Known("base:7b")]) as first, Standin([Known("other:7b")]) as second:
        three_nodes[1].ollama.standin, three_nodes[2].ollama.standin = first, second
        yield three_nodes


async def pieces() -> AsyncIterator[bytes]:
    for start in range(0, len(GGUF), 65536):
        yield GGUF[start : start + 65536]


async def test_a_node_without_an_ollama_forwards_blobs_and_creation_to_one_with_it(
    with_two_ollamas: ThreeNodes,
) -> None:
    a, b, c = with_two_ollamas
    assert (await a.ask("HEAD", f"/api/blobs/{DIGEST}"))[0] == 404
    assert (await a.ask("POST", f"/api/blobs/{DIGEST}", pieces()))[0] == 201
    assert (await a.ask("HEAD", f"/api/blobs/{DIGEST}"))[0] == 200
    status, answer = await a.ask("POST", "/api/create", CREATE)
    assert status == 200
    assert json.loads(answer.splitlines()[-1]) == {"status": "success"}
    assert "mine:latest" in b.standin.models
    assert not c.standin.blobs
    assert a.learned == [b.id], "the queried node learns the new model"
    assert "mine:latest" in b.ollama.created and "mine" not in a.ollama.created
    assert "base:7b" not in b.ollama.created


async def test_success_is_noticed_when_its_message_is_split(
    with_two_ollamas: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_relay, "_CHUNK_BYTES", 5)
    a, b, _ = with_two_ollamas
    await a.ask("POST", f"/api/blobs/{DIGEST}", GGUF)
    assert (await a.ask("POST", "/api/create", CREATE))[0] == 200
    assert a.learned == [b.id] and "mine:latest" in b.ollama.created


async def test_models_that_an_ollama_had_before_remain_the_users(with_two_ollamas: ThreeNodes) -> None:
    _, b, _ = with_two_ollamas
    made = json.dumps({"model": "base:7b", "from": "base:7b"}).encode()
    assert (await b.ask("POST", "/api/create", made, "base:7b"))[0] == 200
    assert "base:7b" not in b.ollama.created
    assert b.learned == [b.id]


async def test_creation_follows_its_blobs_even_if_a_nearer_ollama_appears(
    with_two_ollamas: ThreeNodes,
) -> None:
    a, b, _ = with_two_ollamas
    await a.ask("POST", f"/api/blobs/{DIGEST}", GGUF)
    await a.ask("POST", "/api/push", b'{"model":"other:7b"}', "other:7b")
    async with Standin([]) as late:
        a.ollama.standin = late
        assert (await a.ask("POST", "/api/create", CREATE))[0] == 200
        assert not late.models
    assert "mine:latest" in b.standin.models


async def test_requests_about_a_model_go_to_its_node(with_two_ollamas: ThreeNodes) -> None:
    a, b, _ = with_two_ollamas
    for node in (a, b):
        status, _ = await node.ask("POST", "/api/push", b'{"model":"other:7b"}', "other:7b")
        assert status == 200, "the node's own Ollama does not have the model"
    # So do requests for its details.
    status, answer = await a.ask("POST", "/api/show", b'{"model":"other:7b"}', "other:7b")
    assert status == 200 and json.loads(answer)["model_info"]
    status, answer = await a.ask("POST", "/api/push", b'{"model":"none"}', "none")
    assert (status, json.loads(answer)) == (404, {"error": "model 'none' not found"})


async def test_without_any_ollama_nothing_is_forwarded(three_nodes: ThreeNodes) -> None:
    assert await three_nodes[0].relay.forward("POST", "/api/push", b"{}", "x") is None


@pytest.mark.parametrize("asked", [0, 1])
async def test_an_interrupted_answer_is_an_error(with_two_ollamas: ThreeNodes, asked: int) -> None:
    with_two_ollamas[1].standin.breaks_off = True
    with pytest.raises(Refusal) as caught:
        await with_two_ollamas[asked].ask("POST", "/api/push", b'{"model":"base:7b"}', "base:7b")
    assert caught.value.fault in (Fault.INTERRUPTED, Fault.UNAVAILABLE)


async def test_other_routes_of_an_ollama_are_closed(with_two_ollamas: ThreeNodes) -> None:
    a, b, _ = with_two_ollamas
    for path in ("/ollama/api/delete", "/ollama/api/blobs/..%2F..%2Fx", "/ollama/api/generate"):
        async with a.calls.stream(b.id, "POST", path, data=b"{}") as answer:
            assert answer.status == 404


async def test_a_create_from_another_node_is_read_up_to_a_limit(
    three_nodes: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "LARGEST", 1000)
    node = Node(key(3).node, three_nodes[0].ports, tmp_path)
    await node.start()
    create = f"{PEER_PREFIX}/api/create"
    async with three_nodes[0].calls.stream(node.id, "POST", create, data=bytes(1001)) as answer:
        assert answer.status == 413
    await node.close()
