"""Ollama's registry: manifests of models, and their blobs by range requests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

import aiohttp

from sollold.models.names import HOST, Name
from sollold.models.stores.ollama_manifest import (
    DIGEST,
    MAX_BYTES,
    Layer,
    Manifest,
    parse_manifest,
    text_layers,
)
from sollold.models.transfer.bounded_answer import read_at_most
from sollold.models.transfer.download import SourceError
from sollold.models.transfer.huggingface_hub import HubError, HubSource
from sollold.models.transfer.internet import Internet, Unreachable
from sollold.undecodable import UNDECODABLE

_TIMEOUT = 30.0
_MAX_TEXT_BYTES = 1 << 20
_HEADERS = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}


class OllamaRegistry:
    """Ollama's registry.

    Args:
        internet: the client to use.
        base: its URL.
    """

    def __init__(self, internet: Internet, base: str = f"https://{HOST}") -> None:
        self._internet = internet
        self.base = base

    async def manifest(self, name: Name) -> tuple[bytes, Manifest]:
        """Return the manifest of a model, as sent and parsed.

        Raises:
            HubError: the registry can't be reached, or has no such model.
        """
        url = f"{self.base}/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
        try:
            async with self._internet.get(url, aiohttp.ClientTimeout(total=_TIMEOUT), _HEADERS) as answer:
                if answer.status == 404:
                    raise HubError(f"{name} is not in Ollama's registry", missing=True)
                if answer.status != 200:
                    raise HubError(f"{url} answered {answer.status}")
                raw = await read_at_most(answer, MAX_BYTES)
            return raw, parse_manifest(raw)
        except Unreachable as error:
            raise HubError(str(error)) from None
        except UNDECODABLE as error:
            raise HubError(f"{url} was not understood: {error}") from None

    def source(self, name: Name, layers: Sequence[Layer]) -> HubSource:
        """Return blobs of a model as a source of bytes."""
        base = f"{self.base}/v2/{name.namespace}/{name.model}"
        return HubSource(self._internet, base, [f"{base}/blobs/{layer.digest}" for layer in layers], {})

    async def texts(self, name: Name, manifest: Manifest) -> dict[str, str]:
        """Return digest → content of the blobs with a model's template, parameters and the like.

        Raises:
            HubError: one can't be fetched, or has other content than its digest says.
        """
        layers = [layer for layer in text_layers(manifest) if DIGEST.fullmatch(layer.digest) and layer.size]
        source = self.source(name, layers)
        texts: dict[str, str] = {}
        for index, layer in enumerate(layers):
            if layer.size > _MAX_TEXT_BYTES:
                raise HubError(f"a text of {name} has {layer.size} bytes")
            raw = await _read(source, index, layer.size)
            if hashlib.sha256(raw).hexdigest() != layer.digest[-64:]:
                raise HubError(f"Ollama's registry sent other content than {layer.digest} of {name}")
            texts[layer.digest] = raw.decode("utf-8", "replace")
        return texts


async def _read(source: HubSource, index: int, size: int) -> bytes:
    """Return the first ``size`` bytes of a file, and perhaps some more.

    Raises:
        HubError: it can't be fetched.
    """
    raw = bytearray()
    try:
        async with contextlib.aclosing(source.read(index, 0, size)) as pieces:
            async for piece in pieces:
                raw += piece
                if len(raw) >= size:
                    break
    except SourceError as error:
        raise HubError(str(error)) from None
    return bytes(raw)
