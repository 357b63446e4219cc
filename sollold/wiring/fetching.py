"""Fetching models, and an Ollama's own business, as the dialects ask for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp

from sollold.agent.ollama import LocalOllama
from sollold.models.pull import Puller, PullError
from sollold.serving.ask import Fault, Refusal

_CONNECT = 5.0
_SILENCE = 600.0
_PIECE = 64 * 1024


class PullerHere:
    """Fulfils `sollold.api.parts.Puller`."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller

    async def pull(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """Progress as Ollama tells it.

        Raises:
            Refusal: NOT_FOUND when nobody has it, else UNAVAILABLE.
        """
        steps = self._puller.pull(name)
        try:
            async for step in steps:
                yield step
        except PullError as error:
            raise Refusal(Fault.NOT_FOUND if error.missing else Fault.UNAVAILABLE, str(error)) from None
        finally:
            await steps.aclose()


class OllamaRelay:
    """Fulfils `sollold.api.parts.Relay` with this machine's Ollama."""

    def __init__(self, ollama: LocalOllama) -> None:
        self._ollama = ollama

    async def forward(
        self, method: str, path: str, body: AsyncIterator[bytes]
    ) -> tuple[int, str, AsyncIterator[bytes]] | None:
        """(status, content type, body) of its answer; None when there is no Ollama.

        Raises:
            Refusal: UNAVAILABLE, it can't be reached.
        """
        url = self._ollama.url_of_api
        if not url:
            return None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE)
        session = aiohttp.ClientSession(timeout=timeout)
        try:
            data = None if method in ("GET", "HEAD") else body
            answer = await session.request(method, url + path, data=data)
        except BaseException as error:
            await session.close()
            if isinstance(error, (aiohttp.ClientError, TimeoutError, OSError)):
                raise Refusal(Fault.UNAVAILABLE, f"Ollama at {url} can't be reached: {error}") from None
            raise

        async def rest() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.content.iter_chunked(_PIECE):
                    yield piece
            finally:
                answer.close()
                await session.close()

        return answer.status, answer.headers.get("Content-Type", ""), rest()
