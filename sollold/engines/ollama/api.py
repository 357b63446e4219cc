"""Typed client for the parts of Ollama's HTTP API that we use; every call has a timeout."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from typing import TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import msgspec

from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.engines")

T = TypeVar("T")

_MAX_BYTES = 32 << 20
_TIMEOUT = 2.0
_PS_TIMEOUT = 2.0
"""Timeout of ``/api/ps`` in seconds; beyond it Ollama is assumed to be busy with a load."""


class OllamaError(Exception):
    """Ollama could not be reached, or refused; the message says which and why."""


class Details(msgspec.Struct):
    """``details`` of a model."""

    family: str | None = ""
    parameter_size: str | None = ""
    quantization_level: str | None = ""
    parent_model: str | None = ""
    context_length: int | None = 0
    embedding_length: int | None = 0


class Tag(msgspec.Struct):
    """A model of ``/api/tags``."""

    name: str = ""
    modified_at: str = ""
    size: int = 0
    digest: str = ""
    details: Details | None = None
    capabilities: list[str] | None = None
    remote_host: str | None = ""


class Loaded(msgspec.Struct):
    """A model of ``/api/ps``."""

    name: str = ""
    size: int = 0
    size_vram: int = 0
    digest: str = ""
    expires_at: str = ""
    context_length: int = 0


class _Tags(msgspec.Struct):
    models: list[Tag] | None = None


class _Ps(msgspec.Struct):
    models: list[Loaded] | None = None


class _Version(msgspec.Struct):
    version: str


class _Shown(msgspec.Struct):
    capabilities: list[str] | None = None


def address(
    url: str, environ: Mapping[str, str] | None = None, service: Mapping[str, str] | None = None
) -> str:
    """Return the local Ollama's base URL: from the setting, ``$OLLAMA_HOST`` here or in the environment of
    Ollama's own ``service``, or the default; without a trailing slash.

    ``OLLAMA_HOST`` may lack scheme and port, and may be a listening address such as ``0.0.0.0``.
    """
    environ = os.environ if environ is None else environ
    text = url or environ.get("OLLAMA_HOST", "") or (service or {}).get("OLLAMA_HOST", "")
    text = text.strip().strip("\"'")
    if not text:
        return "http://127.0.0.1:11434"
    schemed = "://" in text
    try:
        parts = urlsplit(text if schemed else f"http://{text}")
    except ValueError as error:
        log.warning("invalid address of Ollama (%s: %s); trying the default one", text, error)
        return "http://127.0.0.1:11434"
    host = parts.hostname or "127.0.0.1"
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    try:
        port = parts.port
    except ValueError:
        port = None
    if port is None:
        port = {"http": 80, "https": 443}.get(parts.scheme, 11434) if schemed else 11434
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port}{parts.path.rstrip('/')}"


def is_here(url: str) -> bool:
    """Return whether the host of ``url`` is an address of this machine. Blocks during name resolution.

    A name that can't be resolved leads nowhere else, so it counts as this machine.
    """
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return True
    for family, kind, _, _, target in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(target)  # fails unless an interface has the address
            return True
    return False


class OllamaApi:
    """Client of one Ollama. The session belongs to the caller and is not closed here."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def version(self) -> str:
        """Return its version.

        Raises:
            OllamaError: nothing answers there, or it is not an Ollama.
        """
        return (await self._ask("GET", "/api/version", _Version)).version

    async def is_ours(self) -> bool:
        """Return whether the server is a sollold, which speaks Ollama's API too."""
        try:
            async with self._session.get(f"{self.url}/api/cluster", timeout=_timeout(_TIMEOUT)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError):
            return False

    async def tags(self) -> list[Tag]:
        """Return its models.

        Raises:
            OllamaError: as `version`.
        """
        return (await self._ask("GET", "/api/tags", _Tags, timeout=10.0)).models or []

    async def capabilities(self, model: str) -> list[str]:
        """Return the capabilities of a model, as read from its files; empty if it has none or is not there.

        Raises:
            OllamaError: it does not answer now.
        """
        try:
            shown = await self._ask("POST", "/api/show", _Shown, body={"model": model})
        except OllamaError as error:
            if error.__cause__ is None:
                return []
            raise
        return shown.capabilities or []

    async def ps(self) -> list[Loaded] | None:
        """Return the loaded models; None while it is too busy to answer (it blocks during some loads).

        Raises:
            OllamaError: it refused, or can't be reached.
        """
        try:
            return (await self._ask("GET", "/api/ps", _Ps, timeout=_PS_TIMEOUT)).models or []
        except OllamaError as error:
            if isinstance(error.__cause__, TimeoutError):
                return None
            raise

    async def unload(self, model: str) -> None:
        """Unload a model.

        Raises:
            OllamaError: it refused, or can't be reached.
        """
        body = {"model": model, "keep_alive": 0}
        await self._ask("POST", "/api/generate", dict[str, msgspec.Raw], body=body, timeout=30.0)

    async def copy(self, model: str, name: str) -> None:
        """Copy a model to a second name.

        Raises:
            OllamaError: it refused, or can't be reached.
        """
        body = {"source": model, "destination": name}
        await self._ask("POST", "/api/copy", None, body=body, timeout=30.0)

    async def delete(self, model: str) -> None:
        """Delete a model.

        Raises:
            OllamaError: it refused, or can't be reached.
        """
        await self._ask("DELETE", "/api/delete", None, body={"model": model}, timeout=30.0)

    async def _ask(
        self, method: str, path: str, reply: type[T] | None, *, body: object = None, timeout: float = 0.0
    ) -> T:
        try:
            async with self._session.request(
                method, f"{self.url}{path}", json=body, timeout=_timeout(timeout or _TIMEOUT)
            ) as response:
                raw = await response.content.read(_MAX_BYTES)
                while chunk := await response.content.read(_MAX_BYTES - len(raw)):
                    raw += chunk
                if response.status != 200:
                    text = raw[:300].decode("utf-8", "replace")
                    raise OllamaError(f"{path} of {self.url} answered {response.status}: {text}")
                return cast(T, None) if reply is None else msgspec.json.decode(raw, type=reply)
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:
            why = "timed out" if isinstance(error, TimeoutError) else str(error)
            raise OllamaError(f"{self.url}{path}: {why}") from error
        except UNDECODABLE as error:
            raise OllamaError(f"{self.url}{path} is not a response of Ollama: {error}") from None


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, connect=min(seconds, _TIMEOUT))
