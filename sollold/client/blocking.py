"""A blocking client of one node that uses only the standard library, so that it imports in milliseconds."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from sollold.client.errors import ClientError, NodeSilent, error_text, no_answer, no_daemon
from sollold.client.login import headers_of, login_wanted, split_login
from sollold.client.trust import distrust, trusted

_CONNECT_SECONDS = 5.0
_MAX_LINE_BYTES = 64 << 20
_NODE_OPTION = "--node"
"""How a user of the command line names another node."""


class BlockingClient:
    """A client of one node, with one connection per request. Thread-safe.

    Args:
        url: URL of the node (``http://pc2:11435``); may include a login for a proxy in front of it.
        timeout: limit for a response that is not streamed, in seconds.
        key: API key, if the node requires one.
        credentials: called for a key if the node requires one and ``key`` is empty, and again whenever that
            key has expired; may return "".
        authority: called for an additional CA certificate in PEM for HTTPS; may return "".

    Raises:
        ClientError: ``url`` is not an HTTP URL.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        key: str = "",
        credentials: Callable[[], str] | None = None,
        authority: Callable[[], str] | None = None,
    ) -> None:
        self.url, self._login = split_login(url.rstrip("/"))
        self._timeout = timeout
        self._key = key
        self._credentials = credentials if not key else None
        self._authority = authority
        self._context: ssl.SSLContext | None = None
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise ClientError(f"invalid URL {self.url!r}: {error}", 400) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or " " in parts.hostname:
            raise ClientError(f"invalid URL {self.url!r}: it should look like http://HOST:11435", 400)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._secure else 80)
        self._base = parts.path

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """Get the JSON object at ``path``.

        Raises:
            ClientError: no response, an error response, or the server is not sollold.
        """
        return self._whole("GET", path, None, timeout or self._timeout)

    def post(self, path: str, body: object, *, timeout: float | None = None) -> Any:
        """POST JSON and return the JSON response (None if empty).

        Raises:
            ClientError: see `get`.
        """
        return self._whole("POST", path, body, timeout or self._timeout)

    def delete(self, path: str, body: object) -> Any:
        """DELETE with a JSON body.

        Raises:
            ClientError: see `get`.
        """
        return self._whole("DELETE", path, body, self._timeout)

    def text(self, path: str) -> str:
        """Get the text at ``path``.

        Raises:
            ClientError: see `get`.
        """
        connection, answer = self._open("GET", path, None, self._timeout)
        with closing(connection):
            return self._read(answer).decode(errors="replace")

    def stream(
        self, path: str, body: object, *, stall: float = 900.0
    ) -> Generator[dict[str, Any], None, None]:
        """POST JSON and yield one object per line as they arrive; ``stall``: maximum silence in seconds.

        Closing the iterator ends the request at the node.

        Raises:
            ClientError: see `get`; also for a line with ``error``.
        """
        connection, answer = self._open("POST", path, body, stall)
        with closing(connection):
            data: dict[str, Any] | None = None
            while line := self._line(answer):
                if line.strip():
                    data = self._object(line, answer.status)
                    if "error" in data:
                        code = data.get("code")
                        raise ClientError(error_text(data), code if isinstance(code, int) else answer.status)
                    yield data
            # To `readline` a connection that breaks between two chunks, or before the first, looks like the
            # end: a partial response would pass for a complete one.
            if data is None or (answer.chunked and answer.chunk_left is not None):
                raise self._cut_off(EOFError("it ended before the end of the answer"))

    def events(self, path: str, *, stall: float = 900.0) -> Generator[tuple[str, Any], None, None]:
        """Yield server-sent events of ``path`` as they arrive: (event name, its JSON).

        Raises:
            ClientError: see `get`.
        """
        connection, answer = self._open("GET", path, None, stall)
        name, data = "", ""
        with closing(connection):
            while raw := self._line(answer):
                line = raw.decode(errors="replace").rstrip("\r\n")
                field, _, value = line.partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data += value.strip()
                elif not line and data:
                    try:
                        yield name, json.loads(data)
                    except ValueError:
                        raise self._not_sollold("it sends no JSON", answer.status) from None
                    name, data = "", ""

    def _whole(self, method: str, path: str, body: object, timeout: float) -> Any:
        connection, answer = self._open(method, path, body, timeout)
        with closing(connection):
            data = self._read(answer)
        return self._object(data, answer.status) if data.strip() else None

    def _open(
        self, method: str, path: str, body: object, timeout: float, *, renew: bool = True
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = headers_of(self._login, self._key)
        if data is not None:
            headers["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            self._connect(connection)
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            connection.request(method, self._base + path, body=data, headers=headers)
            answer = connection.getresponse()
        except TimeoutError as error:
            connection.close()
            raise NodeSilent(no_answer(self.url, timeout, _NODE_OPTION)) from error
        # A host name with an empty or a long part can't be encoded.
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        if answer.status == 401 and renew and self._credentials is not None:
            self._key = self._credentials()
            if self._key:
                connection.close()
                return self._open(method, path, body, timeout, renew=False)
            self._credentials = None
        if answer.status >= 400:
            with closing(connection):
                raise self._refused(answer)
        return connection, answer

    def _connection(self) -> http.client.HTTPConnection:
        if self._secure:
            if self._context is None:
                self._context = trusted(self._authority() if self._authority is not None else "")
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=_CONNECT_SECONDS, context=self._context
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_SECONDS)

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except TimeoutError as error:
            # No server there, unlike a response that does not come.
            raise self._unreachable(error) from error
        if connection.sock is not None:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _unreachable(self, error: BaseException) -> ClientError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ClientError(distrust(self.url, error.verify_message))
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ClientError(no_daemon(self.url, reason, _NODE_OPTION))

    def _refused(self, answer: http.client.HTTPResponse) -> ClientError:
        try:
            body = json.loads(self._read(answer))
        except (ValueError, ClientError):
            body = {}
        words = error_text(body)
        if not words and answer.status == 401:
            return ClientError(login_wanted(self.url), 401)
        if not words:
            return self._not_sollold(f"it answers with HTTP status {answer.status}", answer.status)
        return ClientError(words, answer.status)

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._cut_off(error) from error

    def _line(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            line = answer.readline(_MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._cut_off(error) from error
        if len(line) >= _MAX_LINE_BYTES:
            raise self._not_sollold("its lines have no end", answer.status)
        return line

    def _cut_off(self, error: BaseException) -> ClientError:
        status = 504 if isinstance(error, TimeoutError) else 502
        reason = str(error) or type(error).__name__
        return ClientError(f"the connection to {self.url} was lost: {reason}", status)

    def _object(self, data: bytes, status: int) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._not_sollold("it sends no JSON object", status)
        return value

    def _not_sollold(self, reason: str, status: int) -> ClientError:
        return ClientError(f"what answers at {self.url} is not sollold: {reason}", status)
