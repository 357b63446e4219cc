"""llama.cpp RPC workers that others started, as a program or the environment names them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

BACKENDS_VARIABLE = "RPC_BACKENDS"


def backend_addresses(backends: Sequence[Mapping[str, Any] | str] | None) -> tuple[str, ...]:
    """``host:port`` of each worker that is named, here or in the environment.

    Raises:
        ValueError: one is not ``{"host": …, "port": …}`` or ``host:port``.
    """
    if backends is None:
        named = os.environ.get(BACKENDS_VARIABLE, "")
        backends = [part.strip() for part in named.split(",") if part.strip()]
    found = []
    for one in backends:
        if isinstance(one, Mapping):
            host, port = one.get("host"), one.get("port", 50052)
        else:
            host, _, port = one.rpartition(":")
        if not host or not str(port).isdigit():
            raise ValueError(f'an RPC backend is {{"host": "…", "port": 50052}}, not {one!r}')
        found.append(f"{host}:{port}")
    return tuple(found)
