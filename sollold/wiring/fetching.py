"""Fetching models, as the dialects ask for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sollold.models.pull import Puller, PullError
from sollold.serving.ask import Fault, Refusal


class PullerHere:
    """Fulfils `sollold.api.parts.Puller`."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller

    async def pull(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """Progress as Ollama tells it.

        Raises:
            Refusal: NOT_FOUND when nobody has it, else UNAVAILABLE.
        """
        steps = self._puller.pull(name)
        try:
            async for step in steps:
                yield step
        except PullError as error:
            raise Refusal(Fault.NOT_FOUND if error.missing else Fault.UNAVAILABLE, str(error)) from None
        finally:
            await steps.aclose()
