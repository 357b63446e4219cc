"""An asynchronous client of one node's HTTP API. aiohttp is imported with the first request."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncGenerator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sollold.client.arguments import check_seconds, check_text
from sollold.client.connections import new_session
from sollold.client.discovery import url_of
from sollold.client.errors import (
    ClientError,
    NodeLost,
    NodeSilent,
    RequestTimeout,
    error_text,
    no_answer,
    no_daemon,
)
from sollold.client.login import headers_of, login_wanted, split_login
from sollold.client.trust import distrust

if TYPE_CHECKING:
    import aiohttp

CONNECT_SECONDS = 5.0
KEY_VARIABLE = "SOLLOLD_API_KEY"
_NODE_ARGUMENT = 'node="http://HOST:11435"'
"""How a caller names another node."""


class Client:
    """A client of one node. Use it as an asynchronous context manager.

    Args:
        url: address of the node (``http://pc2:11435``, ``pc2``); may include a login for a proxy.
        timeout: limit for a response that is not streamed, in seconds.
        session: session to share connections with other clients; by default the client opens its own.
        api_key: API key, if the node requires one; None: ``$SOLLOLD_API_KEY``, empty: none.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        session: aiohttp.ClientSession | None = None,
        api_key: str | None = None,
    ) -> None:
        check_seconds("timeout", timeout)
        self.url, self._login = split_login(url_of(url))
        self._timeout = timeout
        self._key = api_key_of(api_key)
        self._session = session
        self._owned = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        if self._session is None:
            self._session = new_session()
            self._owned = True
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None and self._owned:
            await self._session.close()
            self._session, self._owned = None, False

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """Get the JSON object at ``path``.

        Raises:
            ClientError: no response, an error response, or the server is not a node.
        """
        return await self._whole("GET", path, None, timeout or self._timeout)

    async def post(self, path: str, body: object, *, timeout: float | None = None) -> Any:
        """POST JSON and return the JSON response (None if empty).

        Raises:
            ClientError: as `get`.
        """
        return await self._whole("POST", path, body, timeout or self._timeout)

    async def delete(self, path: str, body: object) -> Any:
        """DELETE with a JSON body, and return the JSON response (None if empty).

        Raises:
            ClientError: as `get`.
        """
        return await self._whole("DELETE", path, body, self._timeout)

    async def _whole(self, method: str, path: str, body: object, timeout: float) -> Any:
        import aiohttp

        span = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
        async with self._open(method, path, body, span) as response:
            data = await response.read()
            return self._object(data, response.status) if data.strip() else None

    async def stream(
        self, path: str, body: object, *, stall: float = 900.0, headers: dict[str, str] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """POST JSON and yield one object per line as they arrive.

        Args:
            path, body: the request.
            stall: maximum silence in seconds.
            headers: filled with the response's headers before the first line.

        Raises:
            ClientError: as `get`; also for a line with ``error``, or one that is too long.
        """
        import aiohttp

        span = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=stall)
        async with self._open("POST", path, body, span) as response:
            if headers is not None:
                headers.update(response.headers)
            while line := await self._line(response):
                if line.strip():
                    record = self._object(line, response.status)
                    if "error" in record:
                        code = record.get("code")
                        raise refused(error_text(record), code if isinstance(code, int) else response.status)
                    yield record

    async def _line(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            return await response.content.readline()
        except ValueError as error:
            raise ClientError(
                f"what answers at {self.url} is not sollold: its lines have no end", response.status
            ) from error

    def _object(self, data: bytes, status: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(data)
            if isinstance(value, dict):
                return value
        raise ClientError(f"what answers at {self.url} is not sollold: it sends no JSON object", status)

    def _open(self, method: str, path: str, body: object, timeout: aiohttp.ClientTimeout) -> _Exchange:
        if self._session is None:
            raise RuntimeError("the client is used outside of its context")
        return _Exchange(self._session, self.url, method, path, body, timeout, self._login, self._key)


def api_key_of(given: str | None) -> str:
    """The caller's key, else that of the environment; empty if none.

    Raises:
        TypeError: ``api_key`` is not a string.
    """
    check_text("api_key", given)
    return (os.environ.get(KEY_VARIABLE, "") if given is None else given).strip()


def refused(message: str, status: int) -> ClientError:
    """The exception for a node's error response; its timeouts become `RequestTimeout`."""
    return RequestTimeout(message) if status == 504 else ClientError(message, status)


def _encoded(body: object) -> bytes:
    """Encode ``body`` as JSON.

    Raises:
        TypeError: a value can't be encoded; the message names the argument.
    """
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        for name, value in body.items() if isinstance(body, dict) else ():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise TypeError(f"{name} can't be sent as JSON: {error}") from None
        raise


class _Exchange:
    """One request; turns all failures into a `ClientError`. ``reused``: it was sent on a kept connection."""

    reused = False

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        method: str,
        path: str,
        body: object,
        timeout: aiohttp.ClientTimeout,
        login: str,
        key: str,
    ) -> None:
        self._url = url
        self._key = key
        self._limit = timeout.total or timeout.sock_read or 0.0
        data = None if body is None else _encoded(body)
        headers = headers_of(login, key)
        if data is not None:
            headers["Content-Type"] = "application/json"
        self._ask = partial(
            session.request,
            method,
            url + path,
            data=data,
            headers=headers,
            timeout=timeout,
            # Otherwise a POST would become a GET, and another host would get the key.
            allow_redirects=False,
            trace_request_ctx=self,
        )
        self._pending = self._ask()

    async def __aenter__(self) -> aiohttp.ClientResponse:
        import aiohttp

        try:
            response = await self._answer()
        # A host name with an empty or a long part can't be encoded.
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise NodeSilent(no_answer(self._url, self._limit, _NODE_ARGUMENT)) from error
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                reason = str(error.certificate_error)
                raise NodeLost(distrust(self._url, reason)) from error
            if isinstance(error, aiohttp.ClientConnectorSSLError):
                plain = self._url.replace("https://", "http://", 1)
                raise NodeLost(
                    f"there is no HTTPS at {self._url}; if it speaks HTTP, name {plain}"
                ) from error
            raise NodeLost(no_daemon(self._url, _reason(error), _NODE_ARGUMENT)) from error
        if 300 <= response.status < 400:
            target = response.headers.get("Location")
            response.release()
            raise ClientError(f"{self._url} redirects to {target}: name that node with {_NODE_ARGUMENT}", 502)
        if response.status >= 400:
            body: object = {}
            with contextlib.suppress(ValueError, aiohttp.ClientError, TimeoutError):
                body = json.loads(await response.read())
            response.release()
            message = error_text(body) or f"HTTP status {response.status}"
            if response.status == 401 and not error_text(body):
                message = login_wanted(self._url)
            elif response.status == 401 and not self._key:
                message += f". A key is given as api_key=… or in ${KEY_VARIABLE}"
            raise refused(message, response.status)
        return response

    async def _answer(self) -> aiohttp.ClientResponse:
        import aiohttp

        try:
            return await self._pending.__aenter__()
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, aiohttp.ClientOSError):
            # The node closed a kept connection before the request arrived, for example when it restarted.
            # aiohttp itself retries only methods that change nothing. On a new connection the node may have
            # begun to work on the request, which must not be done twice.
            if not self.reused:
                raise
            self._pending = self._ask()
            return await self._pending.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import aiohttp

        await self._pending.__aexit__(kind, error, trace)
        # An error that the node itself reported, such as a timeout, does not mean that the node is lost.
        if isinstance(error, aiohttp.ClientError | TimeoutError) and not isinstance(error, ClientError):
            raise NodeLost(f"the answer of {self._url} broke off: {type(error).__name__} {error}") from error


def _reason(error: BaseException) -> str:
    """The reason for a failed connection, in the system's words instead of asyncio's and aiohttp's."""
    cause = getattr(error, "os_error", error)
    number = getattr(cause, "errno", None) or 0
    if number > 0:
        return os.strerror(number)
    return getattr(cause, "strerror", None) or str(error) or type(error).__name__
