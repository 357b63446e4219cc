"""The dashboard: static pages for browsers at ``/``; other clients get Ollama's greeting there."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from aiohttp import web

from sollold.api.http.route import Route
from sollold.facts import dataclass

_PAGE = "index.html"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    kind: str
    tag: str
    """ETag of the content; a browser that has it already receives 304."""


class DashboardRoutes:
    """The handlers. The files are read at the first request for them."""

    def __init__(self) -> None:
        self._read: dict[str, _File] = {}

    def routes(self) -> list[Route]:
        """Return the route table."""
        text = ("text/plain", "text/html")
        summary = "Health check; the dashboard for browsers"
        kinds = ("text/css", "text/javascript")
        return [
            Route("GET", "/", self._root, summary, produces=text),
            Route("GET", "/web/{file}", self._file, "The dashboard's files", produces=kinds),
        ]

    async def _root(self, request: web.Request) -> web.Response:
        """``/``: the page for a browser, Ollama's greeting for all others."""
        if "text/html" in request.headers.get("Accept", ""):
            response = _answer(request, (await self._files())[_PAGE])
            response.headers["Vary"] = "Accept"
            return response
        return web.Response(text="Ollama is running", headers={"Vary": "Accept"})

    async def _file(self, request: web.Request) -> web.Response:
        file = (await self._files()).get(request.match_info["file"])
        if file is None:
            raise web.HTTPNotFound
        return _answer(request, file)

    async def _files(self) -> dict[str, _File]:
        if not self._read:
            self._read = await asyncio.to_thread(_read_all)
        return self._read


def _read_all() -> dict[str, _File]:
    files = (Path(__file__).parent / "web").iterdir()
    return {file.name: _read(file) for file in files if file.suffix in _KINDS}


def _read(file: Path) -> _File:
    content = file.read_bytes()
    return _File(content, _KINDS[file.suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _answer(request: web.Request, file: _File) -> web.Response:
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("If-None-Match") == file.tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.content, content_type=file.kind, charset="utf-8", headers=headers)
