"""A blocking client of one node that uses only the standard library, so that it imports in milliseconds."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sollold.client.errors import ClientError, NodeSilent, error_text, no_answer, no_daemon
from sollold.client.login import headers_of, login_wanted, split_login
from sollold.client.silence import HEALTH_SECONDS, HUNG_SECONDS, SilenceWatch
from sollold.client.trust import distrust, trusted

_CONNECT_SECONDS = 5.0
_MAX_LINE_BYTES = 64 << 20
_ENDED = "it ended before the end of the answer"
_NODE_OPTION = "--node"
"""How a user of the command line names another node."""


class _Exchange(NamedTuple):
    """A request whose response has begun."""

    connection: http.client.HTTPConnection
    answer: http.client.HTTPResponse
    watch: SilenceWatch

    def close(self) -> None:
        self.watch.end()
        self.connection.close()


class BlockingClient:
    """A client of one node, with one connection per request. Thread-safe.

    Args:
        url: URL of the node (``http://pc2:11435``); may include a login for a proxy in front of it.
        timeout: limit for a response that is not streamed, in seconds.
        key: API key, if the node requires one.
        credentials: called if the node requires a key and ``key`` is empty, and again whenever that has
            expired. Returns a key, or "", and the CA certificate in PEM of nodes that may get it: if ``url``
            is not HTTPS, it is sent over TLS nevertheless, which nodes offer on the same port.
        authority: called for an additional CA certificate in PEM for HTTPS; may return "".
        notice: called with a sentence when the node has stopped responding, while the request still waits.

    Raises:
        ClientError: ``url`` is not an HTTP URL.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        key: str = "",
        credentials: Callable[[], tuple[str, str]] | None = None,
        authority: Callable[[], str] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.url, self._login = split_login(url.rstrip("/"))
        self._timeout = timeout
        self._key = key
        self._credentials = credentials if not key else None
        self._authority = authority
        self._notice = notice
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
        """POST JSON and return the JSON response ({} if empty).

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
        with closing(self._open("GET", path, None, self._timeout)) as exchange:
            return self._read(exchange).decode(errors="replace")

    def stream(
        self, path: str, body: object, *, stall: float = 900.0
    ) -> Generator[dict[str, Any], None, None]:
        """POST JSON and yield one object per line as they arrive; ``stall``: maximum silence in seconds.

        Closing the iterator ends the request at the node.

        Raises:
            ClientError: see `get`; also for a line with ``error``.
        """
        with closing(self._open("POST", path, body, stall)) as exchange:
            answer = exchange.answer
            data: dict[str, Any] | None = None
            while line := self._line(exchange):
                if line.strip():
                    data = self._object(line)
                    if "error" in data:
                        code = data.get("code")
                        raise ClientError(error_text(data), code if isinstance(code, int) else answer.status)
                    yield data
            # To `readline` a connection that breaks between two chunks, or before the first, looks like the
            # end: a partial response would pass for a complete one.
            if data is None or (answer.chunked and answer.chunk_left is not None):
                raise self._cut_off(exchange, EOFError(_ENDED))

    def events(self, path: str, *, stall: float = 900.0) -> Generator[tuple[str, Any], None, None]:
        """Yield server-sent events of ``path`` as they arrive: (event name, its JSON).

        Raises:
            ClientError: see `get`.
        """
        name, data = "", ""
        with closing(self._open("GET", path, None, stall)) as exchange:
            while raw := self._line(exchange):
                line = raw.decode(errors="replace").rstrip("\r\n")
                field, _, value = line.partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data += value.strip()
                elif not line and data:
                    try:
                        yield name, json.loads(data)
                    except (ValueError, RecursionError):
                        raise self._not_sollold("it sends no JSON") from None
                    name, data = "", ""

    def _whole(self, method: str, path: str, body: object, timeout: float) -> Any:
        with closing(self._open(method, path, body, timeout)) as exchange:
            data = self._read(exchange)
        return self._object(data if data.strip() else b"{}")

    def _open(self, method: str, path: str, body: object, timeout: float, *, renew: bool = True) -> _Exchange:
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = headers_of(self._login, self._key)
        if data is not None:
            headers["Content-Type"] = "application/json"
        connection = self._connection(_CONNECT_SECONDS)
        watch = SilenceWatch(self._works, partial(self._warn, timeout), partial(_shut_down, connection))
        try:
            address = self._connect(connection)
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            watch.start()
            connection.request(method, self._base + path, body=data, headers=headers)
            exchange = _Exchange(connection, connection.getresponse(), watch)
        # A host name with an empty or a long part can't be encoded.
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            watch.end()
            connection.close()
            # If it can't even be connected to, no server is there.
            if watch.hung or (watch.ident and isinstance(error, TimeoutError)):
                seconds = HUNG_SECONDS if watch.hung else timeout
                raise NodeSilent(no_answer(self.url, seconds, _NODE_OPTION)) from error
            raise self._unreachable(error) from error
        status = exchange.answer.status
        if status == 401 and renew and self._credentials is not None:
            key, issuer = self._credentials()
            if key:
                exchange.close()
                if self.url.startswith("http:"):
                    self._secure, self._context = True, ssl.create_default_context(cadata=issuer)
                    # The certificate has the address, but not every name under which it is found.
                    self._host = address
                self._key = key
                return self._open(method, path, body, timeout, renew=False)
            self._credentials = None
        if not 200 <= status < 300:
            with closing(exchange):
                raise self._refused(exchange)
        return exchange

    def _works(self) -> bool:
        """Whether the node responds at all."""
        connection = self._connection(HEALTH_SECONDS)
        try:
            with closing(connection):
                connection.request("GET", f"{self._base}/health", headers=headers_of(self._login, ""))
                connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _warn(self, timeout: float) -> None:
        if self._notice is not None:
            self._notice(f"{self.url} does not respond; waiting up to {min(timeout, HUNG_SECONDS):g} s")

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._secure:
            if self._context is None:
                self._context = trusted(self._authority() if self._authority is not None else "")
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def _connect(self, connection: http.client.HTTPConnection) -> str:
        """Connect, and return the address of the machine."""
        connection.connect()
        if connection.sock is None:
            return self._host
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return str(connection.sock.getpeername()[0])

    def _unreachable(self, error: BaseException) -> ClientError:
        if type(error) is http.client.BadStatusLine:
            return self._not_sollold("it does not speak HTTP")
        if isinstance(error, ssl.SSLCertVerificationError):
            return ClientError(distrust(self.url, error.verify_message))
        if isinstance(error, ssl.SSLError) and self.url.startswith("http:"):
            return ClientError(
                f"{self.url} offers no TLS, without which this machine does not prove its membership: "
                "upgrade sollold there, run the command on that machine, or set $SOLLOLD_API_KEY"
            )
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ClientError(no_daemon(self.url, reason, _NODE_OPTION))

    def _refused(self, exchange: _Exchange) -> ClientError:
        answer = exchange.answer
        if answer.status < 400:
            target = answer.getheader("Location")
            return ClientError(f"{self.url} redirects to {target}: name that node with {_NODE_OPTION}", 502)
        try:
            body = json.loads(self._read(exchange))
        except (ValueError, ClientError):
            body = {}
        words = error_text(body)
        if not words and answer.status == 401:
            return ClientError(login_wanted(self.url), 401)
        if not words:
            return self._not_sollold(f"it answers with HTTP status {answer.status}")
        if answer.status == 401 and not self._key:
            words += ". Commands send the key in $SOLLOLD_API_KEY"
        return ClientError(words, answer.status)

    def _read(self, exchange: _Exchange) -> bytes:
        try:
            return exchange.answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._cut_off(exchange, error) from error

    def _line(self, exchange: _Exchange) -> bytes:
        try:
            line = exchange.answer.readline(_MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._cut_off(exchange, error) from error
        exchange.watch.heard()
        if not line and exchange.watch.hung:
            raise self._cut_off(exchange, EOFError())
        if len(line) >= _MAX_LINE_BYTES:
            raise self._not_sollold("its lines have no end")
        return line

    def _cut_off(self, exchange: _Exchange, error: BaseException) -> ClientError:
        if exchange.watch.hung:
            return NodeSilent(no_answer(self.url, HUNG_SECONDS, _NODE_OPTION))
        status = 504 if isinstance(error, TimeoutError) else 502
        ended = isinstance(error, http.client.IncompleteRead)
        reason = _ENDED if ended else str(error) or type(error).__name__
        return ClientError(f"the connection to {self.url} was lost: {reason}", status)

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._not_sollold("it sends no JSON object")
        return value

    def _not_sollold(self, reason: str) -> ClientError:
        return ClientError(f"what answers at {self.url} is not sollold: {reason}", 502)


def _shut_down(connection: http.client.HTTPConnection) -> None:
    """End the wait for a response in another thread."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
