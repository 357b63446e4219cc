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
        host, digits = text.strip(), ""
        if host.startswith("["):
            host, closed, digits = host[1:].partition("]")
            if not closed or (digits and not digits.startswith(":")):
                raise BadSeed(f"cluster.seeds: {text!r} is not [address]:port")
            digits = digits[1:]
        elif host.count(":") == 1:
            host, _, digits = host.partition(":")
        if not host or (digits and not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536)):
            raise BadSeed(f"cluster.seeds: {text!r} is not host:port")
        return cls(host, int(digits) if digits else port)


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
    return tuple(dict.fromkeys(literal(address) for *_, address in found))


def read_seeds(texts: Sequence[str], port: int) -> tuple[Seed, ...]:
    """Parse all seeds of the settings.

    Raises:
        BadSeed: one is invalid.
    """
    return tuple(Seed.read(text, port) for text in texts)
