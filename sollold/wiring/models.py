"""The cluster's models as the dialects ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sollold.api.parts import Listed, Running
from sollold.cluster.record import State
from sollold.cluster.view import View
from sollold.models.library import Library
from sollold.models.library import Listed as Shelved
from sollold.serving.ask import Fault, Refusal


class ModelsHere:
    """Fulfils `sollold.api.parts.Library`.

    Args:
        own: the folder with what the daemon itself fetched; nothing outside it is ever removed.
    """

    def __init__(self, library: Library, view: View, own: Path) -> None:
        self._library = library
        self._view = view
        self._own = own

    async def models(self) -> tuple[Listed, ...]:
        """Every model once, by name."""
        return tuple(self._named(shelved) for shelved in self._library.all())

    async def find(self, name: str) -> Listed:
        """The model a caller means by ``name``.

        Raises:
            Refusal: NOT_FOUND, or AMBIGUOUS with the candidates.
        """
        return self._named(self._shelved(name))

    async def metadata(self, listed: Listed) -> Mapping[str, Any]:
        """The GGUF header's key-value pairs, long arrays left out."""
        return await self._library.metadata(listed.model.name)

    def running(self) -> tuple[Running, ...]:
        """What is loaded now, from the records."""
        return tuple(
            Running(endpoint, record.name)
            for record in self._view.live()
            for endpoint in record.endpoints
            if endpoint.loaded and endpoint.state is State.READY
        )

    def _shelved(self, name: str) -> Shelved:
        resolved = self._library.resolve(name)
        shelved = self._library.get(name)
        if shelved is None:
            fault = Fault.AMBIGUOUS if resolved.candidates else Fault.NOT_FOUND
            raise Refusal(fault, resolved.message)
        return shelved

    def _named(self, shelved: Shelved) -> Listed:
        names = {record.node: record.name for record in self._view.live()}
        return Listed(shelved.model, tuple(names.get(node, node) for node in shelved.nodes))
