"""What editors, type checkers and `help` see of the client: names of arguments, types and what is asked.

The arguments that are wrong here are told by ``mypy`` too: it reads this file, and an ``ignore`` that nothing
needs is an error.
"""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest

from sollold.client import Client, ClientError, HybridRouter, OllamaPool, sync_wrapper
from sollold.client.blocking import BlockingClient
from sollold.client.cluster import ClusterClient

HELLO = [{"role": "user", "content": "Hello"}]
BOTH = [(OllamaPool, sync_wrapper.OllamaPool), (HybridRouter, sync_wrapper.HybridRouter)]


@pytest.mark.parametrize(("awaited", "blocking"), BOTH)
def test_what_blocks_names_the_same_arguments_as_what_is_awaited(awaited: Any, blocking: Any) -> None:
    for name in ("chat", "route_request", "generate", "embed", "batch_embed"):
        if hasattr(awaited, name):
            there = inspect.signature(getattr(awaited, name)).parameters
            assert inspect.signature(getattr(blocking, name)).parameters == there
            assert {"priority", "timeout"} < there.keys()


def test_an_argument_that_a_request_does_not_have_is_refused() -> None:
    pool = sync_wrapper.OllamaPool("http://127.0.0.1:9")
    router = sync_wrapper.HybridRouter(pool)
    with pytest.raises(TypeError, match="'temprature'"):
        router.route_request("m", HELLO, temprature=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'tools'"):
        router.generate("m", "Once", tools=[])  # type: ignore[call-overload]
    # It would have no effect: a chat's is a message.
    with pytest.raises(TypeError, match="'system'"):
        pool.chat("m", HELLO, system="Be brief.")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'think'"):
        pool.embed("m", "a", think=True)  # type: ignore[call-arg]
    with pytest.raises(ClientError, match="no daemon answers"):
        pool.chat("m", HELLO, temperature=0.5, stop=["a"], think="low", tools=[], keep_alive="5m")


def test_clients_say_whom_they_ask_and_no_key() -> None:
    url, key = "http://127.0.0.1:9", "sk-sollold-secret"
    asking: list[Any] = [
        Client(url, api_key=key),
        BlockingClient(url, key=key),
        ClusterClient([url], api_key=key),
        OllamaPool(url, api_key=key),
        HybridRouter(node=url, api_key=key),
        sync_wrapper.OllamaPool(url, api_key=key),
        sync_wrapper.HybridRouter(node=url, api_key=key),
    ]
    for one in asking:
        assert url in repr(one) and type(one).__name__ in repr(one)
        assert key not in repr(one)
    assert repr(OllamaPool()) == "<sollold.client.pool.OllamaPool of nodes yet to be found>"


def test_help_says_what_the_arguments_are() -> None:
    for one in (sync_wrapper.HybridRouter, sync_wrapper.OllamaPool):
        told = pydoc.render_doc(one, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
        assert "max_tokens: 'int | None' = None" in told
        assert "api_key: API key, if the nodes require one" in told
