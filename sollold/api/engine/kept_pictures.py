"""A llama-server that loses its place among a kept prompt's pictures is asked again to read the prompt anew.

Seen where a prompt ends or differs behind a picture that the prompt before it had twice: 500 with "Chunk not
found", each time, until another prompt has taken the slot.
"""

from __future__ import annotations

from dataclasses import replace

from sollold.api.engine.retry import RevisingService
from sollold.errors import Refusal
from sollold.serving.request import Ask, Engine

_LOST = "Chunk not found"


class KeptPicturesService(RevisingService):
    """Asks once more without what is kept of the prompt before."""

    tries = 1

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        call = ask.calls.get(Engine.LLAMA)
        if call is None or _LOST not in refusal.message:
            return None
        anew = replace(call, body={**call.body, "cache_prompt": False})
        return replace(ask, calls={**ask.calls, Engine.LLAMA: anew})
