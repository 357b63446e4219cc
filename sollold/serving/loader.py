"""Getting a model loaded: the contract between the service and what asks the leader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sollold.serving.ask import Waiting
from sollold.serving.router import Wish


@dataclass(frozen=True, slots=True)
class Need:
    """A model that must answer soon. ``keep_alive``: as the caller named it; ``limit``: seconds to wait."""

    wish: Wish
    keep_alive: float | None
    limit: float


class Loader(Protocol):
    """Gets endpoints made."""

    async def ready(self, need: Need, on_wait: Callable[[Waiting], None]) -> None:
        """Wait until some endpoint for it should be READY. However many wait, it is loaded once.

        Raises:
            Refusal: TOO_BIG, NOT_FOUND, UNAVAILABLE (after ``limit``, or with no leader), ENGINE.
        """
        ...

    async def unload(self, node: str, deployment: str, reason: str) -> None:
        """Ask the head to end a deployment that is not in use.

        Raises:
            Refusal: UNAVAILABLE.
        """
        ...
