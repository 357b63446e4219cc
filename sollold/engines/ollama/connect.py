"""Connects to an Ollama and checks that it is one that this node may manage as its own."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp

from sollold.engines.ollama.api import OllamaApi, is_here

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WrongAddress(Exception):
    """The server at this address is not this machine's Ollama; the message says what to set."""


async def connect(
    session: aiohttp.ClientSession, url: str, *, own_port: int, chosen: bool
) -> tuple[OllamaApi, str]:
    """Return a client for the Ollama at ``url``, and its version.

    Args:
        own_port: port on which this daemon itself serves Ollama's API.
        chosen: ``url`` comes from the settings, so it may be on another machine.

    Raises:
        WrongAddress: it is this daemon, another sollold, or another machine's Ollama.
        OllamaError: no Ollama answers.
    """
    parts = urlsplit(url)
    if own_port and parts.port == own_port and parts.hostname in _LOOPBACK:
        raise WrongAddress(f"{url} is this daemon itself; set ollama.url to where Ollama listens.")
    api = OllamaApi(session, url)
    version = await api.version()
    if await api.is_ours():
        raise WrongAddress(f"{url} is a sollold, not an Ollama; set ollama.url to where Ollama listens.")
    if not chosen and not await asyncio.to_thread(is_here, url):
        # Another machine's memory must not be counted here, and its models must not be unloaded from here.
        raise WrongAddress(
            f"OLLAMA_HOST names {url}, which is another machine; run sollold there, "
            "or set ollama.url if that Ollama is on this machine after all."
        )
    return api, version
