"""Two connections joined: what comes in at one goes out at the other, at once and in order.

When one end stops taking bytes, the other is not read until it takes them again. When one end is closed
or breaks, the other gets what is on the way and is closed too. TLS has no half-closed state that all
sides support, and a worker's protocol needs none: a closed direction ends both.

An engine sends what it asks of a worker in about ten small writes. They are not gathered into one: the first
wakes the other machine's daemon while the rest is still being written, and to wait for more costs a turn of
the loop. Gathered by turns, by the protocol's own frames or by the length of the last exchange, an answer's
tokens came 0.1 to 0.2 ms later each, though with half the wake-ups.
"""

from __future__ import annotations

import asyncio
from typing import cast

from sollold.facts import dataclass

_HIGH = 4 * 1024 * 1024
"""Bytes that may wait for one end before the other is not read any more."""
_LINGER_SECONDS = 5.0
"""Given to an end that is being closed for taking what is left."""


@dataclass(slots=True)
class Traffic:
    """Bytes that went through."""

    up: int = 0
    down: int = 0


class ProxyEnd(asyncio.Protocol):
    """One of the two ends.

    Args:
        traffic: counted here.
        up: what is received here goes up (to the worker).
        delay: seconds that bytes are held back, for tests of slow networks.
    """

    def __init__(self, traffic: Traffic, *, up: bool, delay: float = 0.0) -> None:
        self._traffic = traffic
        self._up = up
        self._delay = delay
        self._transport: asyncio.Transport | None = None
        self._other: ProxyEnd | None = None
        self._ended = False
        self._early: list[bytes] = []

    def join(self, other: ProxyEnd) -> None:
        """From now on both belong together. Both have their connections."""
        self._other, other._other = other, self
        for one in (self, other):
            early, one._early = one._early, []
            for data in early:
                one._forward(data)
        if self._ended or other._ended:
            self.close()
            other.close()

    @property
    def transport(self) -> asyncio.Transport:
        """The connection of this end."""
        assert self._transport is not None
        return self._transport

    @property
    def ended(self) -> bool:
        """Whether this end's connection is gone, or is being closed."""
        return self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        if self._up:
            self._traffic.up += len(data)
        else:
            self._traffic.down += len(data)
        if self._other is None:
            # Some event loops read once more after they were told to pause.
            self._early.append(data)
            self.transport.pause_reading()
        else:
            self._forward(data)

    def _forward(self, data: bytes) -> None:
        if self._delay:
            asyncio.get_running_loop().call_later(self._delay, self._write, data)
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        other = self._other
        if other is not None and not other._ended and not other.transport.is_closing():
            other.transport.write(data)

    def pause_writing(self) -> None:
        """This end takes no more for now."""
        if self._other is not None and not self._other._ended:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """This end takes bytes again."""
        if self._other is not None and not self._other._ended:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._ended = True
        if self._other is not None:
            self._other._close_after(self._delay)

    def close(self) -> None:
        """End this connection after what waits for it is sent; soon in any case."""
        transport = self._transport
        if transport is not None and not self._ended:
            self._ended = True
            transport.close()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)

    def abort(self) -> None:
        """End this connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _close_after(self, delay: float) -> None:
        if delay:
            asyncio.get_running_loop().call_later(delay, self.close)
        else:
            self.close()
