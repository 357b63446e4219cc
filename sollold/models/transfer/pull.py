"""Pulls models: from a node, else through Ollama, else from the hub or Ollama's registry.

Progress is reported as by Ollama.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import aiohttp

from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.errors import system_reason
from sollold.models.gguf.header import GgufError
from sollold.models.library import Library
from sollold.models.model import Model
from sollold.models.names import HOST, Name, canonical, parse
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.folders import read_card
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.download import SourceError
from sollold.models.transfer.fetch_files import Download, download
from sollold.models.transfer.hub_pull import hub_download
from sollold.models.transfer.huggingface_hub import Hub, HubError
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.newest import Age, age_of
from sollold.models.transfer.node_pull import node_download
from sollold.models.transfer.ollama_pull import pull_through_ollama
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.partial_file import PartialFileError
from sollold.models.transfer.pull_progress import Progress, PullError, RunningPull
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.registry_pull import registry_download
from sollold.models.transfer.socket_source import DirectSource
from sollold.models.transfer.update import ModelUpdates
from sollold.tasks import cancel_and_wait, retrieve_error

log = logging.getLogger("sollold.models")

_CHECK_SECONDS = 0.5
"""Maximum seconds between two checks for new progress."""
_REPEAT_SECONDS = 30.0
"""Seconds without progress after which the last line is repeated: callers give up a silent connection, and a
pull that its caller has left is cancelled. Verifying a large model is silent for longer than they wait."""
_THREADS = 16
"""Number of threads for all pulls together; if they are busy, only pulls wait."""


class Puller:
    """Pulls models into the folder for pulled models, or into the local Ollama's store."""

    def __init__(
        self,
        library: Library,
        catalogue: Catalogue,
        calls: RpcClient,
        node: str,
        pace: RateLimit,
        internet: Internet,
        registry: OllamaRegistry,
        ollama_url: Callable[[], str] = lambda: "",
        ollama_has: Callable[[str], bool] = lambda name: False,
        reach: Dialer | None = None,
        pulled: Callable[[str], object] = lambda name: None,
    ) -> None:
        """``ollama_url``: base URL of this machine's Ollama; empty when there is none.

        ``ollama_has``: returns whether that Ollama has a model of this name.
        ``pulled`` is called, in a thread, with the name of a model that the local Ollama has pulled.
        ``reach``: bytes from nodes come over dedicated sockets; None: over ``calls``, which is slower.
        """
        self._reach = reach
        self._library = library
        self._catalogue = catalogue
        self._calls = calls
        self._node = node
        self._pace = pace
        self._ollama_url = ollama_url
        self._ollama_has = ollama_has
        self._internet = internet
        self._registry = registry
        self._pulled_here = pulled
        name_of = (lambda id: f"node {id}") if reach is None else reach.name
        self._updates = ModelUpdates(library.lists, calls, node, name_of)
        self._threads = _new_threads()
        self._pulls: dict[str, RunningPull] = {}
        self._transfers = WeakValueDictionary[str, asyncio.Lock]()
        """Key of a download → held during it."""
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Cancel all pulls; received data is kept."""
        await cancel_and_wait(*(pull.task for pull in self._pulls.values()))
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def end_idle_threads(self) -> None:
        """End the threads if nothing is being pulled."""
        if not self._pulls:
            self._threads.shutdown(wait=False)
            self._threads = _new_threads()

    async def pull(
        self, name: str, *, nodes_only: bool = False, insecure: bool = False
    ) -> AsyncGenerator[Progress, None]:
        """Pull a model, yielding its progress: ``{status, digest?, total?, completed?}`` … ``success``.

        A model that the local Ollama has, or that was pulled from the internet, is updated.

        ``nodes_only``: only from other nodes of the cluster; ``insecure``: the local Ollama may use a
        registry without TLS.

        Leaving the iteration cancels the pull unless another caller waits for it; a later call resumes it.

        Raises:
            PullError: the model can't be pulled.
        """
        name = self._library.exact(name).asked
        try:
            key = parse(name).key
        except ValueError as error:
            raise PullError(str(error)) from None
        pull = await self._pull_of(key, name)
        pull.watchers += 1
        pull.nodes_only = pull.nodes_only and nodes_only
        pull.insecure = pull.insecure or insecure
        loop = asyncio.get_running_loop()
        sent: dict[str, Progress] = {}
        sent_at = loop.time()
        try:
            assert pull.task is not None
            while True:
                ended = pull.task.done()
                lines = list(pull.lines.items())
                repeated = lines[-1:] if loop.time() - sent_at >= _REPEAT_SECONDS else []
                for id, line in [pair for pair in lines if sent.get(pair[0]) != pair[1]] or repeated:
                    sent[id], sent_at = line, loop.time()
                    yield line
                if ended:
                    break
                pull.changed.clear()
                waiting = asyncio.ensure_future(pull.changed.wait())
                try:
                    await asyncio.wait(
                        {pull.task, waiting}, timeout=_CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    waiting.cancel()
            if pull.task.cancelled():
                raise PullError("the node is stopping; pull it again to go on")
            pull.task.result()
        finally:
            pull.watchers -= 1
            if not pull.watchers:
                pull.left = True
                try:
                    if pull.task is not None and not pull.task.done():
                        await cancel_and_wait(pull.task)
                finally:
                    pull.ended.set()
                    if self._pulls.get(key) is pull:
                        del self._pulls[key]

    async def _pull_of(self, key: str, name: str) -> RunningPull:
        """Return the pull of a model that is under way, else a new one."""
        while (pull := self._pulls.get(key)) is not None and pull.left:
            # Its threads may still be writing to the files that the next pull resumes.
            await pull.ended.wait()
        # A finished pull belongs to a caller that reads slowly; its result may be outdated.
        if pull is None or pull.task is None or pull.task.done():
            pull = self._pulls[key] = RunningPull()
            pull.task = asyncio.create_task(self._run(pull, name), name=f"pull {name}")
            pull.task.add_done_callback(retrieve_error)
        return pull

    def holders(self, name: str) -> tuple[tuple[str, Model], ...]:
        """Return the nodes that have usable files of the model with exactly this name."""
        listed = self._library.exact(name).name
        return tuple(
            (node, model)
            for node, model in self._library.holders(listed)
            if model.files and not model.unusable
        )

    async def _run(self, pull: RunningPull, name: str) -> None:
        pull.say("pulling manifest")
        try:
            await self._get(pull, name)
        except (PartialFileError, SourceError) as error:
            raise PullError(str(error)) from None
        except HubError as error:
            raise PullError(str(error), missing=error.missing) from None
        except OSError as error:
            raise PullError(_write_failure(self._catalogue.own, error)) from None
        pull.say("success")

    async def _get(self, pull: RunningPull, name: str) -> None:
        parsed = parse(name)
        if not pull.nodes_only and self._ollama_url() and self._ollama_has(canonical(name)):
            copies = (model for model in self._own_models(parsed) if model.source == "ollama")
            if copy := next(copies, None):
                pull_here = partial(self._through_ollama, pull, name)
                await self._updates.through_ollama(pull_here, copy, pull.say, insecure=pull.insecure)
                return
        own = self._catalogue.get(canonical(name))
        if own is not None and own.source == "own" and not own.unusable and not pull.nodes_only:
            await self._update(pull, own)
            return
        holders = self.holders(name)
        if any(node == self._node for node, _ in holders):
            if not pull.nodes_only and own is not None and own.files and own.source != "own":
                pull.say(f"the present version stays: {_place_of(own)} is not changed by a pull")
            return
        age = Age.NEWEST
        if holders and not pull.nodes_only:
            age = await self._age_of(pull, parsed, holders[0][1])
        if age is Age.OLDER:
            try:
                await self._from_outside(pull, name, "")
                self._updates.report_others(holders[0][1], pull.say)
                return
            except (PullError, HubError, SourceError) as error:
                pull.say(f"the newest version can't be fetched ({error}): another node's copy is used")
        failure = ""
        if holders:
            try:
                await self._from_nodes(pull, holders)
                if age is Age.UNCLEAR and (copy := self._catalogue.get(canonical(name))):
                    await self._update(pull, copy)
                return
            except (PeerError, SourceError) as error:
                log.info("%s can't be fetched from another node: %s", name, error)
                failure = str(error)
        if pull.nodes_only:
            if failure:
                raise PullError(f"{name}: {failure}")
            raise PullError(f"no node of the cluster has {name} any more", missing=True)
        await self._from_outside(pull, name, failure)

    async def _age_of(self, pull: RunningPull, name: Name, model: Model) -> Age:
        try:
            return await age_of(self._internet, self._registry, name, model)
        except HubError as error:
            pull.say(f"it is unknown whether there is a newer version ({error}): another node's copy is used")
            return Age.NEWEST

    async def _from_outside(self, pull: RunningPull, name: str, failure: str) -> None:
        """Fetch a model by the local Ollama, else from the hub or Ollama's registry.

        ``failure``: why it could not be fetched from the nodes that have it; empty: none has it.
        """
        parsed = parse(name)
        if self._ollama_url():
            try:
                existed = any(model.source == "ollama" for model in self._own_models(parsed))
                await self._through_ollama(pull, name)
                if not existed:
                    await asyncio.to_thread(self._pulled_here, name)
                await self._library.lists.refresh(self._node)
                return
            except PullError as error:
                if not parsed.on_hub:
                    raise
                log.info("%s can't be pulled by Ollama: %s; fetching it from the hub", name, error)
        try:
            job = await self._on_internet(pull, parsed, None)
        except HubError as error:
            if failure:
                raise PullError(f"{name}: {failure}; {error}") from None
            if parsed.on_hub:
                raise
            raise self._absent(name, f"; {error}", "", missing=error.missing) from None
        if job is None and failure:
            raise PullError(f"{name}: {failure}")
        if job is None:
            reason = ", and there is no Ollama here to fetch it"
            raise self._absent(name, reason, ", or start Ollama", missing=True)
        await self._download_alone(pull, job)

    def _absent(self, name: str, reason: str, remedy: str, *, missing: bool) -> PullError:
        suggestions = self._library.exact(name).suggestions
        hint = f"did you mean {' or '.join(suggestions)}? Else " if suggestions else ""
        return PullError(
            f"no node of the cluster has {canonical(name)}{reason}; "
            f"{hint}pull a GGUF model as hf.co/ORG/REPO:QUANTIZATION{remedy}",
            missing=missing,
        )

    async def _on_internet(self, pull: RunningPull, name: Name, present: Model | None) -> Download | None:
        """Return the download of a model from the hub or Ollama's registry.

        None if ``present`` is up to date, or the name is of neither.

        Raises:
            HubError, SourceError: the model can't be fetched.
        """
        try:
            if name.on_hub:
                return await hub_download(
                    Hub(self._internet), name, present, self._catalogue, self._threads, pull.say
                )
            if name.host.lower() == HOST:
                return await registry_download(self._registry, name, present)
        except GgufError as error:
            raise HubError(f"the header of {name} can't be read: {error.reason}") from None
        return None

    async def _through_ollama(self, pull: RunningPull, name: str) -> None:
        await pull_through_ollama(self._http(), self._ollama_url(), name, pull.say, insecure=pull.insecure)

    async def _from_nodes(self, pull: RunningPull, holders: tuple[tuple[str, Model], ...]) -> None:
        digest = holders[0][1].digest
        # Another name of the same content may be pulled too: its partial download is the same folder.
        async with self._transfers.setdefault(digest, asyncio.Lock()):
            if self._node not in self._library.nodes_with(digest):
                await self._download(pull, await node_download(holders, self._calls, self._reach, self._pace))

    async def _update(self, pull: RunningPull, present: Model) -> None:
        """Replace a model in the folder for pulled models by its newest version."""
        folder = Path(present.files[0]).parent
        if folder.parent != self._catalogue.own:
            # Moved there by the user, perhaps together with other files.
            pull.say(f"the present version stays: {folder} is not the folder of a pull")
            return
        if present.named:
            pull.say(
                f"the present version stays: it was named so here; delete {present.name} to pull another"
            )
            return
        card = await in_thread(self._threads, read_card, folder)
        try:
            # With the name as it was first pulled: its case is part of what identifies the version.
            job = await self._on_internet(pull, parse(present.name), present)
        except (HubError, SourceError) as error:
            pull.say(f"the present version stays: {error}")
            return
        if job is not None:
            await self._download_alone(pull, replace(job, replaces=folder, card=card))
        self._updates.report_others(present, pull.say)

    async def _download_alone(self, pull: RunningPull, job: Download) -> None:
        """Download once others of the same content have ended: they use the same partial download."""
        async with self._transfers.setdefault(job.key, asyncio.Lock()):
            await self._download(pull, job)

    async def _download(self, pull: RunningPull, job: Download) -> None:
        try:
            await download(job, self._catalogue, self._calls, self._pace, self._threads, pull.say)
        finally:
            for source in job.sources:
                if isinstance(source, DirectSource):
                    source.close()

    def _own_models(self, name: Name) -> list[Model]:
        models = self._library.lists.of(self._node)
        return [model for model in models if parse(model.name).key == name.key]

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session


def _new_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")


def _place_of(model: Model) -> str:
    """Return where a model is that sollold did not pull."""
    return "Ollama's store" if model.source == "ollama" else str(Path(model.files[0]).parent)


def _write_failure(folder: Path, error: OSError) -> str:
    reason = f"it can't be written to {folder}: {system_reason(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; free some space there and pull it again: received data is kept"
    return reason
