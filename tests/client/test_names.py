"""The documented names and their modules, and the small helpers."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sollold.api.http.caller import parse_priority, priority_of
from sollold.client import profiles
from sollold.client.bodies import checked_messages, request_body
from sollold.client.discovery import url_of, urls_of
from sollold.client.errors import ClientError
from sollold.client.gateway import allowed
from sollold.client.hybrid_router import MODEL_PROFILES, HybridRouter
from sollold.client.ollama_gguf_resolver import OllamaGGUFResolver
from sollold.client.pool import OllamaPool
from sollold.client.priority_helpers import (
    Priority,
    get_priority_for_role,
    get_priority_for_task,
    list_available_roles,
    list_available_tasks,
)
from sollold.client.request_arguments import ChatArguments
from sollold.client.rpc_discovery import test_rpc_backend as rpc_backend_answers
from sollold.priority import NAMES
from tests.models.stores import OllamaStore

IMPORTS = """
import sys
from sollold.client import HybridRouter, OllamaPool, Client, ClientError
from sollold.client.sync_wrapper import HybridRouter, OllamaPool
from sollold.client.priority_helpers import Priority, get_priority_for_role, get_priority_for_task
from sollold.client.priority_helpers import list_available_roles
from sollold.client.hybrid_router import HybridRouter, MODEL_PROFILES
from sollold.client.rpc_discovery import test_rpc_backend, auto_discover_rpc_backends
from sollold.client.ollama_gguf_resolver import OllamaGGUFResolver
heavy = {"aiohttp", "msgspec", "zeroconf", "uvloop", "psutil", "cryptography", "rich", "sollold.api",
    "sollold.serving", "sollold.daemon", "sollold.settings", "sollold.cluster", "sollold.models"}
