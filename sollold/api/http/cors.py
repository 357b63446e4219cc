"""CORS: pages of allowed origins, and of the node itself, may use the API."""

from __future__ import annotations

from urllib.parse import urlsplit

from aiohttp import web

from sollold.api.http.hosts import as_sent

METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
EXPOSED = (
    "X-Request-Id, X-Sollold-Backend, X-Sollold-Node, X-Sollold-Status, X-Sollold-Resumed, "
    "X-Sollold-Gap-Ms, X-Sollold-Warning, Retry-After"
)


class Origins:
    """The allowed origins; they change when the settings are reloaded."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed


ORIGINS = web.AppKey("origins", Origins)
"""The application's `Origins`."""


def allowed(origin: str, host: str, origins: tuple[str, ...]) -> bool:
    """Whether a page of ``origin`` may use this node, reached as ``host``.

    An allowed origin without a port allows every port, ``app://*`` all of its scheme, ``*`` everything.
    Programs send no origin, except those made of web pages (Obsidian, VS Code's panes, Tauri's).
    """
    if "*" in origins or origin in origins:
        return True
    try:
        page = urlsplit(origin)
        page_host, page_port = page.hostname, page.port
    except ValueError:
        return False
    if page.scheme in ("http", "https") and page.netloc.lower() == host.lower():
        return True
    for entry in origins:
        if entry.endswith("://*"):
            if page.scheme and page.scheme == entry.removesuffix("://*").lower():
                return True
            continue
        try:
            entry_url = urlsplit(entry)
            port = entry_url.port
        except ValueError:
            continue
        entry_host = as_sent(entry_url.hostname or "")
        same_host = entry_url.scheme == page.scheme and page_host is not None and entry_host == page_host
        if same_host and port in (None, page_port):
            return True
    return False
