"""An engine's response in progress, as a stream of bytes."""

from __future__ import annotations

from io import BytesIO
from typing import Protocol

from sollold.cluster.net.pour import Receiver
from sollold.errors import Fault, Refusal
from sollold.serving.protocol import ResponseHead, StreamError


class Stream(Protocol):
    """An engine's response in progress, whether the engine is local or remote."""

    head: ResponseHead | None
    """The engine's status; None until the engine has begun to respond."""

    async def pour(self, receive: Receiver[bytes]) -> bool:
        """Pass on the body in pieces, as described in `sollold.cluster.net.pour`.

        Raises:
            StreamError: it broke off.
        """
        ...

    def abort(self, error: StreamError) -> None:
        """Break off the stream from outside: its reader gets ``error``."""
        ...

    async def close(self) -> None:
        """End the generation unless finished, and free its slot. May be called twice."""
        ...


async def whole(stream: Stream, limit: int = 256 * 1024 * 1024) -> bytes:
    """Read and return the whole body.

    Raises:
        StreamError: the stream broke off.
        Refusal: ENGINE, if it is longer than ``limit`` bytes, as it would be from another engine.
    """
    # BytesIO grows in place and returns its content without a copy; copying a long body would block the loop.
    body = BytesIO()

    def receive(chunk: bytes) -> bool:
        if body.tell() + len(chunk) > limit:
            raise Refusal(Fault.ENGINE, f"the answer is longer than {limit} bytes", status=502)
        body.write(chunk)
        return True

    await stream.pour(receive)
    return body.getvalue()
