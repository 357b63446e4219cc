"""Tells whether a model of another node is the newest version, before a pull copies it."""

from __future__ import annotations

import asyncio
import hashlib
from enum import Enum

from sollold.models.model import Model
from sollold.models.names import HOST, Name
from sollold.models.transfer.hub_pull import version_of
from sollold.models.transfer.huggingface_hub import Hub, HubError
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.ollama_registry import OllamaRegistry

_SECONDS = 8.0
"""Seconds to wait for the internet: without it, the copy of a node will do."""


class Age(Enum):
    """How old a model is."""

    NEWEST = "newest"
    OLDER = "older"
    UNCLEAR = "unclear"
    """It has the size of the newest version; only a comparison of all bytes tells."""


async def age_of(internet: Internet, registry: OllamaRegistry, name: Name, model: Model) -> Age:
    """Return whether the hub or Ollama's registry has another version of a model; neither has a user's own.

    Raises:
        HubError: they can't be reached.
    """
    if model.named:
        return Age.NEWEST
    try:
        async with asyncio.timeout(_SECONDS):
            if name.on_hub:
                _, items = await Hub(internet).items(name)
                if model.version == version_of(name, items):
                    return Age.NEWEST
                return Age.UNCLEAR if model.size == sum(item.size for item in items) else Age.OLDER
            if name.host.lower() == HOST and model.manifest:
                raw, _ = await registry.manifest(name)
                return Age.NEWEST if hashlib.sha256(raw).hexdigest() == model.manifest else Age.OLDER
    except TimeoutError:
        raise HubError(f"{name.host} did not answer within {_SECONDS:.0f} s") from None
    except HubError as error:
        if not error.missing:
            raise
    return Age.NEWEST
