"""How a client finds its first node: by argument, environment, on this machine, or on the LAN."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

from sollold.client.login import split_login
from sollold.tasks import cancel_and_wait

NODE_VARIABLE = "SOLLOLD_NODE_URL"
PORT = 11435
HERE = f"http://127.0.0.1:{PORT}"
_SERVICE = "_sollold._tcp.local."
_LISTEN_SECONDS = 2.5
_ENOUGH_SECONDS = 0.3
"""Seconds to wait for more nodes after the first."""


def url_of(node: str | Mapping[str, object]) -> str:
    """The URL of a node given as a URL, as ``host``, ``host:port`` or as ``{"host": …, "port": …}``.

    Raises:
        TypeError, ValueError: ``node`` is none of these.
    """
    if isinstance(node, Mapping):
        if "url" in node:
            return url_of(str(node["url"]))
        host, port = node.get("host"), node.get("port", PORT)
        if not isinstance(host, str) or not host:
            raise ValueError(f'a node needs a "host": {dict(node)}')
        return _checked(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    if node is None or isinstance(node, int | float | bytes):
        raise TypeError(f'a node is a URL, "host:port" or {{"host": …, "port": …}}, not {node!r}')
    text = str(node).strip().rstrip("/")
    if not text:
        raise ValueError("the address of a node is empty")
    return _checked(_with_port(text))


def _with_port(text: str) -> str:
    """An address as a URL, with the default port if it has none."""
    if "://" in text:
        return text
    if text.count(":") > 1 and not text.startswith("["):
        return f"http://[{text}]:{PORT}"
    _, colon, port = text.rpartition(":")
    if colon and port.isdigit() and "]" not in port:
        return f"http://{text}"
    return f"http://{text}:{PORT}"


def _checked(url: str) -> str:
    """Check that ``url`` can be a node's.

    Raises:
        ValueError: it is not a valid HTTP URL.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and not (parts.query or parts.fragment)
    except ValueError as error:
        raise ValueError(f"{split_login(url)[0]} is not a node's URL: {error}") from None
    if not usable:
        raise ValueError(f"{split_login(url)[0]} is not a node's URL; write http://HOST:{PORT}")
    return url


def urls_of(node: str | Mapping[str, object] | Iterable[str | Mapping[str, object]] | None) -> list[str]:
    """URLs of one node or several (in a string separated by commas); empty if none are named.

    Raises:
        TypeError, ValueError: as `url_of`.
    """
    if node is None:
        return []
    if isinstance(node, str):
        return [url_of(part) for part in node.split(",") if part.strip()]
    if isinstance(node, Mapping | bytes) or not isinstance(node, Iterable):
        return [url_of(node)]
    return [url_of(n) for n in node]


def named_in_environment(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The nodes of ``$SOLLOLD_NODE_URL``."""
    return urls_of(environ.get(NODE_VARIABLE, ""))


async def on_the_lan(seconds: float = _LISTEN_SECONDS) -> list[str]:
    """URLs of the nodes found by mDNS, from the addresses they announce; empty if multicast fails.

    They announce the port for nodes, so the default HTTP port is assumed; other nodes are learned from these.
    """
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

    found_urls: list[str] = []
    asking: set[asyncio.Task[None]] = set()
    found = asyncio.Event()

    async def resolve(zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(_SERVICE, name)
        if await info.async_request(zeroconf, int(seconds * 1000)):
            found_urls.extend(_urls(info.parsed_addresses(), secure=b"https" in info.properties))
            found.set()

    def heard(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Added and len(asking) < 64:
            asking.add(asyncio.get_running_loop().create_task(resolve(zeroconf, name)))

    try:
        zeroconf = AsyncZeroconf()
    except OSError:
        return []
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, _SERVICE, handlers=[heard])
        try:
            async with asyncio.timeout(seconds):
                await found.wait()
            await asyncio.sleep(_ENOUGH_SECONDS)
        except TimeoutError:
            pass
        await browser.async_cancel()
    finally:
        await cancel_and_wait(*asking)
        await zeroconf.async_close()
    # IPv4 first.
    return sorted(dict.fromkeys(found_urls), key=lambda url: "[" in url)


def _urls(hosts: Sequence[str], *, secure: bool) -> list[str]:
    """One URL per address, without link-local ones: they need a scope, which a URL can't carry."""
    usable = [host for host in hosts if not host.lower().startswith("fe80")]
    urls = [url_of({"host": host}) for host in usable]
    return [url.replace("http://", "https://", 1) for url in urls] if secure else urls
