"""A double of Ollama's registry."""

from __future__ import annotations

import hashlib
import json

from aiohttp import web

from tests.http_double import HttpDouble
from tests.models.stores import KIND


class RegistryDouble(HttpDouble):
    """Ollama's registry with one model, ``library/tiny``.

    Attributes:
        sent: bytes of blobs sent.
        tags: the tags of the model.
    """

    def __init__(self, content: bytes, **texts: str) -> None:
        """``texts``: kind of layer → content."""
        self.put(content, **texts)
        self.sent = 0
        self.tags = {"latest"}

    def put(self, content: bytes, **texts: str) -> None:
        """Replace the model's file and its other layers."""
        layers = {"model": content, **{kind: text.encode() for kind, text in texts.items()}}
        self._blobs = {f"sha256:{hashlib.sha256(raw).hexdigest()}": raw for raw in layers.values()}
        described = [
            {"mediaType": KIND + kind, "digest": digest, "size": len(raw)}
            for kind, (digest, raw) in zip(layers, self._blobs.items(), strict=True)
        ]
        self.manifest = json.dumps({"schemaVersion": 2, "layers": described})

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/v2/library/tiny/manifests/{tag}", self._manifest)
        app.router.add_get("/v2/library/tiny/blobs/{digest}", self._blob)
        app.router.add_get("/v2/{rest:.+}", self._missing)
        return await self.serve(app)

    async def _missing(self, request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _manifest(self, request: web.Request) -> web.Response:
        if request.match_info["tag"] not in self.tags:
            return web.Response(status=404)
        return web.Response(text=self.manifest)

    async def _blob(self, request: web.Request) -> web.Response:
        start, end = request.headers["Range"].removeprefix("bytes=").split("-")
        piece = self._blobs[request.match_info["digest"]][int(start) : int(end) + 1]
        self.sent += len(piece)
        return web.Response(status=206, body=piece)
