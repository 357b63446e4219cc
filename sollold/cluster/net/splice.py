"""Joins two connections: bytes received on one are sent on the other, at once and in order.

While one end accepts no bytes, the other is not read. When one end is closed or breaks, the other gets the
bytes in transit and is closed too. TLS has no half-closed state that all sides support, and a worker's
protocol needs none: a closed direction closes both.

An engine sends a request to a worker in about ten small writes. They are not coalesced: the first wakes the
other machine's daemon while the rest is still being written, and waiting for more costs a turn of the loop.
When they were coalesced by turns, by the protocol's frames or by the length of the last exchange, tokens
arrived 0.1 to 0.2 ms later each, though with half the wake-ups.
"""

from __future__ import annotations

import asyncio
from typing import cast

from sollold.facts import dataclass

_MAX_BUFFERED = 4 * 1024 * 1024
"""Buffered bytes for one end above which the other is not read."""
_LINGER_SECONDS = 5.0
"""Seconds for which a closing end may send its remaining bytes."""


@dataclass(slots=True)
class Traffic:
    """Number of bytes passed."""

    up: int = 0
    down: int = 0


class ProxyEnd(asyncio.Protocol):
    """One of two joined connections.

    Args:
        traffic: counter of the passed bytes.
        up: bytes received here go up (to the worker).
        delay: seconds for which bytes are delayed, to test slow networks.
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
        """Join with ``other``; both must be connected."""
        self._other, other._other = other, self
        for end in (self, other):
            early, end._early = end._early, []
            for data in early:
                end._forward(data)
        if self._ended or other._ended:
            self.close()
            other.close()

    @property
    def transport(self) -> asyncio.Transport:
        """This end's connection."""
        assert self._transport is not None
        return self._transport

    @property
    def ended(self) -> bool:
        """Whether this end's connection is closed or closing."""
        return self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_MAX_BUFFERED)

    def data_received(self, data: bytes) -> None:
        """Count received bytes and pass them on."""
        if self._up:
            self._traffic.up += len(data)
        else:
            self._traffic.down += len(data)
        if self._other is None:
            # Some event loops read once more after being told to pause.
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
        """Stop reading from the other end: this one accepts no more for now."""
        if self._other is not None and not self._other._ended:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read from the other end again."""
        if self._other is not None and not self._other._ended:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other end, too."""
        self._ended = True
        if self._other is not None:
            self._other._close_after(self._delay)

    def close(self) -> None:
        """Close this connection once its buffer is sent, or after a few seconds."""
        transport = self._transport
        if transport is not None and not self._ended:
            self._ended = True
            transport.close()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)

    def abort(self) -> None:
        """Close this connection immediately."""
        if self._transport is not None:
            self._transport.abort()

    def _close_after(self, delay: float) -> None:
        if delay:
            asyncio.get_running_loop().call_later(delay, self.close)
        else:
            self.close()
