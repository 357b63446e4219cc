"""An engine's HTTP/1.1 answer, read as it comes. Sans-I/O.

httptools reads it (llhttp, RFC 9112); what an answer has to keep to beyond that stands here.
"""

from __future__ import annotations

from httptools import HttpParserError, HttpResponseParser

_LONGEST = 64 * 1024
"""Bytes in which nothing of a body comes: of a head, or between chunks."""


class BadAnswer(ValueError):
    """What came is no answer in HTTP."""


class ResponseParser:
    """Reads one answer.

    Attributes:
        status: of the answer; 0 until its head is whole.
        done: the answer is whole.
        keep: the connection may be used once more, when the answer is whole.
    """

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.keep = False
        self._parser = HttpResponseParser(self)
        self._body: list[bytes] = []
        self._bare = 0
        self._to_the_end = True
        """The body ends with the connection."""

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in ``data``.

        Raises:
            BadAnswer: it is no answer in HTTP, or goes on after its end.
        """
        body = self._body
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise BadAnswer(str(error.__context__ or error)) from None
        if body:
            self._bare = 0
            whole = body[0] if len(body) == 1 else b"".join(body)
            body.clear()
            return whole
        self._bare += len(data)
        if self._bare > _LONGEST and not self.done:
            raise BadAnswer("a head that does not end")
        return b""

    def feed_eof(self) -> bool:
        """The connection was closed; whether the answer is whole with it."""
        self.done = self.done or (self.status > 0 and self._to_the_end)
        return self.done

    # Called by the parser.

    def on_message_begin(self) -> None:
        """An answer, or a further one after one that was only provisional (100 to 199)."""
        if self.done:
            raise BadAnswer("more than the announced answer")
        self._to_the_end = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer."""
        name = name.lower()
        if name == b"transfer-encoding" and value.lower() != b"chunked":
            raise BadAnswer(f"Transfer-Encoding {value[:40].decode('latin-1')}")
        if name in (b"transfer-encoding", b"content-length"):
            self._to_the_end = False

    def on_headers_complete(self) -> None:
        """The head is whole."""
        status = self._parser.get_status_code()
        if status >= 200:
            self.status, self.keep = status, self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self.done = self.status > 0
