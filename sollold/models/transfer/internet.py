"""Requests to servers on the internet, through a proxy if the environment names one."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp

from sollold.models.transfer.resolver import Resolver, is_inside, redirecting
from sollold.web_proxy import BadProxy, Proxy, proxy_for

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 10
_REMEMBER_SECONDS = 3600.0
"""Seconds for which a failure is reported; later the server may not matter any more."""
_FIX = (
    "correct Environment=HTTPS_PROXY=http://HOST:PORT under [Service]: `sudo systemctl edit sollold`, then "
    "`sudo systemctl restart sollold`"
)
_HINT = (
    "check this machine's internet connection; if it needs a proxy, set it under [Service] as "
    "Environment=HTTPS_PROXY=http://HOST:PORT: `sudo systemctl edit sollold`, then "
    "`sudo systemctl restart sollold`"
)


class Unreachable(Exception):
    """A server on the internet can't be reached, or broke off. The message says which one, how, and why."""


class Internet:
    """An HTTP client for the internet.

    Args:
        environ: names the proxies, see `proxy_for`; None: the environment of the process.
        trust: checks the servers' certificates; None: the authorities that the system trusts.
    """

    def __init__(self, environ: Mapping[str, str] | None = None, trust: ssl.SSLContext | None = None) -> None:
        self.environ = os.environ if environ is None else environ
        self._trust = trust
        self._session: aiohttp.ClientSession | None = None
        self._failed: dict[str, tuple[float, str, str]] = {}

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def trouble(self) -> list[tuple[str, str]]:
        """Return (problem, fix) for each server whose last request failed recently."""
        start = time.monotonic() - _REMEMBER_SECONDS
        return [(problem, fix) for moment, problem, fix in tuple(self._failed.values()) if moment > start]

    @asynccontextmanager
    async def get(
        self, url: str, timeout: aiohttp.ClientTimeout, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and follow redirects; each server may have its own proxy, or none.

        Raises:
            Unreachable: also raised for errors inside the ``async with`` block.
        """
        server = _server_of(url)
        origin = ""
        proxy: Proxy | None = None
        answered = False
        try:
            async with AsyncExitStack() as stack:
                for _ in range(_MAX_REDIRECTS):
                    proxy = proxy_for(url, self.environ)
                    # A proxy resolves the names of servers itself, and may be in the local network.
                    redirecting.set("" if proxy else origin)
                    options = _request_options(proxy, url, headers or {})
                    getting = self._http().get(url, timeout=timeout, allow_redirects=False, **options)
                    answer = await stack.enter_async_context(getting)
                    if answer.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                        raise Unreachable(_refusal(answer.status, answer.reason or ""))
                    location = answer.headers.get("Location", "")
                    if answer.status not in _REDIRECTS or not location:
                        answered = True
                        self._failed.pop(server, None)
                        yield answer
                        return
                    await stack.aclose()
                    origin = urlsplit(url).hostname or ""
                    url, headers = redirected(url, location, headers)
                raise Unreachable(f"it redirects more than {_MAX_REDIRECTS} times")
        except BadProxy as error:
            raise self._fault(server, f"{server} can't be reached: {error}", _FIX) from None
        # A host name with an empty or a long part can't be encoded.
        except (aiohttp.ClientError, Unreachable, TimeoutError, OSError, UnicodeError) as error:
            via = f" through the proxy {proxy}" if proxy else ""
            verb = "broke off" if answered else "can't be reached"
            problem = f"{_server_of(url)} {verb}{via}: {_reason(error)}"
            raise self._fault(server, problem, _FIX if proxy else _HINT) from None

    def _fault(self, server: str, problem: str, fix: str) -> Unreachable:
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        message = f"the last download from {server} failed at {date}: {problem}"
        self._failed[server] = (time.monotonic(), message, fix)
        return Unreachable(problem)

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=Resolver(), ssl=self._trust or True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


def _server_of(url: str) -> str:
    """Return host and port of a URL, without its login: messages are shown to everybody."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _request_options(proxy: Proxy | None, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the session's arguments for headers and proxy."""
    options: dict[str, Any] = {"headers": headers}
    if proxy is None:
        return options
    parts = urlsplit(proxy.url)
    login, _, address = parts.netloc.rpartition("@")
    options["proxy"] = f"{parts.scheme}://{address}"
    if login:
        user, _, password = login.partition(":")
        name = aiohttp.encode_basic_auth(unquote(user), unquote(password), "utf-8")
        authorization = {"Proxy-Authorization": name}
        if urlsplit(url).scheme == "https":
            options["proxy_headers"] = authorization
        else:
            # A plain HTTP request goes to the proxy itself: there is no tunnel to open first.
            options["headers"] = {**headers, **authorization}
    return options


def redirected(
    url: str, location: str, headers: Mapping[str, str] | None
) -> tuple[str, Mapping[str, str] | None]:
    """Return the target of a redirect, and the headers to send there: another server does not get the token.

    Raises:
        Unreachable: the redirect leads from the internet into the local network, from HTTPS to HTTP, or to an
            invalid address.
    """
    try:
        target = urljoin(url, location)
        old, new = urlsplit(url), urlsplit(target)
        inward = is_inside(new.hostname or "") and not is_inside(old.hostname or "")
    except ValueError:
        raise Unreachable("it redirects to an invalid address") from None
    if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http") or inward:
        raise Unreachable(f"it redirects to {new.scheme}://{_server_of(target)}, which is not followed")
    if headers and (old.scheme, old.netloc) != (new.scheme, new.netloc):
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
    return target, headers


def _reason(error: Exception) -> str:
    """Return the reason in readable form."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return _refusal(error.status, error.message)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {error.certificate_error}"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        return os.strerror(cause.errno)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(error, TimeoutError):
        return "no response in time"
    return str(error) or type(error).__name__


def _refusal(status: int, reason: str) -> str:
    """Return what a status from the proxy itself means."""
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return "it asks for a user and a password: http://USER:PASSWORD@HOST:PORT"
    return f"it answered {status} {reason}".rstrip()
