"""A node: starts its parts in order, stops them in reverse, and reports its status."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from sollold import __version__, log, tracing
from sollold.api.http.access import ACCESS
from sollold.api.http.application import Listener, build_app
from sollold.api.http.client_address import networks
from sollold.api.http.cors import ORIGINS
from sollold.api.http.hosts import HOSTS
from sollold.api.http.request_log import REQUEST_LOG
from sollold.api.http.services import AppServices
from sollold.cluster.admission.orders import opened
from sollold.cluster.net.acceptor import is_loopback
from sollold.cluster.net.node_key import KEY_FILE
from sollold.cluster.net.reach_check import Unreached
from sollold.control.admission import AdmissionService
from sollold.control.doctor import examine
from sollold.control.engine_metrics import EngineMetrics
from sollold.control.finding import Facts, Finding
from sollold.control.models import ModelService, PullService
from sollold.daemon import systemd
from sollold.daemon.heap import trim_periodically
from sollold.daemon.parts import Parts
from sollold.engines.install.build_step import SetupFailed
from sollold.engines.install.setup import Progress, persist
from sollold.leader.draft_models import missing_drafter
from sollold.machine.memory import held_below
from sollold.models.stores.scan_result import Problem
from sollold.models.transfer.cleanup import abandoned_in
from sollold.serving.drain import drain, undrain
from sollold.settings.fault import SettingsError
from sollold.settings.live import LIVE_KEYS
from sollold.settings.load import LoadedSettings, differences, merged
from sollold.settings.paths import Places
from sollold.settings.schema import Settings
from sollold.settings.state_file import why_not_writable
from sollold.tasks import cancel_and_wait, log_failure, start_task

logger = logging.getLogger("sollold")

_CLOSE_SECONDS = 2.0
"""Timeout for client connections to close once every response has ended, in seconds."""


class Daemon:
    """All parts of one node. `start` registers their shutdown on a stack, so they stop in reverse order."""

    def __init__(self, loaded: LoadedSettings, folders: Places, *, demo: bool) -> None:
        self._folders = folders
        self._setup_failed = ""
        self._leaving = ""
        self._reloading = asyncio.Lock()
        self._reload_error = ""
        self._need_restart: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining: asyncio.Task[None] | None = None
        """The last requested drain, running or done."""
        self._parts = Parts(loaded.settings, folders, demo=demo, drain=self._drain)

    @property
    def settings(self) -> Settings:
        """The effective settings."""
        return self._parts.settings

    async def start(self, stack: AsyncExitStack) -> None:
        """Start all parts, bottom up.

        Raises:
            PortTaken: a port is in use.
            OSError: an address is not this machine's, or a folder is unreadable.
            BadSeed: a seed in the settings is invalid.
        """
        parts = self._parts
        await self._trace(stack)
        stack.callback(parts.meter.close)
        stack.push_async_callback(self._end_tasks)
        stack.callback(parts.sender.close)
        await parts.node.start()
        stack.push_async_callback(parts.node.close)
        for part in (parts.keys, parts.catalogue, parts.library.lists):
            await part.start()
            stack.push_async_callback(part.close)
        stack.push_async_callback(parts.tunnels.close)
        await parts.agent.start()
        stack.push_async_callback(parts.agent.shutdown)
        await parts.ollama.start()
        stack.push_async_callback(parts.ollama.close)
        for planning in (parts.speeds, parts.leader):
            await planning.start()
            stack.push_async_callback(planning.close)
        await parts.endpoints.start()
        stack.push_async_callback(parts.endpoints.close)
        stack.push_async_callback(parts.loader.close)
        await parts.serving.start()
        stack.push_async_callback(parts.serving.close)
        stack.push_async_callback(parts.internet.close)
        stack.push_async_callback(parts.puller.close)
        stack.push_async_callback(parts.fetcher.close)
        stack.push_async_callback(parts.relay.close)
        await self._serve_http(stack)
        await parts.monitor.start()
        stack.push_async_callback(parts.monitor.close)
        self._start_task(self._set_up(), "llama.cpp set-up")
        self._start_task(systemd.keep_telling(self.status), "systemd")
        self._start_task(trim_periodically((parts.sender, parts.puller)), "memory")

    async def _serve_http(self, stack: AsyncExitStack) -> None:
        """Build the HTTP application, and listen."""
        parts = self._parts
        settings = self.settings
        engine_metrics = EngineMetrics(lambda: parts.node.me, parts.agent.deployments.address)
        stack.push_async_callback(engine_metrics.close)
        services = AppServices(
            parts.serving,
            ModelService(parts.library, parts.node, parts.node.calls, parts.own_models),
            parts.cluster,
            parts.monitor,
            parts.logs,
            PullService(parts.puller),
            parts.relay,
            parts.responses,
            self.findings,
            parts.counters,
            parts.node.dropped,
            AdmissionService(parts.node, parts.calls, parts.secret),
            keys=parts.keys,
            passes=parts.passes,
            engine_metrics=engine_metrics,
        )
        app = build_app(
            services, settings.http, bodies=settings.serving.bodies, requests_logged=settings.log.requests
        )
        self._origins, self._hosts, self._access = app[ORIGINS], app[HOSTS], app[ACCESS]
        self._request_log = app[REQUEST_LOG]
        if parts.required_tls is not None:
            await parts.required_tls.start()
            stack.push_async_callback(parts.required_tls.close)
        listener = Listener(app, settings.http, drain=_CLOSE_SECONDS, tls=parts.tls)
        await listener.start()
        stack.push_async_callback(listener.close)

    async def _trace(self, stack: AsyncExitStack) -> None:
        """Send traces if the settings name a collector; the daemon also runs without OpenTelemetry."""
        if not self.settings.log.traces:
            return
        try:
            end = await asyncio.to_thread(tracing.start, self.settings.log.traces, self._parts.node.me.name)
        except tracing.TracesUnavailable as error:
            logger.error("%s", error)
            return
        stack.push_async_callback(asyncio.to_thread, end)

    async def leave(self, hurry: asyncio.Event) -> None:
        """Before stopping: refuse new work, let running requests finish or move. ``hurry`` cuts it short."""
        parts = self._parts
        limit = self.settings.serving.drain_limit
        self._leaving = "draining: running requests finish or move"
        systemd.notify(stopping=True, status=self._leaving)
        systemd.extend(limit + 20)
        logger.info("stopping")
        parts.serving.refuse("this node is stopping")
        await self._end_drain()
        draining = asyncio.ensure_future(
            drain(
                parts.node,
                parts.endpoints,
                parts.serving,
                self.settings.serving,
                "the node is stopping",
            )
        )
        waiting = asyncio.ensure_future(hurry.wait())
        await asyncio.wait((draining, waiting), return_when=asyncio.FIRST_COMPLETED)
        await cancel_and_wait(draining, waiting)
        # While the connections are open, clients without a response get an error that says why.
        await parts.serving.close()

    def reload(self, read: Callable[[], LoadedSettings]) -> None:
        """Handle SIGHUP: apply the settings that can change, report the rest. Never stops the daemon."""
        self._start_task(self._reload_next(read), "reload")

    async def _reload_next(self, read: Callable[[], LoadedSettings]) -> None:
        async with self._reloading:  # The settings that are read last must stay.
            await self._reload(read)

    async def _reload(self, read: Callable[[], LoadedSettings]) -> None:
        systemd.reloading()
        try:
            loaded = await asyncio.to_thread(read)
        except SettingsError as error:
            logger.error("settings not reloaded: %s", error)
            self._reload_error = str(error)
        else:
            self._reload_error = ""
            changed = differences(self.settings, loaded.settings)
            live = [key for key in changed if key in LIVE_KEYS]
            await self._apply_settings(merged(self.settings, loaded.settings, live))
            self._need_restart = tuple(key for key in changed if key not in LIVE_KEYS)
            if self._need_restart:
                logger.warning("these settings need a restart: %s", ", ".join(self._need_restart))
            if self._parts.required_tls is not None:
                await self._parts.required_tls.refresh()
            logger.info("settings reloaded; changed: %s", ", ".join(live) or "none")
        finally:
            systemd.notify(ready=True, status=self.status())

    async def _apply_settings(self, settings: Settings) -> None:
        """Apply the settings in `LIVE_KEYS`."""
        parts = self._parts
        models = self.settings.models
        parts.settings = settings
        log.set_level(settings.log.level)
        self._origins.allowed = settings.http.cors_origins
        self._hosts.allowed = settings.http.hosts
        self._access.mode = settings.http.auth
        self._request_log.mode = settings.log.requests
        self._access.proxies = networks(settings.http.trusted_proxies)
        parts.cluster.limit = settings.http.wait_limit
        parts.serving.use_settings(settings.serving, settings.http, settings.placement)
        parts.endpoints.use_settings(settings.serving)
        parts.leader.use_settings(settings)
        parts.pace.rate = settings.models.transfer_rate
        parts.library.use_aliases(settings.models.aliases)
        if settings.models != models:
            await parts.catalogue.use_settings(settings.models)

    async def _drain(self, on: bool) -> None:
        parts = self._parts
        if on and (self._draining is None or self._draining.done()):
            settings, reason = self.settings.serving, "the node is drained"
            work = drain(parts.node, parts.endpoints, parts.serving, settings, reason)
            self._draining = self._start_task(work, "drain")
        elif not on:
            await self._end_drain()
            undrain(parts.node, parts.endpoints)

    async def _end_drain(self) -> None:
        """Cancel a running drain: at its limit it would interrupt new work."""
        draining, self._draining = self._draining, None
        await cancel_and_wait(draining)

    def status(self) -> str:
        """Return a line for ``systemctl status``."""
        parts = self._parts
        if self._leaving:
            return self._leaving
        live = parts.node.live()
        me = parts.node.me
        leader = next((r.name for r in live if r.node == parts.node.leader().leader), "none")
        loaded = sorted({e.model for r in live for e in r.endpoints if e.layers and e.loaded})
        words = [f"{len(live)} node{'s' if len(live) != 1 else ''}", f"leader {leader}"]
        words.append(f"loaded: {', '.join(loaded)}" if loaded else "nothing loaded")
        words += [me.seeking] if me.seeking else []
        words += [f"{machine.name} waits for admission, code {machine.code}" for machine in me.waiting]
        if not me.build:
            words.append(me.setup or "llama.cpp: not ready")
        return "; ".join(words)

    def ready_line(self) -> str:
        """Return the log line for a successful start: version, address and number of models."""
        me, host = self._parts.node.me, self.settings.http.host
        address = host if host not in ("", "0.0.0.0", "::") else (*me.addresses, "127.0.0.1")[0]
        url = replace(me, addresses=(address,)).url
        count = sum(not model.unusable for model in self._parts.catalogue.models)
        models = f"{count} model{'s' if count != 1 else ''}"
        return f"sollold {__version__} on {me.name}: {url} (API, and a dashboard for browsers), {models} here"

    async def findings(self) -> list[Finding]:
        """Return the findings for `sollold doctor`. Takes seconds if a node can't be reached."""
        unreached, leftovers = await asyncio.gather(
            self._parts.reach_check.check(), abandoned_in(self._parts.catalogue.own, time.time())
        )
        return await asyncio.to_thread(self._examine, unreached, leftovers)

    def _examine(self, unreached: tuple[Unreached, ...], leftovers: list[Problem]) -> list[Finding]:
        """Blocks briefly: call it off the loop."""
        parts = self._parts
        trouble: list[tuple[str, str]] = []
        if parts.meter.problem:
            trouble.append((parts.meter.problem, ""))
        files = [*parts.catalogue.problems, *leftovers]
        trouble.extend(parts.internet.trouble())
        if parts.required_tls is not None:
            trouble.extend(parts.required_tls.trouble())
        if missing := missing_drafter(parts.library, self.settings.placement.speculation):
            trouble.append((missing, "fetch that model with `sollold pull`, or name another in sollold.toml"))
        if parts.ollama.trouble:
            trouble.append((parts.ollama.trouble, ""))
        return examine(
            Facts(
                parts.node.me,
                parts.node.live(),
                parts.catalogue.models,
                tuple(trouble),
                self._setup_failed,
                shutil.disk_usage(self._folders.cache).free,
                str(self._folders.cache),
                parts.meter.idle_gpus(),
                parts.node.status(),
                str(self._folders.state / KEY_FILE),
                parts.monitor.offline(),
                time.time(),
                self._access.open and not is_loopback(self.settings.http.host),
                opened(self.settings.cluster) and not parts.node.me.open,
                parts.meter.absent_gpus(),
                str(self._folders.state),
                why_not_writable(self._folders.state),
                parts.leader.lost(),
                self._reload_error,
                self._need_restart,
                tuple((problem.what, problem.fix) for problem in files),
                held_below(),
                unreached,
                parts.monitor.load_crashes.found(),
            )
        )

    async def _set_up(self) -> None:
        def tell(progress: Progress) -> None:
            if progress.stage != "ready":
                text = f"llama.cpp: {progress.message} ({progress.fraction:.0%})"
                self._parts.node.update_me(setup=text)

        def failed(error: SetupFailed) -> None:
            if str(error) != self._setup_failed:
                logger.error("no llama.cpp, so this node can't run models itself: %s", error)
            self._setup_failed = str(error)
            self._parts.node.update_me(setup=f"no llama.cpp: {error}")

        llama = await persist(self.settings.llama, self._folders.cache, tell, failed)
        self._setup_failed = ""
        self._parts.catalogue.use_build(llama.build)
        await self._parts.agent.use_llama(llama)

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = start_task(self._tasks, work, name)
        task.add_done_callback(log_failure)
        return task

    async def _end_tasks(self) -> None:
        await cancel_and_wait(*self._tasks)
