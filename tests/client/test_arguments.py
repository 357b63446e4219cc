"""Invalid arguments raise immediately and are named, in the blocking and the asynchronous client."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sollold.client import Client, HybridRouter, OllamaPool, sync_wrapper
from sollold.client.backends import backend_addresses

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"coordinator_timeout": "5s"}, TypeError, "coordinator_timeout must be a number of seconds .* '5s'"),
    ({"coordinator_timeout": True}, TypeError, "coordinator_timeout"),
    ({"coordinator_timeout": 0}, ValueError, "coordinator_timeout must be more than 0 seconds"),
    ({"coordinator_timeout": float("nan")}, ValueError, "coordinator_timeout"),
    ({"enable_distributed": "false"}, TypeError, "enable_distributed must be True or False, not 'false'"),
    ({"auto_discover_rpc": None}, TypeError, "auto_discover_rpc"),
    ({"auto_setup_rpc": "no"}, TypeError, "auto_setup_rpc"),
    ({"num_rpc_backends": "2"}, TypeError, "num_rpc_backends must be an integer, not '2'"),
    ({"num_rpc_backends": 0}, ValueError, "num_rpc_backends .* enable_distributed=False"),
    ({"rpc_backends": 5}, ValueError, "an RPC backend is .* not 5"),
    ({"rpc_backends": [None]}, ValueError, "an RPC backend is .* not None"),
    ({"distributed_threshold_params": "30"}, TypeError, "distributed_threshold_params must be a number"),
    ({"distributed_threshold_params": -1}, ValueError, "distributed_threshold_params"),
    ({"gguf_path": 5}, TypeError, "gguf_path must be a path, not 5"),
    ({"model_filter": ["a", 5]}, TypeError, "model_filter must be names of models, not 5"),
    ({"model_filter": 5}, TypeError, "model_filter must be names of models, not 5"),
    ({"layer_strategy": ["even"]}, ValueError, "layer_strategy"),
    ({"node": 5}, TypeError, "a node is a URL, .* not 5"),
    ({"node": [None]}, TypeError, "a node is a URL, .* not None"),
    ({"node": "ftp://pc2"}, ValueError, "ftp://pc2 is not a node's URL; write http://HOST:11435"),
    ({"node": "http://pc2:8000/?a=b"}, ValueError, "is not a node's URL; write http://HOST:11435"),
    ({"node": "http://[::1"}, ValueError, r"http://\[::1 is not a node's URL: "),
    ({"node": ["pc2:99999"]}, ValueError, "http://pc2:99999 is not a node's URL: Port out of range"),
    ({"node": {"host": "pc2", "port": "x"}}, ValueError, "http://pc2:x is not a node's URL"),
    ({"api_key": b"sk-secret"}, TypeError, "^api_key must be a string, not bytes$"),
    ({"ollama_pool": "http://pc2"}, TypeError, "ollama_pool must be a sollold.client.*OllamaPool, not 'http"),
    ({"nodes": []}, TypeError, "unexpected arguments: nodes"),
]


@pytest.mark.parametrize("router", [HybridRouter, sync_wrapper.HybridRouter])
@pytest.mark.parametrize(("options", "error", "words"), WRONG)
def test_a_router_names_the_invalid_argument(
    router: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        router(**options)


def test_invalid_embedding_inputs_are_refused() -> None:
    pool = sync_wrapper.OllamaPool("http://127.0.0.1:9")
    with pytest.raises(TypeError, match=r"^inputs must be a list of strings, not 'one text'$"):
        pool.batch_embed("m", "one text")
    with pytest.raises(TypeError, match=r"^inputs\[1\] must be a string, not 2$"):
        pool.batch_embed("m", ["a", 2])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^input must be a list of strings, not None$"):
        pool.embed("m", None)  # type: ignore[arg-type]


def test_a_client_accepts_the_address_of_a_node() -> None:
    assert Client("pc2").url == "http://pc2:11435" and Client("https://pc2:1/a/").url == "https://pc2:1/a"
    with pytest.raises(ValueError, match="ftp://pc2 is not a node's URL"):
        Client("ftp://pc2")


@pytest.mark.parametrize("pool", [OllamaPool, sync_wrapper.OllamaPool])
def test_a_pool_names_the_invalid_argument(pool: Any) -> None:
    for options, error in (({"timeout": "5s"}, TypeError), ({"timeout": -1}, ValueError)):
        with pytest.raises(error, match=f"^timeout must be .*{options['timeout']}"):
            pool(**options)
    with pytest.raises(TypeError, match="a node is a URL"):
        pool(5)
    with pytest.raises(TypeError, match="api_key must be a string"):
        pool(api_key=5)


def test_a_router_refuses_a_pool_of_the_other_kind() -> None:
    with pytest.raises(TypeError, match=r"a sollold\.client\.sync_wrapper\.OllamaPool"):
        sync_wrapper.HybridRouter(OllamaPool())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a sollold\.client\.OllamaPool"):
        HybridRouter(sync_wrapper.OllamaPool())  # type: ignore[arg-type]


def test_a_client_names_the_invalid_argument() -> None:
    with pytest.raises(TypeError, match="timeout must be a number of seconds"):
        Client("http://pc2", timeout="5s")  # type: ignore[arg-type]


async def test_limits_of_a_request_are_checked_before_sending() -> None:
    wrong: Any = "5s"
    pool = OllamaPool("http://127.0.0.1:9")
    messages = [{"role": "user", "content": "hi"}]
    for call in (
        pool.chat("m", messages, timeout=wrong),
        pool.generate("m", "hi", timeout=wrong),
        pool.embed("m", "hi", timeout=wrong),
        pool.batch_embed("m", ["hi"], timeout=wrong),
    ):
        with pytest.raises(TypeError, match=r"timeout must be a number of seconds .* '5s'"):
            await call
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        await pool.batch_embed("m", ["hi"], concurrency=0)


@pytest.mark.parametrize("tokens", [0, -5, "5", 1.5, True])
async def test_an_invalid_max_tokens_is_refused(tokens: Any) -> None:
    """Ollama would take 0 as unlimited."""
    pool = OllamaPool("http://127.0.0.1:9")
    for call in (pool.generate("m", "hi", max_tokens=tokens), pool.chat("m", HELLO, max_tokens=tokens)):
        with pytest.raises((TypeError, ValueError), match=r"^max_tokens must be "):
            await call


def test_valid_arguments_are_accepted() -> None:
    router = HybridRouter(
        coordinator_timeout=5,
        num_rpc_backends=2,
        distributed_threshold_params=0,
        model_filter="big",
        gguf_path=Path("/m.gguf"),
        rpc_backends="a:1, b:2",
    )
    assert router.model_filter == ("big",) and router.coordinator_timeout == 5
    assert backend_addresses({"host": "a", "port": 1}) == ("a:1",)
    with pytest.raises(ValueError, match="an RPC backend"):
        backend_addresses(["a"])


HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("model", [None, "", 5])
async def test_an_invalid_model_name_is_refused(model: Any) -> None:
    router = HybridRouter(node="127.0.0.1:9")
    for call in (
        router.route_request(model, HELLO),
        router.generate(model, "hi"),
        router.ollama_pool.embed(model, "hi"),
        router.ollama_pool.chat(model, HELLO),
    ):
        with pytest.raises(TypeError, match=f"^model must be a name, not {model!r}$"):
            await call
    with pytest.raises(TypeError, match="model must be a name"):
        router.placement(model)


@pytest.mark.parametrize("messages", ["hi", b"hi", None, 5, {"role": "user", "content": "hi"}])
async def test_invalid_messages_are_refused(messages: Any) -> None:
    with pytest.raises(TypeError, match=r"^messages must be a list of \{\"role\": .*, not "):
        await HybridRouter(node="127.0.0.1:9").route_request("m", messages)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"tools": [print]}, "tools"),
        ({"format": dict}, "format"),
        ({"keep_alive": timedelta(minutes=5)}, "keep_alive"),
        ({"temperature": float("nan")}, "options"),
    ],
)
async def test_a_value_without_a_json_form_is_named(given: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} can't be sent as JSON: "):
        await OllamaPool("127.0.0.1:9").chat("m", HELLO, **given)
