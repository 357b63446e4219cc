"""The address of an engine and the key it requires."""

from __future__ import annotations

from dataclasses import field

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine on this machine listens.

    Attributes:
        url: base URL without a path (``http://127.0.0.1:18080``).
        key: API key that our ``llama-server`` was started with; empty for engines without one.
    """

    url: str
    key: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every request to the engine must carry."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}
