"""A double of Hugging Face's hub."""

from __future__ import annotations

import hashlib
import json
import ssl

from aiohttp import web

from tests.http_double import HttpDouble


class HubDouble(HttpDouble):
    """Serves the API and the files of one repository.

    Attributes:
        ranges: the ``Range`` headers received.
        cut_after: number of file requests after which the hub answers with 503.
    """

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository, self.files = repository, files
        self.ranges: list[str] = []
        self.cut_after = 1 << 30

    async def start(self, tls: ssl.SSLContext | None = None) -> str:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{repo}", self._info)
        app.router.add_get("/{org}/{repo}/resolve/main/{file}", self._file)
        return await self.serve(app, tls)

    async def _info(self, request: web.Request) -> web.Response:
        if f"{request.match_info['org']}/{request.match_info['repo']}" != self.repository:
            return web.Response(status=404)
        siblings = [
            {
                "rfilename": name,
                "size": len(raw),
                "lfs": {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 1},
            }
            for name, raw in self.files.items()
        ]
        return web.Response(text=json.dumps({"siblings": [*siblings, {"rfilename": "README.md", "size": 3}]}))

    async def _file(self, request: web.Request) -> web.Response:
        self.ranges.append(request.headers["Range"])
        if len(self.ranges) > self.cut_after:
            return web.Response(status=503)
        start, end = request.headers["Range"].removeprefix("bytes=").split("-")
        return web.Response(
            status=206, body=self.files[request.match_info["file"]][int(start) : int(end) + 1]
        )
