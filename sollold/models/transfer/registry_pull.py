"""Prepares the download of a model from Ollama's registry, for a machine without an Ollama."""

from __future__ import annotations

import hashlib

from sollold.models.model import Model
from sollold.models.names import Name
from sollold.models.stores.llama_support import refusal
from sollold.models.stores.ollama_manifest import DIGEST, described
from sollold.models.transfer.fetch_files import Download
from sollold.models.transfer.huggingface_hub import HubError
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import names_of
from sollold.models.transfer.remote_header import fetch_header
from sollold.models.transfer.verify import check_items


async def registry_download(registry: OllamaRegistry, name: Name, present: Model | None) -> Download | None:
    """Return the download of a model's version in the registry; None if ``present`` is that version.

    A present model that has no manifest is a file of a user, perhaps on another node, and is kept.

    Raises:
        HubError: the registry can't be reached, has no such model, or one that only Ollama can run.
        SourceError: its files can't be fetched or stored.
        GgufError: its header can't be read.
    """
    if present is not None and not present.manifest:
        return None
    raw, manifest = await registry.manifest(name)
    digest = hashlib.sha256(raw).hexdigest()
    if present is not None and present.manifest == digest:
        return None
    texts = await registry.texts(name, manifest)
    found = described(name, raw, manifest, lambda blob: texts.get(blob, ""))
    kinds = [manifest.of_kind(kind) for kind in ("model", "projector", "adapter")]
    models, projectors, adapters = (
        [layer for layer in layers if DIGEST.fullmatch(layer.digest)] for layers in kinds
    )
    if found.format != "gguf":
        raise HubError(f"{name} has no GGUF file, so only an Ollama can run it", missing=True)
    layers = [*models, *projectors[:1], *adapters]
    model = Model(
        str(name),
        digest,
        "own",
        tuple(layer.digest for layer in models),
        sum(layer.size for layer in layers),
        0.0,
        projector="".join(layer.digest for layer in projectors[:1]),
        adapters=tuple(layer.digest for layer in adapters),
        template=found.template,
        system=found.system,
        messages=found.messages,
        params=found.params,
        license=found.license,
        manifest=digest,
    )
    items = tuple(
        Item(file, layer.size, layer.digest[-64:])
        for file, layer in zip(names_of(model), layers, strict=True)
    )
    check_items(items)
    source = registry.source(name, layers)
    if reason := refusal(await fetch_header(source, 0, items[0])):
        raise HubError(reason)

    return Download(model, items, digest, [source])
