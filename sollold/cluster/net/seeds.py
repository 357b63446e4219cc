"""Static seeds: ``host:port`` from the settings, and their resolution."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.open_sockets import literal
from sollold.facts import dataclass

log = logging.getLogger("sollold.cluster")

_RESOLVE_SECONDS = 10.0


class BadSeed(ValueError):
    """A seed in the settings is not ``host`` or ``host:port``."""


@dataclass(frozen=True, slots=True)
class Seed:
    """Address of a node, as named in the settings."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str, port: int) -> Seed:
        """Parse ``host``, ``host:port``, ``[IPv6]:port`` or a bare IPv6 address; ``port`` is the default.

        Raises:
            BadSeed: the string is invalid.
        """
        host, given = text.strip(), ""
        if host.startswith("["):
            host, closed, given = host[1:].partition("]")
            if not closed or (given and not given.startswith(":")):
                raise BadSeed(f"cluster.seeds: {text!r} is not [address]:port")
            given = given[1:]
        elif host.count(":") == 1:
            host, _, given = host.partition(":")
        if not host or (given and not (given.isascii() and given.isdigit() and 0 < int(given) < 65536)):
            raise BadSeed(f"cluster.seeds: {text!r} is not host:port")
        return cls(host, int(given) if given else port)


async def resolve(seed: Seed) -> tuple[Address, ...]:
    """Return the addresses of a seed; none, with a log message, if it cannot be resolved."""
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(
                seed.host, seed.port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError, UnicodeError) as error:
        log.info("the seed %s can't be resolved: %s", seed.host, error or "no answer")
        return ()
    return tuple(dict.fromkeys(literal(place) for *_, place in found))


def read_seeds(texts: Sequence[str], port: int) -> tuple[Seed, ...]:
    """Parse all seeds of the settings.

    Raises:
        BadSeed: one is invalid.
    """
    return tuple(Seed.read(text, port) for text in texts)
