"""Incremental parser of an engine's HTTP/1.1 response. Sans-I/O.

httptools parses it (llhttp, RFC 9112); further requirements are checked here.
"""

from __future__ import annotations

from httptools import HttpParserError, HttpResponseParser

_MAX_BARE_BYTES = 64 * 1024
"""Maximum bytes without any body data: of a head, or between chunks."""


class BadResponse(ValueError):
    """The received bytes are not a valid HTTP response."""


class ResponseParser:
    """Parses the responses on one connection.

    Attributes:
        status: status of the response; 0 until its head is complete.
        done: the response is complete.
        keep: the connection may be reused once the response is complete.
    """

    def __init__(self) -> None:
        self._parser = HttpResponseParser(self)
        self._body: list[bytes] = []
        self.begin()

    def begin(self) -> None:
        """Expect a response, the first or the next one on a connection that was kept."""
        self.status = 0
        self.done = False
        self.keep = False
        self._bare = 0
        self._to_the_end = True
        """Whether the body ends with the connection."""

    def feed(self, data: bytes) -> bytes:
        """Parse received bytes; return those of the body.

        Raises:
            BadResponse: it is not valid HTTP, or continues after the end of the response.
        """
        body = self._body
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise BadResponse(str(error.__context__ or error)) from None
        if body:
            self._bare = 0
            whole = body[0] if len(body) == 1 else b"".join(body)
            body.clear()
            return whole
        self._bare += len(data)
        if self._bare > _MAX_BARE_BYTES and not self.done:
            raise BadResponse("64 KiB without body data")
        return b""

    def feed_eof(self) -> bool:
        """Handle the end of the connection. Returns whether the response is complete."""
        self.done = self.done or (self.status > 0 and self._to_the_end)
        return self.done

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Start a response, possibly after an interim one (100 to 199)."""
        if self.done:
            raise BadResponse("data after the end of the response")
        self._to_the_end = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Check a header or trailer."""
        name = name.lower()
        if name == b"transfer-encoding" and value.lower() != b"chunked":
            raise BadResponse(f"Transfer-Encoding {value[:40].decode('latin-1')}")
        if name in (b"transfer-encoding", b"content-length"):
            self._to_the_end = False

    def on_headers_complete(self) -> None:
        """Note the status of a final response."""
        status = self._parser.get_status_code()
        if status >= 200:
            self.status, self.keep = status, self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """Collect a part of the body."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Note the end of a final response."""
        self.done = self.status > 0
