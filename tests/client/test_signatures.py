"""The client as editors, type checkers and `help` see it: argument names, types and representations.

mypy checks the invalid arguments here too, since it reports an unneeded ``ignore`` as an error.
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
def test_blocking_and_asynchronous_methods_have_the_same_arguments(awaited: Any, blocking: Any) -> None:
    for name in ("chat", "route_request", "generate", "embed", "batch_embed"):
        if hasattr(awaited, name):
            expected = inspect.signature(getattr(awaited, name)).parameters
            assert inspect.signature(getattr(blocking, name)).parameters == expected
            assert {"priority", "timeout"} < expected.keys()


def test_unknown_arguments_of_a_request_are_refused() -> None:
    pool = sync_wrapper.OllamaPool("http://127.0.0.1:9")
    router = sync_wrapper.HybridRouter(pool)
    with pytest.raises(TypeError, match="'temprature'"):
        router.route_request("m", HELLO, temprature=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'tools'"):
        router.generate("m", "Once", tools=[])  # type: ignore[call-overload]
    # It would have no effect: the system prompt of a chat is a message.
    with pytest.raises(TypeError, match="'system'"):
        pool.chat("m", HELLO, system="Be brief.")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'think'"):
        pool.embed("m", "a", think=True)  # type: ignore[call-arg]
    with pytest.raises(ClientError, match="no daemon answers"):
        pool.chat("m", HELLO, temperature=0.5, stop=["a"], think="low", tools=[], keep_alive="5m")


def test_representations_show_the_node_and_no_key() -> None:
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
    for client in asking:
        assert url in repr(client) and type(client).__name__ in repr(client)
        assert key not in repr(client)
    assert repr(OllamaPool()) == "<sollold.client.pool.OllamaPool of nodes yet to be found>"


def test_help_describes_the_arguments() -> None:
    for documented in (sync_wrapper.HybridRouter, sync_wrapper.OllamaPool):
        text = pydoc.render_doc(documented, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
        assert "max_tokens: 'int | None' = None" in text
        assert "api_key: API key, if the nodes require one" in text
