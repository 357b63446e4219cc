"""The Python client of the HTTP API, for programs and for the command line; independent of the daemon's code.

`HybridRouter` and `OllamaPool` talk to the whole cluster, `Client` to one node. They are asynchronous;
`sollold.client.sync_wrapper` has blocking versions.

Names are imported lazily, so that the command line, which needs few of them, starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sollold.client.errors import ClientError, InsufficientMemory, RequestTimeout
    from sollold.client.http import Client
    from sollold.client.hybrid_router import HybridRouter
    from sollold.client.pool import OllamaPool
    from sollold.client.priority_helpers import Priority

__all__ = [
    "Client",
    "ClientError",
    "HybridRouter",
    "InsufficientMemory",
    "OllamaPool",
    "Priority",
    "RequestTimeout",
]
_MODULES = {
    "Client": "http",
    "ClientError": "errors",
    "HybridRouter": "hybrid_router",
    "InsufficientMemory": "errors",
    "OllamaPool": "pool",
    "Priority": "priority_helpers",
    "RequestTimeout": "errors",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
