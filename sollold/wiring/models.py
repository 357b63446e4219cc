"""The cluster's models as the dialects ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from sollold.api.parts import Listed, Running
from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.record import State
from sollold.cluster.view import View
from sollold.models.library import Library
from sollold.models.library import Listed as Shelved
from sollold.models.own_models import Changed, Told, WhatName
from sollold.serving.ask import Fault, Refusal, unresolved
from sollold.wiring.nodes import node_named

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
            Refusal: NOT_FOUND; AMBIGUOUS with the candidates; UNAVAILABLE while those who have it are away.
        """
        return self._named(await self._shelved(name))

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

    async def copy(
        self, source: str, destination: str, nodes: Sequence[str] = (), told: Told | None = None
    ) -> None:
        """Give a model a second name, on each node that has its files or on the ``nodes`` named; ``told``:
        what is said of it there.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST when it can't be done, with what to do.
        """
        model = (await self._exact(source)).model
        chosen = {node_named(self._view, node) for node in nodes}
        holders = {node: one for node, one in self._library.holders(model.name) if one.files}
        if lacking := chosen - holders.keys():
            names = ", ".join(sorted(self._name_of(node) for node in lacking))
            have = ", ".join(sorted(self._name_of(node) for node in holders)) or "none"
            raise Refusal(
                Fault.BAD_REQUEST,
                f"{names} can't read files of {model.name}; nodes that can: {have}. Pull it there first",
            )
        orders = {
            node: WhatName(
                self._library.listed_at(node, model) or self._library.name_at(node, one),
                destination,
                told=told or Told(),
            )
            for node, one in holders.items()
            if not chosen or node in chosen
        }
        answers = await self._ask_all("copy", orders)
        if not any(answer.ok for answer in answers.values()) or (chosen and self._failed(answers)):
            reason = self._failed(answers) or f"no node can read the files of {model.name}; see doctor"
            raise Refusal(Fault.BAD_REQUEST, reason)

    async def delete(self, name: str, nodes: Sequence[str] = ()) -> None:
        """Remove a model that was fetched by the daemon, or a second name, everywhere or from the ``nodes``.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST for a model that is the user's own.
        """
        model = (await self._exact(name)).model
        holders = dict(self._library.holders(model.name))
        # All are asked: what a node has got in this very moment is not in its list here yet.
        chosen = {node_named(self._view, node) for node in nodes} or {one.node for one in self._view.live()}
        # One that has other content under this name keeps it.
        orders = {
            node: WhatName(self._library.listed_at(node, model) or model.name, digest=model.digest)
            for node in chosen
        }
        answers = await self._ask_all("delete", orders)
        failed = self._failed(answers)
        if any(answer.ok for answer in answers.values()) and not (nodes and failed):
            return
        if failed:
            raise Refusal(Fault.BAD_REQUEST, failed)
        if nodes and not chosen & holders.keys():
            where = ", ".join(sorted(self._name_of(node) for node in chosen))
            raise Refusal(Fault.NOT_FOUND, f"{where}: no model {model.name} there")
        sources = {holders[node].source for node in chosen if node in holders} or {model.source}
        how = f"ollama rm {model.name}" if "ollama" in sources else "remove its files yourself"
        raise Refusal(
            Fault.BAD_REQUEST,
            f"{model.name} was found, not fetched by the daemon, and what is yours is not deleted: {how}",
        )

    async def _ask_all(self, method: str, orders: Mapping[str, WhatName]) -> dict[str, Changed]:
        answers = await asyncio.gather(*(self._ask(node, method, order) for node, order in orders.items()))
        return dict(zip(orders, answers, strict=True))

    async def _ask(self, node: str, method: str, order: WhatName) -> Changed:
        try:
            return await self._calls.call(node, method, order, Changed, timeout=_PATIENCE)
        except PeerError as error:
            return Changed(False, str(error))

    def _failed(self, answers: Mapping[str, Changed]) -> str:
        """Why nodes could not do it, each by its name; empty when all did, or had nothing to do."""
        reasons = [
            f"{self._name_of(node)}: {answer.reason}"
            for node, answer in answers.items()
            if not answer.ok and answer.reason
        ]
        return "; ".join(sorted(reasons))

    def _name_of(self, node: str) -> str:
        record = self._view.record(node)
        return record.name if record is not None else node

    async def _exact(self, name: str) -> Shelved:
        """The model of just this name: what is changed or removed is not guessed."""
        await self._library.awaited(name)
        resolved = self._library.exact(name)
        for shelved in self._library.all() if resolved.name else ():
            if shelved.model.name == resolved.name:
                return shelved
        raise unresolved(resolved)

    async def _shelved(self, name: str) -> Shelved:
        resolved = await self._library.awaited(name)
        shelved = self._library.get(name)
        if shelved is None:
            raise unresolved(resolved)
        return shelved

    def _named(self, shelved: Shelved) -> Listed:
        names = {record.node: record.name for record in self._view.live()}
        return Listed(shelved.model, tuple(names.get(node, node) for node in shelved.nodes))
