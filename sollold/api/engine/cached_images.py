"""Retries without the prompt cache if llama-server loses its place among a cached prompt's images.

This happens if a prompt ends or differs after an image that the previous prompt contained twice: each request
fails with 500 "Chunk not found" until another prompt has taken the slot.
"""

from __future__ import annotations

from dataclasses import replace

from sollold.api.engine.retry import RevisingService
from sollold.errors import Refusal
from sollold.serving.request import Ask, Engine

_SIGN = "Chunk not found"


class CachedImagesService(RevisingService):
    """Retries once without the cache of the previous prompt."""

    tries = 1

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        call = ask.calls.get(Engine.LLAMA)
        if call is None or _SIGN not in refusal.message:
            return None
        uncached = replace(call, body={**call.body, "cache_prompt": False})
        return replace(ask, calls={**ask.calls, Engine.LLAMA: uncached})
