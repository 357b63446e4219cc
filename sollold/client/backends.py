"""Addresses of external llama.cpp RPC workers, from arguments or the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

BACKENDS_VARIABLE = "RPC_BACKENDS"


def backend_addresses(
    backends: Mapping[str, Any] | str | Iterable[Mapping[str, Any] | str] | None,
) -> tuple[str, ...]:
    """``host:port`` of each named worker, from ``backends`` or the environment (separated by commas).

    Raises:
        ValueError: one is not ``{"host": …, "port": …}`` or ``host:port``.
    """
    if backends is None:
        backends = os.environ.get(BACKENDS_VARIABLE, "")
    if isinstance(backends, str):
        backends = [part.strip() for part in backends.split(",") if part.strip()]
    elif isinstance(backends, Mapping) or not isinstance(backends, Iterable):
        backends = [backends]
    found = []
    for backend in backends:
        if isinstance(backend, Mapping):
            host, port = backend.get("host"), backend.get("port", 50052)
        else:
            host, _, port = str(backend).rpartition(":")
        if not host or not str(port).isdigit():
            raise ValueError(f'an RPC backend is {{"host": "…", "port": 50052}}, not {backend!r}')
        found.append(f"{host}:{port}")
    return tuple(found)
