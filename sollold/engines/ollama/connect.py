"""Whether an Ollama answers at an address, and is one that this node may count as its own."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp

from sollold.engines.ollama.api import OllamaApi, is_here

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WrongAddress(Exception):
    """What is there is not this machine's Ollama; a sentence says what to set."""


async def connect(
    session: aiohttp.ClientSession, url: str, *, own_port: int, chosen: bool
) -> tuple[OllamaApi, str]:
    """The Ollama at ``url`` and its version.

    Args:
        own_port: where this daemon itself speaks Ollama's API.
        chosen: the settings name ``url``: it may be on another machine.

    Raises:
        WrongAddress: see there.
        OllamaError: none answers.
    """
    parts = urlsplit(url)
    if own_port and parts.port == own_port and parts.hostname in _LOOPBACK:
        raise WrongAddress(f"{url} is this daemon itself; set ollama.url to where Ollama listens.")
    api = OllamaApi(session, url)
    version = await api.version()
    if await api.is_ours():
        raise WrongAddress(f"{url} is a sollold, not an Ollama; set ollama.url to where Ollama listens.")
    if not chosen and not await asyncio.to_thread(is_here, url):
        # Its memory is not this machine's to count, nor are its models this machine's to unload.
        raise WrongAddress(
            f"OLLAMA_HOST names {url}, which is another machine; run sollold there, "
            "or set ollama.url if that Ollama is on this machine after all."
        )
    return api, version
