"""An engine's answer under way, as bytes."""

from __future__ import annotations

from io import BytesIO
from typing import Protocol

from sollold.cluster.net.pour import Receiver
from sollold.serving.protocol import ErrorKind, ResponseHead, StreamError


class Stream(Protocol):
    """An engine's answer under way, wherever the engine is."""

    head: ResponseHead | None
    """The engine's status; None until the engine has begun to answer."""

    async def pour(self, receive: Receiver[bytes]) -> bool:
        """Hand on the body in pieces, as `sollold.cluster.net.pour` says.

        Raises:
            StreamError: it broke off.
        """
        ...

    def abort(self, error: StreamError) -> None:
        """Break it off from outside: its reader gets ``error``. For a stream that has begun."""
        ...

    async def close(self) -> None:
        """End the generation, if it is not at its end, and free its slot. May be called twice."""
        ...


async def whole(stream: Stream, limit: int = 256 * 1024 * 1024) -> bytes:
    """The whole body.

    Raises:
        StreamError: it broke off, or is longer than ``limit`` bytes.
    """
    # Grows in place and gives what it holds without a copy, which of a long one would stop the loop.
    body = BytesIO()

    def receive(chunk: bytes) -> bool:
        if body.tell() + len(chunk) > limit:
            raise StreamError(ErrorKind.ENGINE, f"the answer is longer than {limit} bytes")
        body.write(chunk)
        return True

    await stream.pour(receive)
    return body.getvalue()
