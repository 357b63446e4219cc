"""Host names that this node accepts: requests of pages with DNS names for a node (DNS rebinding) are refused.

A browser treats two names of one address as two origins, and lets a page read responses from its own name. So
the name in ``Host`` decides: accepted are addresses, names that exist only in a local network, the nodes' own
names, and those in the settings.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable, Iterable

from aiohttp import web

_LOCAL = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
"""No registry assigns these, so nobody outside can point one at a node."""
_MULTICAST = ".local"
"""Any machine on the LAN can claim such a name by mDNS, and point it at another machine's loopback."""


class Hosts:
    """The accepted names, which change with the settings and the nodes.

    Attributes:
        allowed: names in the settings; ``*.example.com`` means all names below it, ``*`` every name.
    """

    def __init__(self, allowed: tuple[str, ...], nodes: Callable[[], Iterable[str]]) -> None:
        """``nodes`` returns the names of this node and its peers."""
        self.allowed = allowed
        self._nodes = nodes

    def accepts(self, host: str, *, local: bool = False) -> bool:
        """Whether ``host``, the value of the header with or without a port, is a name of this node.

        ``local``: the request comes from this machine and needs no key, so the only ``.local`` name accepted
        is the machine's own, for which its mDNS responder accepts no answer of another machine.
        """
        name = _name(host)
        if name is None:
            return False
        if _is_local(name) and not (local and name.endswith(_MULTICAST) and name != _multicast_name()):
            return True
        return any(_matches(name, pattern) for pattern in self.allowed) or any(
            name == as_sent(node) for node in self._nodes()
        )


HOSTS = web.AppKey("hosts", Hosts)
"""The application's `Hosts`."""


def cross_site(request: web.Request) -> bool:
    """Whether a page of another site made a browser send ``request`` without an ``Origin``.

    An ``Origin`` names the page, and is checked separately. Following a link to a page does not count.
    """
    headers = request.headers
    sites = headers.getall("Sec-Fetch-Site", ())
    if "Origin" in headers or all(site.strip().lower() != "cross-site" for site in sites):
        return False
    is_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return not (is_link and request.method in ("GET", "HEAD"))


@functools.lru_cache(1024)
def _name(host: str) -> str | None:
    """Return the name in a ``Host`` header, in lower case without port and final dot; None if malformed."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        # Brackets enclose an address with colons.
        if not bracket or ":" not in name or (port and not _is_port(port)):
            return None
        return name
    name, colon, port = host.rpartition(":")
    if not colon:
        name = host
    elif not _is_port(":" + port):
        return None
    return as_sent(name.removesuffix(".")) or None


def _is_port(text: str) -> bool:
    digits = text.removeprefix(":")
    return text != digits and (not digits or (digits.isascii() and digits.isdigit() and len(digits) <= 5))


@functools.lru_cache(1024)
def _is_local(name: str) -> bool:
    """Whether ``name`` is an address, or refers to the local machine or network wherever it is resolved."""
    if name == "localhost" or name.endswith(_LOCAL):
        return True
    address, zone, _ = name.partition("%")
    try:
        return ipaddress.ip_address(address).version == 6 or not zone
    except ValueError:
        return False


def _multicast_name() -> str:
    """Return this machine's name in mDNS."""
    return as_sent(socket.gethostname().partition(".")[0]) + _MULTICAST


@functools.lru_cache(4096)
def as_sent(name: str) -> str:
    """Return ``name`` as browsers send it: in lower case, and in ASCII (IDNA)."""
    if name.isascii():
        return name.lower()
    try:
        return name.lower().encode("idna").decode("ascii")
    except UnicodeError:
        return name.lower()


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return name.endswith(f".{as_sent(pattern[2:])}")
    return pattern == "*" or name == as_sent(pattern).removesuffix(".")