print(sorted(heavy & set(sys.modules)))
"""


def test_documented_names_import_without_the_daemon() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_priorities_match_the_servers() -> None:
    assert {level.name: level.value for level in Priority} == dict(NAMES)
    for priority in Priority:
        assert parse_priority(priority.name) == priority
        body = request_body("m", priority=priority)
        assert json.loads(json.dumps(body))["priority"] == priority.value
    for role in list_available_roles():
        assert get_priority_for_role(role) == priority_of(None, None, role)
    assert get_priority_for_role("Editor") == 6
    assert get_priority_for_role("no such role") == Priority.NORMAL
    assert get_priority_for_role("no such role", Priority.LOW) == Priority.LOW
    assert get_priority_for_task("embedding") == 4 and get_priority_for_task("?") == 5
    assert list_available_roles()[0] == "researcher" and list_available_tasks()[-1] == "batch"


def test_added_and_changed_profiles_apply() -> None:
    router = HybridRouter()
    original = dict(MODEL_PROFILES["llama3.1:70b"])
    always = {"threshold": 1e-6}
    assert router.placement("llama3.1:70b") == {}
    try:
        MODEL_PROFILES["custom-70b"] = {
            "parameter_count": 70,
            "estimated_memory_gb": 42,
            "requires_distributed": True,
        }
        MODEL_PROFILES["llama3.1:70b"]["estimated_memory_gb"] = 50
        assert router.placement("custom-70b:latest") == always
        assert router.placement("llama3.1:70b") == always
        small = {"parameter_count": 40, "requires_distributed": False}
        MODEL_PROFILES["custom-40b"] = small
        assert router.placement("custom-40b") == {}
        assert HybridRouter(distributed_threshold_params=30).placement("custom-40b") == always
        assert HybridRouter(enable_distributed=False).placement("custom-70b") == {"distributed": False}
    finally:
        MODEL_PROFILES["llama3.1:70b"] = original
        del MODEL_PROFILES["custom-70b"], MODEL_PROFILES["custom-40b"]
    assert profiles.wanted_by_user("llama3.1:70b") is None


def test_a_routers_arguments_become_its_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPC_BACKENDS", "10.0.0.1:50052, 10.0.0.2:50053")
    assert HybridRouter().placement("m") == {"external": ["10.0.0.1:50052", "10.0.0.2:50053"]}
    given = HybridRouter(
        num_rpc_backends=3,
        rpc_backends=[{"host": "192.168.1.10", "port": 50052}],
        distributed_threshold_params=30,
        layer_strategy="even",
        gguf_path=Path("/models/own.gguf"),
        model_filter=["big"],
    )
    assert given.placement("big:latest") == {
        "workers": 3,
        "threshold": 30,
        "policy": "even",
        "external": ["192.168.1.10:50052"],
        "file": "/models/own.gguf",
    }
    assert given.placement("other") == {"distributed": False}
    for wrong in ({"num_rpc_backends": 0}, {"layer_strategy": "best"}, {"rpc_backends": [{"port": 1}]}):
        with pytest.raises(ValueError):
            HybridRouter(**wrong)


def test_arguments_become_the_body_of_the_request() -> None:
    body = request_body(
        "m",
        max_tokens=5,
        more={"options": {"seed": 1}, "temperature": 0, "think": True, "tools": None},
        arguments=ChatArguments,
        messages=checked_messages([{"role": "user", "content": "hi"}]),
    )
    assert body == {
        "model": "m",
        "options": {"seed": 1, "temperature": 0, "num_predict": 5},
        "think": True,
        "messages": [{"role": "user", "content": "hi"}],
    }
    with pytest.raises(TypeError, match="temprature"):
        request_body("m", more={"temprature": 0})
    with pytest.raises(TypeError, match=r"messages\[0\] is Ellipsis"):
        checked_messages([...])  # type: ignore[list-item]


def test_node_addresses_are_accepted_in_several_forms() -> None:
    assert url_of("pc2") == "http://pc2:11435"
    assert url_of("pc2:8000") == "http://pc2:8000"
    assert url_of("https://pc2/") == "https://pc2"
    assert url_of({"host": "10.0.0.1"}) == "http://10.0.0.1:11435"
    assert url_of({"host": "fd00::1", "port": 1}) == "http://[fd00::1]:1"
    assert url_of("::1") == url_of("[::1]") == "http://[::1]:11435"
    assert url_of("[fd00::1]:8000") == "http://[fd00::1]:8000"
    assert urls_of("a,b:1") == ["http://a:11435", "http://b:1"]
    assert urls_of(None) == []
    with pytest.raises(ValueError):
        url_of({"port": 1})


async def test_awaiting_a_pool_is_optional() -> None:
    assert isinstance(await OllamaPool.auto_configure(), OllamaPool)
    assert HybridRouter(ollama_pool=OllamaPool.auto_configure()).ollama_pool is not None


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Yield a port that replies to each connection with ``answer``; None: it accepts and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.recv(100)
                        connection.sendall(answer)
            except OSError:
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()
        thread.join(5)


def test_an_rpc_backend_is_recognized_by_its_greeting() -> None:
    greeting = (3).to_bytes(8, "little") + bytes([7, 0, 0])
    with listener(greeting) as port:
        assert rpc_backend_answers("127.0.0.1", port)
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert not rpc_backend_answers("127.0.0.1", port)
    with listener(None) as port:
        assert rpc_backend_answers("127.0.0.1", port, 0.2), "a busy worker does not answer until it is free"
    assert not rpc_backend_answers("127.0.0.1", port, 0.2)


def test_the_resolver_finds_models_of_ollama(tmp_path: Path) -> None:
    store = OllamaStore(tmp_path / "store")
    store.model("llama3.1:70b", tmp_path)
    resolver = OllamaGGUFResolver(store.root)
    path = resolver.get_gguf_path("llama3.1:70b")
    assert path is not None and Path(path).is_file() and Path(path).parent == store.root / "blobs"
    assert Path(path).read_bytes()[:4] == b"GGUF"
    assert resolver.get_gguf_path("llama3.1:8b") is None
    assert resolver.list_available_models() == {"llama3.1:70b": path}
    store.manifest("half:latest", [store.layer("model", b"GGUF")])
    (store.root / "blobs" / f"sha256-{hashlib.sha256(b'GGUF').hexdigest()}").unlink()
    assert resolver.get_gguf_path("half") is None, "its blob is missing"
    assert resolver.list_available_models() == {"llama3.1:70b": path}


def test_the_gateway_uses_the_backends_of_the_environment() -> None:
    assert allowed("10.0.0.1:50052") == ["--set", "llama.allow_plain_workers=on"]
    assert allowed(" ") == []
    done = subprocess.run(
        [sys.executable, "-m", "sollold.client.gateway", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RPC_BACKENDS": "10.0.0.1:50052"},
    )
    assert done.returncode == 0 and "sollold run" in done.stdout


def test_pictures_may_be_bytes() -> None:
    for picture in (b"\x89PNG", bytearray(b"\x89PNG"), "iVBORw=="):
        assert request_body("m", more={"images": [picture]})["images"] == ["iVBORw=="]
        asked = {"role": "user", "content": "hi", "images": (picture,)}
        assert checked_messages([asked])[0]["images"] == ["iVBORw=="]
        assert asked["images"] == (picture,), "the caller's own message was changed"


@pytest.mark.parametrize("ask", ["route_request", "generate", "embed", "batch_embed"])
async def test_a_silent_node_is_awaited_until_the_timeout(ask: str) -> None:
    with listener(None) as port:
        router = HybridRouter(node=f"127.0.0.1:{port}")
        given = [{"role": "user", "content": "hi"}] if ask == "route_request" else ["hi"]
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"request timeout after 0\.2 s"):
            await getattr(router, ask)("m", "hi" if ask == "generate" else given, timeout=0.2)
        assert time.monotonic() - began < 10
        await router.close()


async def test_https_to_an_http_node_is_explained() -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        async with OllamaPool(f"https://127.0.0.1:{port}") as pool:
            with pytest.raises(
                ClientError, match=f"no HTTPS at .*; if it speaks HTTP, name http://127.*{port}"
            ):
                await pool.list()
