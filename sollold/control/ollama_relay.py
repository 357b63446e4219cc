"""Relays requests that only Ollama can serve (pull, push, create, show, blobs) unchanged to one.

The peer method ``ollama`` (`FindOllamaRequest` → `OllamaThere`) tells whether a node has one; the raw routes
``/ollama/api/…`` lead to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import aiohttp
import msgspec
from aiohttp import web

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.engines.ollama.service import LocalOllama
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.models.transfer.ollama_pull import PEER_PREFIX, VERIFY_SECONDS
from sollold.undecodable import UNDECODABLE

_CONNECT = 5.0
_SILENCE = 600.0
_ASK = 3.0
_CHUNK_BYTES = 64 * 1024
_CREATE = "/api/create"
_PULL = "/api/pull"
_SUCCESS = b'"success"'
_PATHS = re.compile(r"/api/(pull|push|create|show|blobs/sha256[:-][0-9a-f]{64})")

Body = AsyncIterator[bytes] | bytes


@dataclass(frozen=True, slots=True)
class FindOllamaRequest:
    """Asks whether a node has an Ollama, and whether that has ``model``, if named."""

    model: str = ""


@dataclass(frozen=True, slots=True)
class OllamaThere:
    """``answers``: whether the node has a working Ollama; ``has``: whether that has the model."""

    answers: bool
    has: bool


class Relayed:
    """A response of Ollama being relayed. Call `close` when done."""

    def __init__(
        self,
        answer: aiohttp.ClientResponse,
        name: str,
        stack: AsyncExitStack,
        done: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """``done`` is awaited when Ollama reports success, before that is passed on."""
        self.done = done
        self._answer = answer
        self._name = name
        self._stack = stack
        self.status = answer.status
        self.kind = answer.headers.get("Content-Type", "")

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives.

        Raises:
            Refusal: INTERRUPTED when the response breaks off.
        """
        end = b""
        try:
            async for piece in self._answer.content.iter_chunked(_CHUNK_BYTES):
                if self.done is not None:
                    # The word may be split between two pieces.
                    if _SUCCESS in end + piece:
                        done, self.done = self.done, None
                        await done()
                    end = (end + piece)[1 - len(_SUCCESS) :]
                yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or "timed out"
            raise Refusal(Fault.INTERRUPTED, f"{self._name} interrupted its response: {reason}") from None

    async def close(self) -> None:
        """End the response, whether or not it is complete."""
        self._answer.close()
        # The reader of the body knows already if it broke off.
        with contextlib.suppress(PeerError):
            await self._stack.aclose()


