"""Floor 5: builds the parts, starts and stops them in order. The only file that knows them all."""

from __future__ import annotations

import asyncio
import logging
import platform
import shutil
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from sollold import __version__, log, notify
from sollold.agent.agent import Agent
from sollold.agent.build_step import SetupFailed
from sollold.agent.fetcher import Fetcher
from sollold.agent.journal import Journal
from sollold.agent.llama_setup import Progress, persist
from sollold.agent.ollama import LocalOllama
from sollold.agent.tunnel import Tunnels
from sollold.api.app import Listener, build_app
from sollold.api.cors import ORIGINS
from sollold.api.findings import Facts, Finding, examine
from sollold.api.parts import Parts
from sollold.cluster.identity import Identity, Tokens, node_id
from sollold.cluster.node import ClusterNode
from sollold.cluster.peer_server import Peers
from sollold.cluster.record import Record
from sollold.config import Settings
from sollold.leader.leader import Leader
from sollold.leader.measured import Measured
from sollold.machine.devices import Machine
from sollold.models import demo as demo_model
from sollold.models.catalogue import Catalogue
from sollold.models.leftovers import abandoned
from sollold.models.library import Library
from sollold.models.own_models import OwnModels
from sollold.models.pace import Pace
from sollold.models.pull import Puller
from sollold.models.transfer import Sender
from sollold.places import Places
from sollold.serving.drain import drain, undrain
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engines import NodeEngines
from sollold.serving.loader import LeaderLoader
from sollold.serving.router import Router
from sollold.serving.service import Serving
from sollold.settings import Loaded, SettingsError, catalogue, differences, merged
from sollold.wiring.cluster import ClusterHere
from sollold.wiring.fetching import PullerHere
from sollold.wiring.models import ModelsHere
from sollold.wiring.ollama_relay import OllamaRelay

logger = logging.getLogger("sollold")

LIVE_KEYS = frozenset(
    {
        "http.cors_origins",
        "http.wait_limit",
        "log.level",
        "models.aliases",
        "models.folders",
        "models.huggingface",
        "models.ollama_stores",
        "models.transfer_rate",
        "serving.drain_limit",
        "serving.recover_limit",
        "serving.stall",
    }
    | {key for key in catalogue() if key.startswith("placement.")}
)
"""Settings that a reload changes at once; the others need a restart and are named."""
_CLOSE_SECONDS = 2.0
"""For connections of callers to close when every answer has ended."""


