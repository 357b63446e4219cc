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
    name is left alone, and reported.

    Args:
        node: this node's id; ``name_of``: returns the display name of a node.
    """

    def __init__(self, lists: NodeLists, calls: RpcClient, node: str, name_of: Callable[[str], str]) -> None:
        self._lists = lists
        self._calls = calls
        self._node = node
        self._name_of = name_of

    def report_others(self, copy: Model, say: Say) -> None:
        """Report the other nodes with other content than this node under the name of ``copy``.

        ``copy``: what this node had before; nodes that have it still have the older version.
        """
        current = self._named(self._node, copy.name)
        for node in self._lists.live():
            others = [m for m in self._named(node, copy.name) if not any(_is_same(m, own) for own in current)]
            if node == self._node or not others:
                continue
            if self._has(node, copy):
                say(f"{self._name_of(node)} still has the older version: delete it there and pull it again")
            else:
                say(
                    f"{self._name_of(node)} has another version, which {copy.name} may mean: if it is "
                    "older, delete it there and pull it again"
                )

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
        if not self._has(self._node, copy):
            others = [node for node in self._lists.live() if "ollama" in self._sources(node, copy)]
            await asyncio.gather(*(self._update_at(node, copy, say, insecure) for node in others))
        self.report_others(copy, say)

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
        return {
            model.source
            for model in self._named(node, copy.name)
            if (model.digest, model.manifest) == (copy.digest, copy.manifest)
        }

    def _named(self, node: str, name: str) -> list[Model]:
        key = parse(name).key
        return [model for model in self._lists.of(node) if parse(model.name).key == key]


def _is_same(model: Model, other: Model) -> bool:
    """Return whether two models are the same version; only Ollama's have a manifest, which covers all."""
    if model.manifest and other.manifest:
        return model.manifest == other.manifest
    return model.digest == other.digest
