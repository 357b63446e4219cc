"""Ollama's manifest of a model, as in its stores and its registry, and the facts in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from sollold.models.names import Name
from sollold.models.stores.scan_result import FoundModel
from sollold.undecodable import UNDECODABLE

MAX_BYTES = 1 << 20
"""Maximum size of a manifest."""
DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_KIND = "application/vnd.ollama.image."
_MAX_LICENSES = 16
_Size = Annotated[int, Meta(le=1 << 50)]
"""Bytes of a layer. The sum over a manifest must fit into 64 bits, since lists of models are sent."""


class Layer(msgspec.Struct):
    """A blob: its media type, digest (``sha256:<hex>``) and size in bytes."""

    mediaType: str = ""
    digest: str = ""
    size: _Size = 0
    from_: str | None = msgspec.field(name="from", default="")


class Manifest(msgspec.Struct):
    """A model's blobs."""

    config: Layer | None = None
    layers: list[Layer] | None = None

    def of_kind(self, kind: str) -> list[Layer]:
        """Return the layers of a kind, such as ``model`` or ``template``."""
        return [layer for layer in self.layers or () if layer.mediaType == f"{_KIND}{kind}"]


class _Config(msgspec.Struct):
    model_format: str | None = ""
    model_family: str | None = ""
    file_type: str | None = ""
    remote_host: str | None = ""
    capabilities: list[str] | None = None
    context_length: Annotated[int, Meta(le=1 << 60)] | None = 0
    renderer: str | None = ""


class _Message(msgspec.Struct):
    role: str
    content: str = ""


def parse_manifest(raw: bytes) -> Manifest:
    """Parse a manifest.

    Raises:
        One of `UNDECODABLE`: it is malformed.
    """
    return msgspec.json.decode(raw, type=Manifest)


def text_layers(manifest: Manifest) -> list[Layer]:
    """Return the layers, and the configuration, that `described` reads."""
    kinds = ("template", "prompt", "system", "params", "messages")
    last = [layer for kind in kinds for layer in manifest.of_kind(kind)[-1:]]
    licenses = manifest.of_kind("license")[:_MAX_LICENSES]
    return [*([manifest.config] if manifest.config else []), *last, *licenses]


def described(name: Name, raw: bytes, manifest: Manifest, text: Callable[[str], str]) -> FoundModel:
    """Return the facts in a manifest, without the paths of files.

    ``text``: returns the content of a text blob by its digest; empty if it can't be read.
    """
    config = _config(text(manifest.config.digest) if manifest.config else "")

    def last(kind: str) -> str:
        layers = manifest.of_kind(kind)
        return text(layers[-1].digest) if layers else ""

    models = [layer for layer in manifest.of_kind("model") if DIGEST.fullmatch(layer.digest)]
    kind = "gguf"
    if name.cloud or config.remote_host:
        kind = "cloud"
    elif config.model_format == "safetensors" or not models:
        kind = "safetensors"
    return FoundModel(
        str(name),
        "ollama",
        size=sum(max(0, layer.size) for layer in manifest.layers or ()),
        # With a renderer, Ollama's own code makes the prompt, as the file's own template does.
        template="" if config.renderer else last("template") or last("prompt"),
        system=last("system"),
        messages=_messages(last("messages")),
        params=_params(last("params")),
        license="\n\n".join(text(layer.digest) for layer in manifest.of_kind("license")[:_MAX_LICENSES]),
        manifest=hashlib.sha256(raw).hexdigest(),
        parent=models[0].from_ or "" if models else "",
        format=kind,
        architecture=config.model_family or "",
        quantization=config.file_type or "",
        context_train=max(0, config.context_length or 0),
        capabilities=tuple(config.capabilities or ()),
    )


def _config(text: str) -> _Config:
    try:
        return msgspec.json.decode(text, type=_Config) if text else _Config()
    except UNDECODABLE:
        return _Config()


def _messages(text: str) -> tuple[tuple[str, str], ...]:
    """Parse Ollama's MESSAGEs; anything else gives none."""
    try:
        found = msgspec.json.decode(text, type=list[_Message]) if text else []
    except UNDECODABLE:
        return ()
    return tuple((message.role, message.content) for message in found)


def _params(text: str) -> str:
    """Return Ollama's default options as JSON; ``{}`` for anything else."""
    try:
        value = json.loads(text) if text else {}
        return json.dumps(value, allow_nan=False) if isinstance(value, dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"
