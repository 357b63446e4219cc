"""Determines where a request comes from: this machine, another one, or a client behind a proxy."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence

import msgspec
from aiohttp import web
from multidict import istr

from sollold.cluster.net.acceptor import is_loopback

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_FORWARDED = tuple(
    istr(name)
    for name in (
        *("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "X-Forwarded-Proto"),
        *("X-Forwarded-Port", "X-Forwarded-Server", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP"),
        *("X-Cluster-Client-IP", "Tailscale-User-Login"),
    )
)
"""Headers of proxies and tunnels: a sender of one forwards another client's request."""


class ClientAddress(msgspec.Struct, frozen=True):
    """The address of a caller. ``local``: it is a program on this machine, with a request of its own."""

    address: str
    local: bool


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Parse addresses and networks of the settings, which were checked when they were read."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def address_of(request: web.Request, proxies: Sequence[Network]) -> ClientAddress:
    """Return where ``request`` comes from.

    Behind a configured proxy it is the last address in ``X-Forwarded-For`` that is not a configured proxy.
    Any other proxy counts as remote, even on this machine: it forwards requests from elsewhere.
    """
    remote = request.remote or ""
    forwarded, headers = False, request.headers
    for name in _FORWARDED:
        if name in headers:
            forwarded = True
            break
    if not remote:
        return ClientAddress("local", not forwarded)
    address = _normalize(remote)
    if forwarded:
        return ClientAddress(_forwarded(request, address, proxies), False)
    return ClientAddress(address, is_loopback(address) or address == _own_address(request))


def _own_address(request: web.Request) -> str:
    """Return the address of our end of the connection: a caller with the same one is on this machine."""
    transport = request.transport
    name = transport.get_extra_info("sockname") if transport is not None else None
    return _normalize(str(name[0])) if isinstance(name, tuple) else ""


def _forwarded(request: web.Request, address: str, proxies: Sequence[Network]) -> str:
    if not _is_within(address, proxies):
        return address
    header = ",".join(request.headers.getall("X-Forwarded-For", []))
    for hop in reversed(header.split(",")):
        try:
            parsed = str(ipaddress.ip_address(_without_port(hop.strip())))
        except ValueError:
            break
        address = _normalize(parsed)
        if not _is_within(address, proxies):
            break
    return address


def _without_port(text: str) -> str:
    """Return the address in ``address``, ``[address]``, ``address:port`` or ``[address]:port``."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


@functools.lru_cache(4096)
def _normalize(address: str) -> str:
    """Return an address without its zone, and an IPv4-mapped IPv6 address as IPv4."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _is_within(address: str, networks: Sequence[Network]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
