"""The cluster's models as the dialects ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from sollold.api.parts import Listed, Running
from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.record import State
from sollold.cluster.view import View
from sollold.models.library import Library
from sollold.models.library import Listed as Shelved
from sollold.models.model import Model
from sollold.models.own_models import Changed, Told, WhatName
from sollold.serving.ask import Fault, Refusal

_PATIENCE = 60.0


class ModelsHere:
    """Fulfils `sollold.api.parts.Library`."""

    def __init__(self, library: Library, view: View, calls: PeerCalls) -> None:
        self._library = library
        self._view = view
        self._calls = calls

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

    async def copy(self, source: str, destination: str, told: Told | None = None) -> None:
        """Give a model a second name, on each node that has its files; ``told``: what is said of it there.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST when it can't be done, with what to do.
        """
        shelved = self._shelved(source)
        asked = [(node, model) for node, model in self._library.find(source) if model.files]
        answers = await asyncio.gather(
            *(self._ask(node, "copy", self._there(node, model), destination, told) for node, model in asked)
        )
        if not any(answer.ok for answer in answers):
            reason = next((answer.reason for answer in answers if answer.reason), "")
            raise Refusal(
                Fault.BAD_REQUEST, reason or f"no node can read the files of {shelved.model.name}; see doctor"
            )

    async def delete(self, name: str) -> None:
        """Remove a model that was fetched by the daemon, or a second name, from every node.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST for a model that is the user's own.
        """
        model = self._shelved(name).model
        # All are asked: what a node has got in this very moment is not in its list here yet.
        nodes = [record.node for record in self._view.live()]
        answers = await asyncio.gather(*(self._ask(node, "delete", model.name) for node in nodes))
        if any(answer.ok for answer in answers):
            return
        if model.source == "own" and (reason := next((one.reason for one in answers if one.reason), "")):
            raise Refusal(Fault.BAD_REQUEST, reason)
        how = f"ollama rm {model.name}" if model.source == "ollama" else "remove its files yourself"
        raise Refusal(
            Fault.BAD_REQUEST,
            f"{model.name} was found, not fetched by the daemon, and what is yours is not deleted: {how}",
        )

    def _there(self, node: str, model: Model) -> str:
        """What the node itself calls the content."""
        names = [one.name for one in self._library.models_of(node) if one.files == model.files]
        return model.name if model.name in names or not names else names[0]

    async def _ask(
        self, node: str, method: str, source: str, destination: str = "", told: Told | None = None
    ) -> Changed:
        try:
            request = WhatName(source, destination, told or Told())
            return await self._calls.call(node, method, request, Changed, timeout=_PATIENCE)
        except PeerError as error:
            return Changed(False, f"node {node}: {error}")

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
