"""Reads the progress of llama-server's slots."""

from __future__ import annotations

import asyncio

import msgspec

from sollold.engines.address import EngineAddress
from sollold.serving.engine_client import EngineClient
from sollold.undecodable import UNDECODABLE

_TIMEOUT_SECONDS = 5.0


async def work_of_slots(client: EngineClient, engine: EngineAddress) -> int | None:
    """Return a number that grows with every token processed or generated there.

    None if the engine does not respond, which proves nothing: it may be busy with one long batch.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            status, body = await client.get(engine.url, "/slots", engine.headers)
        slots = msgspec.json.decode(body, type=list[_Slot]) if status == 200 else None
    except (OSError, TimeoutError, *UNDECODABLE):
        return None
    return None if slots is None else sum(slot.work for slot in slots)


class _Token(msgspec.Struct):
    n_decoded: int = 0


class _Slot(msgspec.Struct):
    """The relevant fields of an entry of ``/slots``."""

    id_task: int = 0
    n_prompt_tokens_processed: int = 0
    next_token: list[_Token] = []

    @property
    def work(self) -> int:
        """A number that grows with every token processed or generated, and with every new task."""
        generated = sum(token.n_decoded for token in self.next_token)
        return self.id_task * 1_000_000_000 + self.n_prompt_tokens_processed + generated
