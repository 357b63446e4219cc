"""The dashboard: a static page for browsers at ``/``; everybody else gets Ollama's words there."""

from __future__ import annotations

import mimetypes
from importlib import resources

from aiohttp import web

from sollold.api.fault_shape import Dialect
from sollold.api.route import Route

_FILES = ("dashboard.css", "dashboard.js")
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class DashboardRoutes:
    """The handlers. The files are read once, when it is built."""

    def __init__(self) -> None:
        folder = resources.files("sollold.api") / "web"
        self._page = (folder / "index.html").read_text("utf-8")
        self._files = {name: (folder / name).read_bytes() for name in _FILES}

    def routes(self) -> list[Route]:
        """The table."""
        text = ("text/plain", "text/html")
        rows = [
            Route(
                method,
                "/",
                self.root,
                Dialect.OLLAMA,
                "A sign of life; for browsers the dashboard",
                produces=text,
            )
            for method in ("GET", "HEAD")
        ]
        kinds = ("text/css", "text/javascript")
        return [
            *rows,
            Route("GET", "/web/{file}", self.file, Dialect.OLLAMA, "The dashboard's files", produces=kinds),
        ]

    async def root(self, request: web.Request) -> web.Response:
        """``/``."""
        if "text/html" in request.headers.get("Accept", ""):
            return web.Response(
                text=self._page, content_type="text/html", headers={**_HEADERS, "Vary": "Accept"}
            )
        return web.Response(text="Ollama is running", headers={"Vary": "Accept"})

    async def file(self, request: web.Request) -> web.Response:
        """``/web/…``."""
        name = request.match_info["file"]
        content = self._files.get(name)
        if content is None:
            raise web.HTTPNotFound
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return web.Response(body=content, content_type=kind, charset="utf-8", headers=_HEADERS)