class OllamaRelay:
    """Relays requests that only Ollama can serve to one in the cluster. Call `register`, finally `close`."""

    def __init__(
        self,
        ollama: LocalOllama,
        view: View,
        calls: RpcClient,
        learn: Callable[[str], Awaitable[None]],
    ) -> None:
        """``learn`` refreshes this node's list of a node's models, after one was created there."""
        self._learn = learn
        self._ollama = ollama
        self._view = view
        self._calls = calls
        self._session: aiohttp.ClientSession | None = None
        self._last = ""
        """The node that blobs were sent to last; models created from them must go there too."""

    def register(self, server: RpcServer) -> None:
        """Register the peer method and the raw routes to this machine's Ollama."""
        server.method("ollama", FindOllamaRequest, self._on_ask)
        for method in ("POST", "HEAD"):
            server.route(method, f"{PEER_PREFIX}/{{path:.+}}", self._on_request)

    async def close(self) -> None:
        """Close the connections to the local Ollama."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def forward(self, method: str, path: str, body: Body, model: str) -> Relayed | None:
        """Forward a request and return the response; None when no node has a working Ollama.

        ``model``: the model that the request is about, if any; an Ollama that has it is preferred.

        Raises:
            Refusal: UNAVAILABLE when the Ollama can't be reached.
        """
        node = await self._choose(model)
        if not node:
            return None
        if not model:
            self._last = node
        on_success = partial(self._learn, node) if path == _CREATE else None
        if node == self._view.me.node:
            return await self._ask_local(method, path, body, on_success)
        name = f"the Ollama on {name_of(self._view, node)}"
        stack = AsyncExitStack()
        data = _data(method, body)
        exchange = self._calls.stream(node, method, PEER_PREFIX + path, data=data, idle_timeout=_SILENCE)
        try:
            answer = await stack.enter_async_context(exchange)
        except PeerError as error:
            raise Refusal(Fault.UNAVAILABLE, f"{name} can't be reached: {error}", retry_after=2.0) from None
        return Relayed(answer, name, stack, on_success)

    async def _choose(self, model: str) -> str:
        """Return the node to send to: one with the model, else the last one, else this one; empty if none."""
        me = self._view.me.node
        local = self._local_ollama(model)
        if local.answers and self._last in ("", me) and (local.has or not model):
            return me
        others = [record.node for record in self._view.live() if record.node != me]
        replies = await asyncio.gather(*(self._ask(node, model) for node in others))
        ollamas = {me: local, **dict(zip(others, replies, strict=True))}
        working = [node for node, ollama in ollamas.items() if ollama.answers]
        return min(
            working,
            key=lambda node: (bool(model) and not ollamas[node].has, node != self._last, node != me, node),
            default="",
        )

    async def _ask(self, node: str, model: str) -> OllamaThere:
        try:
            return await self._calls.call(node, "ollama", FindOllamaRequest(model), OllamaThere, timeout=_ASK)
        except PeerError:
            return OllamaThere(False, False)

    def _local_ollama(self, model: str) -> OllamaThere:
        return OllamaThere(bool(self._ollama.url_of_api), bool(model) and self._ollama.has(model))

    async def _ask_local(
        self, method: str, path: str, body: Body, on_success: Callable[[], Awaitable[None]] | None = None
    ) -> Relayed | None:
        """Send a request to this machine's Ollama; None when there is none.

        ``on_success`` is awaited when the request succeeds.

        Raises:
            Refusal: UNAVAILABLE when it can't be reached.
        """
        url = self._ollama.url_of_api
        if not url:
            return None
        if self._session is None:
            self._session = aiohttp.ClientSession()
        name = _created(body) if path == _CREATE and isinstance(body, bytes) else ""
        # A model that it had before is the user's own, even with new layers.
        name = "" if self._ollama.has(name) else name
        silence = VERIFY_SECONDS if path == _PULL else _SILENCE
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=silence)
        try:
            answer = await self._session.request(
                method, url + path, data=_data(method, body), timeout=timeout
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Refusal(Fault.UNAVAILABLE, f"Ollama at {url} can't be reached: {error}") from None

        async def done() -> None:
            if name:
                await asyncio.to_thread(self._ollama.created.add, name)
            if on_success is not None:
                await on_success()

        return Relayed(answer, f"Ollama at {url}", AsyncExitStack(), done)

    async def _on_ask(self, caller: str, request: FindOllamaRequest) -> OllamaThere:
        return self._local_ollama(request.model)

    async def _on_request(self, request: web.Request) -> web.StreamResponse:
        path = f"/{request.match_info['path']}"
        if not _PATHS.fullmatch(path):
            raise web.HTTPNotFound(text="only pull, push, create, show and blobs are passed on")
        try:
            # Read the whole body of a create: the created model's name is in it.
            body = await request.read() if path == _CREATE else request.content.iter_any()
            relayed = await self._ask_local(request.method, path, body)
        except Refusal as refusal:
            return web.json_response({"error": refusal.message}, status=502)
        if relayed is None:
            return web.json_response({"error": "the Ollama of this node stopped answering"}, status=502)
        try:
            headers = {"Content-Type": relayed.kind} if relayed.kind else {}
            response = web.StreamResponse(status=relayed.status, headers=headers)
            await response.prepare(request)
            async with contextlib.aclosing(relayed.chunks()) as pieces:
                async for piece in pieces:
                    await response.write(piece)
            await response.write_eof()
        except Refusal:
            # Abort rather than end properly: the other side must see that the response is incomplete.
            if request.transport is not None:
                request.transport.abort()
        finally:
            await relayed.close()
        return response


def _created(body: bytes) -> str:
    """Return the name of the model to create; empty if there is none."""
    with contextlib.suppress(*UNDECODABLE):
        named = msgspec.json.decode(body, type=_Created)
        return named.model or named.name
    return ""


class _Created(msgspec.Struct):
    model: str = ""
    name: str = ""


def _data(method: str, body: Body) -> Body | None:
    return None if method in ("GET", "HEAD") else body
