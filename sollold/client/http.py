"""A client of the HTTP API of any node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec


class ClientError(Exception):
    """The daemon could not be asked, or said no. ``status`` is HTTP's; 0 when nobody is there, 504 when there
    was no answer in time.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Client:
    """Asks one node. Use it as an asynchronous context manager.

    Args:
        url: of the node (``http://pc2:11435``).
        timeout: seconds for an answer that is not streamed.
    """

    def __init__(self, url: str, *, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> Any:
        """The JSON object at ``path``.

        Raises:
            ClientError: nobody answers, or the answer is an error, or none of a node's.
        """
        return await self._whole("GET", path, None, self._timeout)

    async def post(self, path: str, body: object, *, timeout: float | None = None) -> Any:
        """Send JSON, get JSON (None for an empty answer).

        Raises:
            ClientError: as `get`.
        """
        return await self._whole("POST", path, body, timeout or self._timeout)

    async def delete(self, path: str, body: object) -> Any:
        """As `post`, with the method DELETE.

        Raises:
            ClientError: as `get`.
        """
        return await self._whole("DELETE", path, body, self._timeout)

    async def _whole(self, method: str, path: str, body: object, timeout: float) -> Any:
        span = aiohttp.ClientTimeout(total=timeout, sock_connect=5)
        async with self._open(method, path, body, span) as response:
            data = await response.read()
            return self._object(data, response.status) if data.strip() else None

    async def stream(self, path: str, body: object, *, stall: float = 900.0) -> AsyncIterator[dict[str, Any]]:
        """Send JSON, get one object a line as they come; ``stall``: longest silence in seconds.

        Raises:
            ClientError: as `get`; also for a line that says ``error``, or a line too long to be a node's.
        """
        span = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=stall)
        async with self._open("POST", path, body, span) as response:
            while line := await self._line(response):
                if line.strip():
                    item = self._object(line, response.status)
                    if "error" in item:
                        code = item.get("code")
                        status = code if isinstance(code, int) else response.status
                        raise ClientError(error_text(item), status)
                    yield item

    async def _line(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            return await response.content.readline()
        except ValueError as error:
            raise ClientError(
                f"what answers at {self.url} is no sollold: its lines have no end", response.status
            ) from error

    def _object(self, data: bytes, status: int) -> dict[str, Any]:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            item = msgspec.json.decode(data)
            if isinstance(item, dict):
                return item
        raise ClientError(f"what answers at {self.url} is no sollold: it sends no JSON object", status)

    def _open(self, method: str, path: str, body: object, timeout: aiohttp.ClientTimeout) -> _Exchange:
        if self._session is None:
            raise RuntimeError("the client is used outside of its context")
        return _Exchange(self._session, self.url, method, path, body, timeout)


class _Exchange:
    """One request; turns what can go wrong into a `ClientError` in words."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        method: str,
        path: str,
        body: object,
        timeout: aiohttp.ClientTimeout,
    ) -> None:
        self._url = url
        self._limit = timeout.total or timeout.sock_read or 0.0
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        self._pending = session.request(method, url + path, data=data, headers=headers, timeout=timeout)

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response = await self._pending.__aenter__()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise ClientError(
                    f"what listens at {self._url} did not answer within {self._limit:g} s; it has too much "
                    "to do, or hangs: see `journalctl -u sollold` there, or ask another with --node URL",
                    504,
                ) from error
            raise ClientError(
                f"no daemon answers at {self._url} ({type(error).__name__}); is it running? "
                "Start it with `systemctl start sollold` or `sollold run`, or name another with --node URL"
            ) from error
        if response.status >= 400:
            try:
                item = msgspec.json.decode(await response.read())
            except (msgspec.DecodeError, aiohttp.ClientError, TimeoutError):
                item = {}
            response.release()
            raise ClientError(error_text(item) or f"HTTP status {response.status}", response.status)
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pending.__aexit__(kind, error, trace)
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise ClientError(
                f"the answer of {self._url} broke off: {type(error).__name__} {error}"
            ) from error


def error_text(item: object) -> str:
    """The words of an error body in any of the dialects."""
    if isinstance(item, dict):
        error = item.get("error", "")
        if isinstance(error, dict):
            return str(error.get("message", error))
        return str(error)
    return ""
