"""Resolves the names of servers on the internet: within seconds, and not into the local network."""

from __future__ import annotations

import asyncio
import socket
from contextvars import ContextVar
from ipaddress import ip_address
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from sollold.models.stores.threads import in_own_thread

_ATTEMPT_SECONDS = 1.5
"""Seconds after which a second lookup is started: a lost packet is repeated only after 5 s."""
_ATTEMPTS = 2
_LOCAL = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
"""Suffixes of host names in local networks."""
_NO_ANSWER = (
    "no DNS server answers; check this machine's internet connection, and the DNS servers in "
    "/etc/resolv.conf (`resolvectl status`)"
)

_Info = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""An address as `socket.getaddrinfo` returns it."""

redirecting = ContextVar("redirecting", default="")
"""Host of the server that redirects the current request; empty: it is not redirected."""


class Resolver(AbstractResolver):
    """Resolves host names; the target of a redirect from the internet must not be in the local network."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a host.

        Raises:
            OSError: it can't be resolved, or one of its addresses must not be used.
        """
        found = await _look_up(host, port, family)
        origin = redirecting.get()
        inside = next((result["host"] for result in found if is_inside(result["host"])), "")
        if origin and inside and not await _resolves_inside(origin):
            reason = f"{origin} redirects to it, but it is in a local network ({inside}): not followed"
            raise OSError(-1, reason)
        return found

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""


async def _resolves_inside(host: str) -> bool:
    if is_inside(host):
        return True
    try:
        found = await _look_up(host, 0, socket.AF_UNSPEC)
    except OSError:
        return False
    return any(is_inside(result["host"]) for result in found)


async def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    """Return the addresses of a host.

    Raises:
        OSError: it has none, or no DNS server answers.
    """

    def work() -> list[_Info]:
        flags = socket.AI_ADDRCONFIG
        return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=flags))

    lookups: set[asyncio.Future[list[_Info]]] = set()
    for _ in range(_ATTEMPTS):
        lookups.add(in_own_thread(work, name=f"look up {host}"))
        done, _ = await asyncio.wait(lookups, timeout=_ATTEMPT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return [_result(host, info) for info in _infos(done.pop())]
    raise OSError(-1, _NO_ANSWER)


def _infos(lookup: asyncio.Future[list[_Info]]) -> list[_Info]:
    try:
        return lookup.result()
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise OSError(-1, _NO_ANSWER) from None
        raise


def _result(host: str, info: _Info) -> ResolveResult:
    family, _, protocol, _, address = info
    text = str(address[0])
    if len(address) == 4 and address[3] and "%" not in text:
        text = f"{text}%{address[3]}"
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(
        hostname=host, host=text, port=int(address[1]), family=family, proto=protocol, flags=flags
    )


def is_inside(host: str) -> bool:
    """Return whether ``host`` is this machine, a local name, or an address that is not public."""
    host = host.rstrip(".")
    try:
        return not ip_address(host.partition("%")[0]).is_global
    except ValueError:
        pass
    try:
        # The system's resolver also accepts 2130706433, 127.1 and 0x7f000001 as addresses.
        return not ip_address(socket.inet_aton(host)).is_global
    except OSError:
        return host == "localhost" or host.endswith(_LOCAL)