class Daemon:
    """All parts of one node. `start` puts their ends on a stack, so that they end in the opposite order."""

    def __init__(self, loaded: Loaded, folders: Places, *, demo: bool) -> None:
        self.settings = settings = loaded.settings
        self._folders = folders
        self._setup_failed = ""
        self._leaving = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining: asyncio.Task[None] | None = None
        """The drain that was asked for last, under way or done."""
        tokens = Tokens.read(settings.cluster.token, settings.cluster.old_tokens)
        self._identity = Identity(node_id(folders.state), tokens)
        self._machine = Machine(settings.node, folders.state)
        self._peers = Peers(self._identity)
        record = Record(
            node=self._identity.node,
            name=settings.node.name or platform.node() or self._identity.node,
            version=0,
            addresses=(),
            http_port=settings.http.port,
            peer_port=settings.cluster.port,
            release=__version__,
            open=tokens.open,
        )
        self._node = ClusterNode(settings.cluster, self._identity, record, self._peers, folders.state)
        view, calls = self._node, self._node.calls
        self._catalogue = Catalogue(settings.models, folders.state, demo=demo_model.write if demo else None)
        self._library = Library(self._catalogue, view, calls, self._peers, settings.models.aliases)
        self._tunnels = Tunnels(self._node.reach, view)
        self._agent = Agent(
            settings, folders, self._machine, view, calls, self._tunnels, self._catalogue.with_digest
        )
        self._agent.register(self._peers)
        self._agent.learn_from_failures(self._catalogue.load_failed)
        self._speeds = Measured(view, self._library, folders.state / "speeds.json")
        self._leader = Leader(settings, view, calls, self._library, self._speeds.correction)
        self._leader.register(self._peers)
        self._ollama = LocalOllama(
            settings.ollama,
            view,
            self._catalogue,
            Journal(folders.state / "ollama.json"),
            folders.state / "logs",
            own_port=settings.http.port,
            stores=settings.models.ollama_stores,
        )
        self._agent.beside_ollama(
            lambda endpoint, force: self._ollama.unload(endpoint, force=force), self._ollama.held
        )
        self._relay = OllamaRelay(self._ollama, view, calls)
        self._relay.register(self._peers)
        self._pace = pace = Pace(settings.models.transfer_rate)
        self._sender = Sender(self._catalogue, self._peers, self._identity.node, pace)
        self._own_models = OwnModels(self._catalogue, self._peers)
        self._puller = Puller(
            self._library,
            self._catalogue,
            calls,
            self._identity.node,
            pace,
            lambda: self._ollama.url_of_api,
            reach=self._node.reach,
        )
        self._fetcher = Fetcher(
            self._puller,
            lambda digest: self._catalogue.with_digest(digest) is not None,
            self._agent.owner.obey,
            self._catalogue.own,
            settings.models.fetch_seconds > 0,
        )
        self._fetcher.register(self._peers)
        engines = NodeEngines(self._agent, self._ollama)
        self._endpoints = EndpointServer(view, engines, settings.serving, self._peers)
        router = Router(self._identity.node, settings.ollama.strategy)
        self._loader = LeaderLoader(view, calls, settings.serving.queue)
        self._serving = Serving(
            view,
            self._library,
            calls,
            self._endpoints,
            self._loader,
            router,
            settings.serving,
            settings.http,
            settings.placement,
        )
        self._cluster = ClusterHere(
            view,
            self._library,
            calls,
            self._leader,
            self._loader,
            router,
            self._drain,
            self._agent.keep_alive,
            self._agent.owner.scan,
            self._serving.open,
            settings.http.wait_limit,
        )
        self._cluster.register(self._peers)

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything, from the ground up.

        Raises:
            PortTaken: a port is in use.
            OSError: an address is none of this machine's, a folder can't be read.
            BadSeed: a seed in the settings can't be read.
        """
        settings = self.settings
        stack.callback(self._machine.close)
        stack.push_async_callback(self._end_tasks)
        stack.callback(self._sender.close)
        await self._node.start()
        stack.push_async_callback(self._node.close)
        for part in (self._catalogue, self._library):
            await part.start()
            stack.push_async_callback(part.close)
        stack.push_async_callback(self._tunnels.close)
        await self._agent.start()
        stack.push_async_callback(self._agent.shutdown)
        await self._ollama.start()
        stack.push_async_callback(self._ollama.close)
        for planning in (self._speeds, self._leader):
            await planning.start()
            stack.push_async_callback(planning.close)
        await self._endpoints.start()
        stack.push_async_callback(self._endpoints.close)
        stack.push_async_callback(self._loader.close)
        await self._serving.start()
        stack.push_async_callback(self._serving.close)
        stack.push_async_callback(self._puller.close)
        stack.push_async_callback(self._fetcher.close)
        models = ModelsHere(self._library, self._node, self._node.calls)
        puller = PullerHere(self._puller)
        stack.push_async_callback(self._relay.close)
        parts = Parts(self._serving, models, self._cluster, puller, self._relay, self.findings)
        app = build_app(parts, settings.http, bodies=settings.serving.bodies)
        self._origins = app[ORIGINS]
        listener = Listener(app, settings.http, drain=_CLOSE_SECONDS)
        await listener.start()
        stack.push_async_callback(listener.close)
        self._own(self._set_up(), "llama.cpp set-up")
        self._own(notify.keep_telling(self.status), "systemd")

    async def leave(self, hurry: asyncio.Event) -> None:
        """Before the end: take no new work, let running answers finish or move. ``hurry`` cuts it short."""
        limit = self.settings.serving.drain_limit
        self._leaving = "draining: running answers finish or move"
        notify.notify(stopping=True, status=self._leaving)
        notify.extend(limit + 20)
        logger.info("stopping")
        self._serving.refuse("this node is stopping; ask another")
        await self._end_drain()
        draining = asyncio.ensure_future(
            drain(self._node, self._endpoints, self._serving, self.settings.serving, "the node is stopping")
        )
        waiting = asyncio.ensure_future(hurry.wait())
        await asyncio.wait((draining, waiting), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, waiting):
            task.cancel()
        await asyncio.gather(draining, waiting, return_exceptions=True)
        # While the connections stand: whoever has no answer yet gets an error that says why.
        await self._serving.close()

    def reload(self, read: Callable[[], Loaded]) -> None:
        """SIGHUP: put what can change in force, name the rest. Never ends the daemon."""
        self._own(self._reload(read), "reload")

    async def _reload(self, read: Callable[[], Loaded]) -> None:
        notify.reloading()
        try:
            loaded = await asyncio.to_thread(read)
        except SettingsError as error:
            logger.error("the settings stay as they were: %s", error)
        else:
            changed = differences(self.settings, loaded.settings)
            live = [key for key in changed if key in LIVE_KEYS]
            await self._use(merged(self.settings, loaded.settings, live))
            if held := [key for key in changed if key not in LIVE_KEYS]:
                logger.warning("these settings change with the next start: %s", ", ".join(held))
            logger.info("settings read again; changed: %s", ", ".join(live) or "none")
        finally:
            notify.notify(ready=True, status=self.status())

    async def _use(self, settings: Settings) -> None:
        """Put the settings of `LIVE_KEYS` in force."""
        models = self.settings.models
        self.settings = settings
        log.set_level(settings.log.level)
        self._origins.allowed = settings.http.cors_origins
        self._cluster.limit = settings.http.wait_limit
        self._serving.use(settings.serving, settings.http)
        self._endpoints.use(settings.serving)
        self._leader.use(settings)
        self._pace.rate = settings.models.transfer_rate
        self._library.use_aliases(settings.models.aliases)
        if settings.models != models:
            await self._catalogue.use(settings.models)

    async def _drain(self, on: bool) -> None:
        if on and self._draining is None:
            settings, reason = self.settings.serving, "the node is drained"
            work = drain(self._node, self._endpoints, self._serving, settings, reason)
            self._draining = self._own(work, "drain")
        elif not on:
            await self._end_drain()
            undrain(self._node, self._endpoints)

    async def _end_drain(self) -> None:
        """End a drain under way: at its limit it would break off what the node works on again."""
        draining, self._draining = self._draining, None
        if draining is not None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)

    def status(self) -> str:
        """One line for ``systemctl status``."""
        if self._leaving:
            return self._leaving
        live = self._node.live()
        me = self._node.me
        leader = next((one.name for one in live if one.node == self._node.leader().leader), "none")
        loaded = sorted({end.model for one in live for end in one.endpoints if end.layers and end.loaded})
        words = [f"{len(live)} node{'s' if len(live) != 1 else ''}", f"leader {leader}"]
        words.append(f"loaded: {', '.join(loaded)}" if loaded else "nothing loaded")
        if not me.build:
            words.append(me.setup or "llama.cpp: not yet")
        return "; ".join(words)

    def findings(self) -> list[Finding]:
        """What `sollold doctor` says. Blocks a moment: call it off the loop."""
        trouble: list[tuple[str, str]] = []
        if self._machine.problem:
            trouble.append((self._machine.problem, ""))
        trouble.extend((problem.what, problem.mend) for problem in self._catalogue.problems)
        left = abandoned(self._catalogue.own, time.time())
        trouble.extend((problem.what, problem.mend) for problem in left)
        if self._ollama.trouble:
            trouble.append((self._ollama.trouble, ""))
        return examine(
            Facts(
                self._node.me,
                self._node.live(),
                self._catalogue.models,
                tuple(trouble),
                self._setup_failed,
                shutil.disk_usage(self._folders.cache).free,
                str(self._folders.cache),
                self._machine.idle_gpus(),
                self._node.status(),
                str(self._folders.state / "node-id"),
            )
        )

    async def _set_up(self) -> None:
        def tell(progress: Progress) -> None:
            if progress.stage != "ready":
                text = f"llama.cpp: {progress.message} ({progress.fraction:.0%})"
                self._node.update_me(setup=text)

        def failed(error: SetupFailed) -> None:
            if str(error) != self._setup_failed:
                logger.error("no llama.cpp, so this node runs no model by itself: %s", error)
            self._setup_failed = str(error)
            self._node.update_me(setup=f"no llama.cpp: {error}")

        llama = await persist(self.settings.llama, self._folders.cache, tell, failed)
        self._setup_failed = ""
        self._catalogue.use_build(llama.build)
        await self._agent.use(llama)

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
