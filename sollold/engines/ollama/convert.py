"""Converts Ollama's responses to our own types. Pure."""

from __future__ import annotations

import re
from datetime import datetime

from sollold.cluster.gossip.record import OLLAMA_PREFIX, Backend, Endpoint, Placed, Record, State
from sollold.engines.ollama.api import Details, Loaded, Tag
from sollold.engines.ollama.loaded import ModelUse
from sollold.machine.device import Kind, one_a_memory
from sollold.models.model import Model

_FOREVER_SECONDS = 10 * 365 * 86400.0
"""Seconds beyond which a model counts as kept forever: Ollama writes a time centuries away."""
_COUNT = re.compile(r"([\d.]+)\s*([KMBT]?)", re.IGNORECASE)
_POWERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def listed_model(name: str, tag: Tag) -> Model:
    """Return a model whose files can't be read here, as far as the API describes it."""
    details = tag.details or Details()
    return Model(
        name=name,
        digest=tag.digest,
        source="ollama",
        files=(),
        size=tag.size,
        modified=max(0.0, _seconds(tag.modified_at)),
        architecture=details.family or "",
        width=details.embedding_length or 0,
        parent=details.parent_model or "",
        parameters=_parameters(details.parameter_size or ""),
        quantization=details.quantization_level or "",
        context_train=details.context_length or 0,
        capabilities=tuple(tag.capabilities or ("completion",)),
        manifest=tag.digest,
        only_ollama="The daemon on its node can't read its files, so only the Ollama there can run it.",
    )


def _parameters(text: str) -> int:
    match = _COUNT.fullmatch(text.strip())
    try:
        return round(float(match[1]) * _POWERS[match[2].upper()]) if match else 0
    except ValueError:
        return 0


def _seconds(text: str) -> float:
    # Go writes nanoseconds; Python reads microseconds at most.
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()
    except ValueError:
        return 0.0


def seconds_left(expires_at: str, now: float) -> float:
    """Return the seconds until ``expires_at``; negative if the model is kept forever."""
    left = _seconds(expires_at) - now
    return -1.0 if left > _FOREVER_SECONDS else round(max(0.0, left), 1)


def endpoint_of(
    name: str,
    tag: Tag,
    model: Model | None,
    loaded: Loaded | None,
    use: ModelUse,
    placed: tuple[Placed, ...],
    *,
    slots: int,
    now: float,
) -> Endpoint:
    """Return the endpoint of one of Ollama's models.

    Args:
        name: its canonical name.
        tag: the model as Ollama lists it.
        model: the model in this node's catalogue, if it is there.
        loaded: its entry in ``/api/ps``; None if not loaded.
        use: our own requests to it.
        placed: its memory by device.
        slots: parallel requests that Ollama accepts.
        now: seconds since 1970.
    """
    capabilities = (model.capabilities if model else ()) or tuple(tag.capabilities or ())
    return Endpoint(
        id=OLLAMA_PREFIX + name,
        model=name,
        digest=model.digest if model else tag.digest,
        backend=Backend.OLLAMA,
        state=State.READY,
        context=loaded.context_length if loaded else 0,
        slots=slots,
        active=use.active,
        waiting=use.waiting,
        speed=use.speed,
        loaded=loaded is not None,
        bytes=loaded.size if loaded else 0,
        layers=model.layers if model else 0,
        placed=placed,
        expires=seconds_left(loaded.expires_at, now) if loaded else 0.0,
        embedding="embedding" in capabilities and "completion" not in capabilities,
    )


def most_room(record: Record) -> int:
    """Return the bytes Ollama could use if everything idle were unloaded: all memory not granted."""
    own = [device for device in record.devices if device.kind is not Kind.EXTERNAL]
    if not record.devices:
        return 1 << 62
    total = sum(device.total for device in one_a_memory(own, lambda device: device.total))
    return total - sum(device.granted for device in own)
