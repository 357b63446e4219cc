"""Updates a model that is present, as ``ollama pull`` does: the newest version replaces it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sollold.cluster.net.rpc_client import RpcClient
from sollold.models.model import Model
from sollold.models.names import parse
from sollold.models.node_lists import NodeLists
from sollold.models.transfer.ollama_pull import pull_through_peer
from sollold.models.transfer.pull_progress import PullError, Say


class ModelUpdates:
    """Updates a model on this node, and then wherever nodes have the same version, as far as possible.

    Otherwise its name would still mean the older version, which has had it longer. Other content under the
    name is left alone.

    Args:
        node: this node's id; ``name_of``: returns the display name of a node.
    """

    def __init__(self, lists: NodeLists, calls: RpcClient, node: str, name_of: Callable[[str], str]) -> None:
        self._lists = lists
        self._calls = calls
        self._node = node
        self._name_of = name_of

    def name_older(self, copy: Model, say: Say) -> None:
        """Report the other nodes that still have the version ``copy``, which was replaced here."""
        for node in self._lists.live():
            if node != self._node and self._has(node, copy):
                say(f"{self._name_of(node)} still has the older version: delete it there and pull it again")

    async def through_ollama(
        self, pull_here: Callable[[], Awaitable[None]], copy: Model, say: Say, *, insecure: bool
    ) -> None:
        """Update ``copy``, which this machine's Ollama has and ``pull_here`` lets it pull.

        If no newer version can be obtained, the present one stays, and a line says why.
        """
        try:
            await pull_here()
        except PullError as error:
            # A model that was created here is in no registry.
            if not error.missing:
                say(f"the present version stays: {error}")
            return
        await self._lists.refresh(self._node)
        if self._has(self._node, copy):
            return
        others = [node for node in self._lists.live() if "ollama" in self._sources(node, copy)]
        await asyncio.gather(*(self._update_at(node, copy, say, insecure) for node in others))
        self.name_older(copy, say)

    async def _update_at(self, node: str, copy: Model, say: Say, insecure: bool) -> None:
        name = self._name_of(node)

        def say_there(status: str, **more: Any) -> None:
            # Without the digest: the same file has its own line for this node.
            more.pop("digest", None)
            say(f"{name}: {status}", **more)

        try:
            await pull_through_peer(self._calls, node, copy.name, say_there, insecure=insecure)
        except PullError as error:
            say(f"{name} could not update it: {error}")
        await self._lists.refresh(node)

    def _has(self, node: str, copy: Model) -> bool:
        return bool(self._sources(node, copy))

    def _sources(self, node: str, copy: Model) -> set[str]:
        """Return where a node has this version of the model from: an Ollama, a download."""
        key = parse(copy.name).key
        return {
            model.source
            for model in self._lists.of(node)
            if (model.digest, model.manifest) == (copy.digest, copy.manifest) and parse(model.name).key == key
        }
