"""Where a request comes from: the machine itself, another one, or a proxy that says for whom it asks."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence

from aiohttp import web
from multidict import istr

from sollold.cluster.net.acceptor import is_loopback
from sollold.facts import dataclass

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_FORWARDED = tuple(
    istr(name)
    for name in (
        *("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "X-Forwarded-Proto"),
        *("X-Forwarded-Port", "X-Forwarded-Server", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP"),
        *("X-Cluster-Client-IP", "Tailscale-User-Login"),
    )
)
"""Headers of proxies and tunnels: who sends one asks for somebody else."""


@dataclass(frozen=True, slots=True)
class ClientAddress:
    """The address of a caller. ``local``: it is a program of this machine, asking for itself."""

    address: str
    local: bool


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Addresses and networks as the settings write them; each was checked when they were read."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def address_of(request: web.Request, proxies: Sequence[Network]) -> ClientAddress:
    """Where ``request`` comes from.

    From a configured proxy it is the last address of ``X-Forwarded-For`` that is no proxy of ours. A proxy
    that is not configured is a stranger, also on this machine: it asks for people who are not.
    """
    remote = request.remote or ""
    forwarded, headers = False, request.headers
    for name in _FORWARDED:
        if name in headers:
            forwarded = True
            break
    if not remote:
        return ClientAddress("local", not forwarded)
    address = _plain(remote)
    if forwarded:
        return ClientAddress(_forwarded(request, address, proxies), False)
    return ClientAddress(address, is_loopback(address) or address == _own_address(request))


def _own_address(request: web.Request) -> str:
    """Our end of the connection: a caller with the same address is on this machine."""
    transport = request.transport
    name = transport.get_extra_info("sockname") if transport is not None else None
    return _plain(str(name[0])) if isinstance(name, tuple) else ""


def _forwarded(request: web.Request, address: str, proxies: Sequence[Network]) -> str:
    if not _within(address, proxies):
        return address
    listed = ",".join(request.headers.getall("X-Forwarded-For", []))
    for one in reversed(listed.split(",")):
        try:
            found = str(ipaddress.ip_address(_without_port(one.strip())))
        except ValueError:
            break
        address = _plain(found)
        if not _within(address, proxies):
            break
    return address


def _without_port(text: str) -> str:
    """The address in ``address``, ``[address]``, ``address:port`` and ``[address]:port``."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


@functools.lru_cache(4096)
def _plain(address: str) -> str:
    """Without a zone; an IPv4 address that was mapped into IPv6 as IPv4."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def _within(address: str, networks: Sequence[Network]) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in networks)
