"""Where an engine answers, and what it wants to see before it does."""

from __future__ import annotations

from dataclasses import field

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """How to reach an engine of this machine.

    Attributes:
        url: without a path (``http://127.0.0.1:18080``).
        key: that a ``llama-server`` of ours was started with; empty for engines that ask for none.
    """

    url: str
    key: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every request to it must carry."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}
