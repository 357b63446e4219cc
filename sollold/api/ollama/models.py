"""Ollama's tags, show and ps over the whole cluster. Pure."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from sollold.api.engine.modelfile import own_messages, own_parameters, with_parameters
from sollold.control.models import NodeNames, Running
from sollold.machine.device import PROCESSOR
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.models.templates.jinja import RAW
from sollold.units import file_time_text, timestamp_text

_NO_TEMPLATE = "no chat template: the model receives the plain text of the prompt, without roles or turns"
_NO_MODEL = Model("", "", "", (), 0, 0.0)
_FOREVER = 100 * 365 * 86400.0
"""Lifetime reported for a model that is never unloaded, in seconds."""


def parameter_text(count: int) -> str:
    """``8030261248`` → ``8.0B``, ``494032768`` → ``494.03M``, ``27000000000`` → ``27B``, as in Ollama."""
    for limit, unit, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= limit:
            value = count / limit
            return f"{value:.{0 if value.is_integer() else digits}f}{unit}"
    return str(count)


def details(model: Model) -> dict[str, Any]:
    """Return ``details``; all fields are always present, since clients rely on that."""
    family = model.architecture
    return {
        "parent_model": model.parent,
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": parameter_text(model.parameters),
        "quantization_level": model.quantization,
        "context_length": model.context_train,
        "embedding_length": model.width,
    }


def tags(models: Iterable[Listed], names: NodeNames, *, unusable: bool = False) -> dict[str, Any]:
    """Return ``/api/tags``: each usable model once, newest first; with ``unusable`` the others too."""
    entries = []
    if not unusable:
        models = [listed for listed in models if not listed.model.unusable]
    for listed in sorted(models, key=lambda listed: (-listed.model.modified, listed.model.name)):
        model = listed.model
        entry = {
            "name": model.name,
            "model": model.name,
            "modified_at": file_time_text(model.modified),
            "size": model.listed_size or model.size,
            "digest": model.manifest or model.digest,
            "details": details(model),
            "capabilities": list(model.capabilities),
            "nodes": names(listed),
        }
        if model.template == RAW:
            entry["note"] = _NO_TEMPLATE
        if model.unusable:
            entry["unusable"] = model.unusable
        entries.append(entry)
    return {"models": entries}


def ps(running: Iterable[Running], models: Iterable[Listed], now: float) -> dict[str, Any]:
    """Return ``/api/ps``: one entry per loaded model; ``size_vram`` is the memory outside the CPU's."""
    known = {listed.model.name: listed.model for listed in models}
    entries: dict[str, dict[str, Any]] = {}
    for instance in running:
        endpoint = instance.endpoint
        model = known.get(endpoint.model)
        vram = sum(placed.bytes for placed in endpoint.placed if placed.device != PROCESSOR)
        remaining = _FOREVER if endpoint.expires < 0 or endpoint.pinned else endpoint.expires
        entry = entries.get(endpoint.model)
        if entry is None:
            entries[endpoint.model] = {
                "name": endpoint.model,
                "model": endpoint.model,
                "size": endpoint.bytes,
                "digest": (model.manifest if model is not None else "") or endpoint.digest,
                "details": details(model or _NO_MODEL),
                "expires_at": timestamp_text(now + remaining),
                "size_vram": vram,
                "context_length": endpoint.context,
                "nodes": [instance.node],
                "backend": str(endpoint.backend),
                "state": str(endpoint.state),
            }
            continue
        entry["size"] += endpoint.bytes
        entry["size_vram"] += vram
        entry["expires_at"] = max(entry["expires_at"], timestamp_text(now + remaining))
        if instance.node not in entry["nodes"]:
            entry["nodes"].append(instance.node)
    return {"models": list(entries.values())}


def show(listed: Listed, names: NodeNames, metadata: Mapping[str, Any], *, verbose: bool) -> dict[str, Any]:
    """Return ``/api/show``. ``model_info``: the header; arrays are null unless ``verbose``, as in Ollama."""
    model = listed.model
    info: dict[str, Any] = {"general.architecture": model.architecture}
    known = {
        "general.parameter_count": model.parameters,
        f"{model.architecture}.block_count": model.layers,
        f"{model.architecture}.context_length": model.context_train,
        f"{model.architecture}.embedding_length": model.width,
    }
    # Clients have a default for a missing value, but not for 0.
    info |= {key: value for key, value in known.items() if value}
    projector: dict[str, Any] = {}
    for key, value in metadata.items():
        if key == "tokenizer.chat_template":
            continue
        target = projector if key.startswith("clip.") else info
        if isinstance(value, (list, tuple)):
            target[key] = value or None if verbose else None
        else:
            target[key] = _shortest(value)
    if projector:
        count = projector.pop("clip.parameter_count", 0)
        projector |= {"general.architecture": "clip", "general.parameter_count": count}
    template = model.template or str(metadata.get("tokenizer.chat_template", ""))
    return {
        "license": model.license,
        "modelfile": modelfile(model, template),
        "parameters": parameters_text(model),
        "template": template,
        "system": model.system,
        "details": details(model),
        "model_info": info,
        **({"projector_info": projector} if projector else {}),
        **({"messages": own_messages(model)} if model.messages else {}),
        "capabilities": list(model.capabilities),
        "modified_at": file_time_text(model.modified),
        "nodes": names(listed),
        **({"unusable": model.unusable} if model.unusable else {}),
        **({"note": _NO_TEMPLATE} if model.template == RAW else {}),
    }


def with_settings(model: Model, system: str | None, options: Mapping[str, Any] | None) -> Model:
    """Return the model with another system prompt and further parameters."""
    params = with_parameters(model, options) if options else model.params
    return replace(model, system=system or model.system, params=params)


def _shortest(value: Any) -> Any:
    """Return a 32-bit float with the digits that it was written with: 1e-05, not 9.99999974e-06."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    short = float(f"{value:.7g}")
    with contextlib.suppress(OverflowError):
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _parameters(model: Model) -> list[tuple[str, str]]:
    rows = []
    for key, value in own_parameters(model).items():
        for item in value if isinstance(value, list) else [value]:
            text = msgspec.json.encode(item).decode() if isinstance(item, str) else str(item)
            rows.append((key, text))
    return rows


def parameters_text(model: Model) -> str:
    """Return ``parameters``: one per line, the name padded to 30 columns, as Ollama's clients expect."""
    return "\n".join(f"{key:<30} {text}" for key, text in _parameters(model))


def modelfile(model: Model, template: str) -> str:
    """Return a Modelfile from which an equal model can be created."""
    lines = [f"# Modelfile of {model.name}", f"FROM {model.files[0] if model.files else model.name}"]
    if model.projector:
        lines.append(f"FROM {model.projector}")
    lines += [f"ADAPTER {path}" for path in model.adapters]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if model.system:
        lines.append(f'SYSTEM """{model.system}"""')
    lines += [f"PARAMETER {key} {text}" for key, text in _parameters(model)]
    if model.license:
        lines.append(f'LICENSE """{model.license}"""')
    lines += [f'MESSAGE {role} """{content}"""' for role, content in model.messages]
    return "\n".join(lines) + "\n"
