"""Offers the cluster's models to the dialects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from sollold.cluster.gossip.record import Endpoint, State
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, name_of
from sollold.control.local_models import NameChanged, NameOverrides, NameRequest, OwnError, OwnModels
from sollold.control.nodes import node_named
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.models.names import unresolved
from sollold.models.transfer.pull import Puller
from sollold.models.transfer.pull_progress import PullError

NodeNames = Callable[[Listed], list[str]]
"""Returns the names of the nodes that have a model."""
_CALL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Running:
    """A model that is loaded now."""

    endpoint: Endpoint
    node: str
    """Name of the node that serves it."""


class ModelService:
    """The models of the whole cluster: names, metadata, copies, deletion."""

    def __init__(
        self, library: Library, view: View, calls: RpcClient, local: OwnModels | None = None
    ) -> None:
        """``local``: this node's own models; without it, no files can be added."""
        self._library = library
        self._local = local
        self._view = view
        self._calls = calls

    async def models(self) -> tuple[Listed, ...]:
        """Return every model once, by name."""
        return self._library.all()

    async def add_file(self, path: str) -> str:
        """List the model in a GGUF file of this machine and return its name.

        Raises:
            Refusal: BAD_REQUEST when the file can't be read or holds no model.
        """
        if self._local is None:
            raise bad_request("this node accepts no file paths as models")
        try:
            return await self._local.add_file(path)
        except OwnError as error:
            raise bad_request(str(error)) from None

    async def find(self, name: str) -> Listed:
        """Return the model that a caller means by ``name``.

        Raises:
            Refusal: NOT_FOUND; AMBIGUOUS with the candidates; UNAVAILABLE while its holders are away.
        """
        return await self._library.named(name)

    def node_names(self, listed: Listed) -> list[str]:
        """Return the names of the nodes that have the model."""
        return [name_of(self._view, node) for node in listed.nodes]

    async def metadata(self, listed: Listed, *, whole: bool = False) -> Mapping[str, Any]:
        """Return the GGUF header's key-value pairs; ``whole``: including the values of long arrays."""
        return await self._library.metadata(listed.model.name, whole=whole)

    def running(self) -> tuple[Running, ...]:
        """Return the loaded models, from the records."""
        return tuple(
            Running(endpoint, record.name)
            for record in self._view.live()
            for endpoint in record.endpoints
            if endpoint.loaded and endpoint.state is State.READY
        )

    async def copy(
        self, source: str, destination: str, nodes: Sequence[str] = (), told: NameOverrides | None = None
    ) -> None:
        """Give a model a second name, on each node that has it or only on ``nodes``.

        ``told``: overrides for that name. They need readable files, and replace a model of that name in our
        own folder.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST, with what to do, when it is impossible.
        """
        model = (await self._exact(source)).model
        chosen = {node_named(self._view, node) for node in nodes}
        all_holders = self._library.holders(model.name)
        # Without readable files, Ollama itself gives it the name.
        holders = {node: m for node, m in all_holders if m.files or (m.source == "ollama" and told is None)}
        if missing := chosen - holders.keys():
            names = ", ".join(sorted(name_of(self._view, node) for node in missing))
            others = ", ".join(sorted(name_of(self._view, node) for node in holders)) or "none"
            raise bad_request(
                f"{names} can't read files of {model.name}; nodes that can: {others}. Pull it there first"
            )
        orders = {
            node: NameRequest(
                self._library.listed_at(node, model) or self._library.name_at(node, m),
                destination,
                told=told or NameOverrides(),
                replace=told is not None,
            )
            for node, m in holders.items()
            if not chosen or node in chosen
        }
        answers = await self._ask_all("copy", orders)
        if not any(answer.ok for answer in answers.values()) or (chosen and self._failed(answers)):
            reason = self._failed(answers) or f"no node can read the files of {model.name}; see doctor"
            raise bad_request(reason)
        await self._learn_from(answers)

    async def _learn_from(self, answers: Mapping[str, NameChanged]) -> None:
        """Refresh the lists of the changed nodes, so that the next request to this node sees the change."""
        done = [node for node, answer in answers.items() if answer.ok]
        await asyncio.gather(*(self._library.lists.refresh(node) for node in done))

    async def delete(self, name: str, nodes: Sequence[str] = ()) -> None:
        """Delete a model that the daemon fetched, or a second name, everywhere or only on ``nodes``.

        Raises:
            Refusal: NOT_FOUND; BAD_REQUEST for a model of the user's own, and for an alias.
        """
        if target := self._library.behind_alias(name):
            raise bad_request(
                f"{name} is an alias of {target} in the settings of this node (models.aliases): remove it "
                f"there, or delete {target}"
            )
        model = (await self._exact(name)).model
        holders = dict(self._library.holders(model.name))
        # Ask all nodes: the list here may lag behind.
        chosen = {node_named(self._view, node) for node in nodes} or {r.node for r in self._view.live()}
        # A node that has other content under this name keeps it.
        orders = {
            node: NameRequest(self._library.listed_at(node, model) or model.name, digest=model.digest)
            for node in chosen
        }
        answers = await self._ask_all("delete", orders)
        failed = self._failed(answers)
        if any(answer.ok for answer in answers.values()) and not (nodes and failed):
            await self._learn_from(answers)
            return
        if failed:
            raise bad_request(failed)
        if nodes and not chosen & holders.keys():
            names = ", ".join(sorted(name_of(self._view, node) for node in chosen))
            raise Refusal(Fault.NOT_FOUND, f"{names}: no model {model.name} there")
        sources = {holders[node].source for node in chosen if node in holders} or {model.source}
        advice = "remove its files yourself"
        if "ollama" in sources:
            # A caller that uses the ollama command has configured it to use this node.
            advice = f"ollama rm {model.name}, with OLLAMA_HOST naming the Ollama itself"
        raise bad_request(
            f"{model.name} was not pulled by sollold, and your own files are not deleted: {advice}"
        )

    async def _ask_all(self, method: str, orders: Mapping[str, NameRequest]) -> dict[str, NameChanged]:
        answers = await asyncio.gather(*(self._ask(node, method, order) for node, order in orders.items()))
        return dict(zip(orders, answers, strict=True))

    async def _ask(self, node: str, method: str, order: NameRequest) -> NameChanged:
        try:
            return await self._calls.call(node, method, order, NameChanged, timeout=_CALL_SECONDS)
        except PeerError as error:
            return NameChanged(False, str(error))

    def _failed(self, answers: Mapping[str, NameChanged]) -> str:
        """Return why nodes failed, each by name; empty when all succeeded or had nothing to do."""
        reasons = [
            f"{name_of(self._view, node)}: {answer.reason}"
            for node, answer in answers.items()
            if not answer.ok and answer.reason
        ]
        return "; ".join(sorted(reasons))

    async def _exact(self, name: str) -> Listed:
        """Return the model with exactly this name: changes and deletions must not guess."""
        await self._library.awaited(name)
        resolved = self._library.exact(name)
        for listed in self._library.all() if resolved.name else ():
            if listed.model.name == resolved.name:
                return listed
        raise unresolved(resolved)


class PullService:
    """Fetches models into the daemon's own folder."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller

    async def pull(self, name: str, *, insecure: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        """Yield progress as Ollama does: ``{status, digest?, total?, completed?}``, finally ``success``.

        Closing the iterator stops the fetch; another pull resumes it.

        Raises:
            Refusal: NOT_FOUND when no source has it, else UNAVAILABLE.
        """
        steps = self._puller.pull(name, insecure=insecure)
        try:
            async for step in steps:
                yield step
        except PullError as error:
            raise Refusal(Fault.NOT_FOUND if error.missing else Fault.UNAVAILABLE, str(error)) from None
        finally:
            await steps.aclose()
