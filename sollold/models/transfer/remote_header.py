"""Describes a model that is on no node yet, from the header of its file, which is read by range requests.

A header has some megabytes, so a plan for hundreds of gigabytes is made within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from sollold.facts import dataclass
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.header import GgufError, Header
from sollold.models.gguf.reader import joined, read_prefix
from sollold.models.model import Model
from sollold.models.names import HOST, Name, parse
from sollold.models.stores.header_facts import facts_without_digest
from sollold.models.stores.shards import is_projector
from sollold.models.transfer.download import Source, SourceError
from sollold.models.transfer.huggingface_hub import Hub, HubError
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.partial_file import Item

_FIRST_BYTES = 4 << 20
"""Bytes of the first request: enough for most vocabularies."""
_MAX_HEADER_BYTES = 256 << 20
_TIMEOUT = 30.0


class RemoteError(Exception):
    """The header can't be fetched; ``missing``: there is no such model."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """The model, with the facts from its header, and its shape."""

    model: Model
    shape: Shape


def on_hub(name: str) -> bool:
    """Return whether the name itself says that the model is on Hugging Face's hub."""
    try:
        return parse(name).on_hub
    except ValueError:
        return False


class RemoteHeaders:
    """Reads headers from Hugging Face's hub and Ollama's registry.

    Args:
        internet: the client for the hub.
        registry: Ollama's registry; None: at its own address.
    """

    def __init__(self, internet: Internet, registry: OllamaRegistry | None = None) -> None:
        self._internet = internet
        self._registry = registry or OllamaRegistry(internet)

    async def read(self, name: str) -> RemoteModel:
        """Return the model with this name.

        Raises:
            RemoteError: it can't be fetched, or its header can't be parsed.
        """
        try:
            parsed = parse(name)
        except ValueError as error:
            raise RemoteError(str(error)) from None
        try:
            async with asyncio.timeout(_TIMEOUT):
                if parsed.on_hub:
                    source, items = await self._on_hub(parsed)
                elif parsed.host.lower() == HOST:
                    source, items = await self._in_registry(parsed)
                else:
                    raise RemoteError(f"{parsed.host} is neither Ollama's registry nor Hugging Face's hub")
                headers = [
                    await fetch_header(source, index, item)
                    for index, item in enumerate(items)
                    if not is_projector(item.name)
                ]
            return await asyncio.to_thread(_model_of, str(parsed), headers, sum(item.size for item in items))
        except TimeoutError:
            raise RemoteError(f"the header of {name} was not received within {_TIMEOUT:.0f} s") from None
        except HubError as error:
            raise RemoteError(str(error), missing=error.missing) from None
        except SourceError as error:
            raise RemoteError(str(error)) from None
        except GgufError as error:
            raise RemoteError(f"the header of {name} can't be read: {error.reason}") from None

    async def _on_hub(self, name: Name) -> tuple[Source, Sequence[Item]]:
        hub = Hub(self._internet)
        paths, items = await hub.items(name)
        return hub.source(name, paths), items

    async def _in_registry(self, name: Name) -> tuple[Source, Sequence[Item]]:
        _, manifest = await self._registry.manifest(name)
        models = [layer for layer in manifest.of_kind("model") if layer.size > 0]
        if not models:
            raise RemoteError(f"{name} has no model file: it does not run locally", missing=True)
        items = [Item(layer.digest, layer.size, "") for layer in models]
        return self._registry.source(name, models), items


async def fetch_header(source: Source, index: int, item: Item) -> Header:
    """Read the header of one file of ``source``.

    Raises:
        SourceError: it can't be fetched, or is too long.
        GgufError: it is malformed.
    """
    data = bytearray()
    wanted = _FIRST_BYTES
    while True:
        end = min(wanted, item.size)
        async with contextlib.aclosing(source.read(index, len(data), end)) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) >= end:
                    break  # A server that ignores the range sends the whole file.
        header = await asyncio.to_thread(read_prefix, bytes(data), item.name, item.size)
        if header is not None:
            return header
        if len(data) >= min(item.size, _MAX_HEADER_BYTES):
            raise SourceError(f"the header of {item.name} is longer than {len(data)} bytes")
        wanted = min(2 * wanted, _MAX_HEADER_BYTES)


def _model_of(name: str, headers: list[Header], size: int) -> RemoteModel:
    header = joined(headers)
    facts = facts_without_digest(header)
    if facts.unusable or facts.kind != "model":
        raise GgufError(name, 0, facts.unusable or f"it is not a model but of the kind {facts.kind}")
    model = Model(
        name,
        "",
        "remote",
        header.files,
        size,
        0.0,
        architecture=facts.architecture,
        layers=facts.layers,
        width=facts.widths[0] if facts.widths else 0,
        parameters=facts.parameters,
        quantization=facts.quantization,
        context_train=facts.context_train,
        capabilities=facts.capabilities,
        only_ollama=facts.only_ollama,
    )
    return RemoteModel(model, shape_of(header))
