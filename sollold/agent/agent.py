"""This node's agent: what a leader and other heads may ask of it, and what its own daemon needs to know.

It joins the two roles of a node: `Owner` grants memory and runs workers, a `Deployment` is what this node
is the head of. It keeps devices, grants and endpoints of the node's own record true.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import aiohttp
import msgspec
from aiohttp import web

from sollold.agent.commands import Commit, Deploy, Done, Lost, Release, Renew, Reserve, Reserved, Unload
from sollold.agent.deployment import Deployment, Work
from sollold.agent.journal import Journal
from sollold.agent.llama_find import Llama
from sollold.agent.means import Means, Tunnels
from sollold.agent.ollama import PREFIX
from sollold.agent.oracle import Oracle
from sollold.agent.owner import Owner
from sollold.agent.ports import Ports
from sollold.agent.process import Process
from sollold.agent.process_log import prune
from sollold.agent.strays import Strays
from sollold.cluster.peer import PeerCalls, PeerError, PeerServer
from sollold.cluster.record import Backend, Endpoint, State
from sollold.cluster.view import View
from sollold.config import MIB, Settings
from sollold.machine.device import Device
from sollold.machine.devices import Machine
from sollold.machine.speed import cores
from sollold.models.model import Model
from sollold.places import Places
from sollold.turns import Turns

log = logging.getLogger("sollold.agent")

PUBLISH_SECONDS = 0.25
"""The record changes no more often than this."""
IDLE_SECONDS = 15.0
"""How old the idleness in the record may be."""
FAILED_SECONDS = 60.0
"""How long a failed deployment stays in the record, so that those who waited for it see why."""
_WAIT_BEAT = 5.0
_FREE_STEP = 32 * MIB


class Agent:
    """See the module's text. `register` before the peer server starts, then `start`; at the end `shutdown`.

    Args:
        tunnels: opens tunnels to other nodes' workers.
        find_model: the model with this digest on this node, or None.
    """

    def __init__(
        self,
        settings: Settings,
        places: Places,
        machine: Machine,
        view: View,
        calls: PeerCalls,
        tunnels: Tunnels,
        find_model: Callable[[str], Model | None],
    ) -> None:
        self._settings = settings
        self._places = places
        self._machine = machine
        self._view = view
        self._calls = calls
        self._tunnels = tunnels
        self._find_model = find_model
        self._node = view.me.node
        self._llama: Llama | None = None
        self._journal = Journal(places.state / "children.json")
        self._oracle = Oracle(places.state / "oracle.json")
        self._ports = Ports(settings.llama.server_port)
        self._deployments: dict[str, Deployment] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._dirty = asyncio.Event()
        self._idle_at = float("-inf")
        self._http: aiohttp.ClientSession | None = None
        self._closing = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self._strays = Strays(view, calls)
        self._unload_ollama: Callable[[str, bool], Awaitable[Done]] | None = None
        self._load_failed: Callable[[str, str], Awaitable[None]] | None = None
        self.owner = Owner(
            self._node,
            settings,
            places,
            machine,
            self._journal,
            calls,
            llama=lambda: self._llama,
            changed=self._dirty.set,
            end_head=self._end_head,
            head_process=self._head_process,
        )

    # The daemon

    def register(self, server: PeerServer) -> None:
        """Register the peer methods of `commands`, the way to workers for tunnels, and the raw route
        ``GET /deployments/{id}/wait``.

        The route answers an `Endpoint` in JSON a line, at every change, until it is ready or failed (or
        gone: then the lines just end).
        """
        server.method("reserve", Reserve, self._reserve)
        server.method("commit", Commit, self.owner.commit)
        server.method("renew", Renew, self.owner.renew)
        server.method("release", Release, self.owner.release)
        server.method("lost", Lost, self._lost)
        server.method("deploy", Deploy, self._deploy)
        server.method("unload", Unload, self._unload)
        server.tunnel(self._worker_address)
        server.route("GET", "/deployments/{id}/wait", self._wait)

    async def start(self) -> None:
        """End what an earlier run left behind, measure, then take commands. Needs no llama.cpp yet."""
        self._http = aiohttp.ClientSession()
        await asyncio.to_thread(prune, self._places.state / "logs")
        await self.owner.start()
        self._publish()
        self._unsubscribe = self._view.subscribe(self._look)
        self._tasks = [
            asyncio.create_task(self.owner.run(), name="owner"),
            asyncio.create_task(self._publishing(), name="publishing"),
            asyncio.create_task(self._unloading(), name="unloading"),
        ]
        for task in self._tasks:
            task.add_done_callback(_must_not_end)

    def learn_from_failures(self, load_failed: Callable[[str, str], Awaitable[None]]) -> None:
        """Tell ``load_failed`` the model's digest and the end of ``llama-server``'s log when it fails."""
        self._load_failed = load_failed

    def beside_ollama(
        self, unload: Callable[[str, bool], Awaitable[Done]], held: Callable[[], Mapping[str, int]]
    ) -> None:
        """There is an Ollama on this machine.

        An `Unload` of one of its endpoints goes to ``unload`` (endpoint, force); ``held``: device → bytes
        that it has loaded.
        """
        self._unload_ollama = unload
        self.owner.others = held

    async def use(self, llama: Llama) -> None:
        """This llama.cpp is the one to use from now on; the record says so."""
        self._llama = llama
        self._machine.use(llama.server)
        await self.owner.measure()
        self._publish()
        self._view.update_me(build=llama.build, setup="ready")
        await self.owner.use(llama)

    async def shutdown(self) -> None:
        """End every deployment and worker. The caller has drained the requests."""
        self._closing = True
        self._unsubscribe()
        await self._strays.close()
        for deployment in self._deployments.values():
            deployment.end("the daemon is stopping", state=State.DRAINING)
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self.owner.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._publish()
        if self._http is not None:
            await self._http.close()

    # The serving room

    def url(self, deployment: str) -> str:
        """Where the ``llama-server`` of a READY deployment answers.

        Raises:
            LookupError: it is not here, or not ready.
        """
        return self._ready(deployment).url

    @contextmanager
    def busy(self, deployment: str) -> Iterator[None]:
        """A request is in the deployment: it is not unloaded for idleness meanwhile.

        Raises:
            LookupError: it is not here, or not ready.
        """
        one = self._ready(deployment)
        one.busy += 1
        one.used()
        self._dirty.set()
        try:
            yield
        finally:
            one.busy -= 1
            one.used()
            one.end_if_due()
            self._dirty.set()

    def counts(self, deployment: str, active: int, waiting: int) -> None:
        """For the record: requests in the engine and in line."""
        one = self._deployments.get(deployment)
        if one is not None and (one.active, one.waiting) != (active, waiting):
            one.active, one.waiting = active, waiting
            one.used()
            self._dirty.set()

    def speed(self, deployment: str, tokens_per_second: float) -> None:
        """For the record: the measured speed of a single stream."""
        one = self._deployments.get(deployment)
        if one is not None:
            one.speed = tokens_per_second
            self._dirty.set()

    def keep_alive(self, deployment: str, seconds: float) -> None:
        """A caller named how long it may be idle; negative: for ever."""
        one = self._deployments.get(deployment)
        if one is not None and one.keep_alive != seconds:
            one.keep_alive = seconds
            self._dirty.set()

    def fail(self, deployment: str, reason: str) -> None:
        """It makes no progress, or answers nonsense: end it as failed."""
        one = self._deployments.get(deployment)
        if one is not None:
            one.end(reason)

    def work(self, deployment: str) -> Work | None:
        """What a deployment has done so far; None where that can't be told."""
        one = self._deployments.get(deployment)
        return one.work() if one is not None else None

    def deployment(self, deployment: str) -> Endpoint | None:
        """What the record says, or will say in a moment, of a deployment whose head this is."""
        one = self._deployments.get(deployment)
        return one.endpoint() if one is not None else None

    async def unload(self, deployment: str, reason: str, *, force: bool = False) -> Done:
        """End a deployment whose head this is. Returns when every byte is given back."""
        if self._unload_ollama is not None and deployment.startswith(PREFIX):
            return await self._unload_ollama(deployment, force)
        one = self._deployments.get(deployment)
        if one is None:
            return Done(True)
        if not force and (one.busy or one.active or one.waiting):
            return Done(False, f"{one.plan.model} has requests in it")
        if not force and one.state in (State.STARTING, State.LOADING):
            return Done(False, f"{one.plan.model} is being loaded, for somebody who waits for it")
        one.end(reason, state=State.DRAINING)
        task = self._running.get(deployment)
        if task is not None:
            await asyncio.shield(task)
        return Done(True)

    # Peers

    async def _reserve(self, caller: str, request: Reserve) -> Reserved:
        self.owner.ledger.draining = self._closing or self._view.me.draining
        return await self.owner.reserve(caller, request)

    async def _deploy(self, caller: str, request: Deploy) -> Done:
        refusal = await self.owner.obey(request.term)
        if refusal:
            return Done(False, refusal)
        if request.deployment in self._deployments:
            return Done(True)
        if self._closing or self._http is None:
            return Done(False, "the node is stopping")
        if self._llama is None:
            return Done(False, "there is no llama.cpp on this node yet")
        if request.plan.head != self._node:
            return Done(False, f"the plan's head is {request.plan.head}")
        if not self.owner.ledger.live(request.deployment):
            return Done(
                False, f"nothing is reserved for deployment {request.deployment}: it expired or was released"
            )
        model = self._find_model(request.plan.digest)
        if model is None or not model.files:
            return Done(False, f"{request.plan.model} is not on this node any more")
        self._begin(request, model, self._llama, self._http)
        return Done(True)

    def _begin(self, request: Deploy, model: Model, llama: Llama, http: aiohttp.ClientSession) -> None:
        means = Means(
            node=self._node,
            calls=self._calls,
            tunnels=self._tunnels,
            http=http,
            ports=self._ports,
            journal=self._journal,
            logs=self._places.state / "logs",
            threads=self._settings.llama.threads or cores(),
            extra=self._settings.llama.extra_args,
            local_worker_port=lambda deployment: self.owner.worker_address(self._node, deployment)[1],
            oracle=self._oracle,
        )
        self._strays.began(request.deployment)
        deployment = Deployment(request, model, llama, means, self._dirty.set)
        self._deployments[request.deployment] = deployment
        self._running[request.deployment] = asyncio.create_task(self._run(deployment))
        self._dirty.set()

    async def _run(self, deployment: Deployment) -> None:
        try:
            await deployment.run()
        finally:
            self._running.pop(deployment.id, None)
            failed = deployment.state is State.FAILED
            log.log(
                logging.WARNING if failed else logging.INFO,
                "%s %s: %s",
                deployment.plan.model,
                "failed" if failed else "is unloaded",
                deployment.reason,
                extra={"deployment": deployment.id},
            )
            if not failed:
                self._deployments.pop(deployment.id, None)
            elif deployment.head is not None and self._load_failed is not None:
                lines = deployment.head.process.last_lines()
                await self._load_failed(deployment.plan.digest, "\n".join(lines))
            self._dirty.set()

    async def _lost(self, caller: str, request: Lost) -> Done:
        one = self._deployments.get(request.deployment)
        if one is not None and caller in one.owners:
            one.end(f"{request.reason} (node {caller})", culprit=caller, crashed=request.crashed)
        return Done(True)

    async def _unload(self, caller: str, request: Unload) -> Done:
        refusal = await self.owner.obey(request.term)
        if refusal:
            return Done(False, refusal)
        return await self.unload(request.deployment, request.reason or "unloaded", force=request.force)

    async def _wait(self, request: web.Request) -> web.StreamResponse:
        deployment = self._deployments.get(request.match_info["id"])
        if deployment is None:
            raise web.HTTPNotFound(text="no such deployment on this node\n")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        while True:
            endpoint = deployment.endpoint()
            # The beat shows a caller that is gone.
            await response.write(msgspec.json.encode(endpoint) + b"\n")
            if endpoint.state not in (State.STARTING, State.LOADING):
                break
            await deployment.change(_WAIT_BEAT)
        await response.write_eof()
        return response

    # Inside

    def _ready(self, deployment: str) -> Deployment:
        one = self._deployments.get(deployment)
        if one is None or one.state is not State.READY:
            raise LookupError(f"deployment {deployment} is not ready on this node")
        return one

    async def _end_head(self, deployment: str, reason: str) -> None:
        one = self._deployments.get(deployment)
        if one is not None and deployment in self._running:
            one.end(reason)
            await one.head_gone()

    def _worker_address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        try:
            return self.owner.worker_address(caller, deployment, plain)
        except LookupError as error:
            raise PeerError(self._node, str(error), transport=False) from error

    def _look(self) -> None:
        """The cluster changed: a deployment that lost an owner is lost, though its processes may hang on.

        One whose owner drains takes no new work, and ends when what is in it has ended.
        """
        self._strays.look()
        if not self._deployments:
            return
        live = {record.node: record for record in self._view.live()}
        for one in self._deployments.values():
            if not one.alive:
                continue
            others = [node for node in one.owners if node != self._node]
            if gone := [node for node in others if node not in live]:
                one.end(f"node {gone[0]} is gone, which held layers of it", culprit=gone[0])
            elif leaving := [node for node in others if live[node].draining]:
                reason = f"node {live[leaving[0]].name} drains, which holds layers of it"
                one.close(reason, self._settings.serving.drain_limit)
                one.end_if_due()
            else:
                one.reopen()

    def _head_process(self, deployment: str) -> Process | None:
        one = self._deployments.get(deployment)
        return one.head.process if one is not None and one.head is not None else None

    async def _unloading(self) -> None:
        """End what was idle for too long; forget what failed long ago."""
        turns = Turns("the unloading of idle models", log)
        while True:
            await asyncio.sleep(1.0 if self._deployments else 3.0)
            with turns:
                self._unload_idle()

    def _unload_idle(self) -> None:
        for one in list(self._deployments.values()):
            one.end_if_due()
            if one.overdue():
                one.end(f"idle for {one.keep_alive:.0f} s", state=State.DRAINING)
            elif one.ended_at and time.monotonic() - one.ended_at > FAILED_SECONDS:
                del self._deployments[one.id]
                self._dirty.set()

    async def _publishing(self) -> None:
        turns = Turns("the publishing of the record", log)
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._dirty.wait()
            except TimeoutError:
                if not self._deployments:
                    continue
            with turns:
                self._publish()
            await asyncio.sleep(PUBLISH_SECONDS)

    def _publish(self) -> None:
        self._dirty.clear()
        me = self._view.me
        ours = [one.endpoint() for one in self._deployments.values()]
        old = [one for one in me.endpoints if one.backend is not Backend.OLLAMA]
        now = time.monotonic()
        if now - self._idle_at < IDLE_SECONDS and [_timeless(one) for one in ours] == [
            _timeless(one) for one in old
        ]:
            ours = old
        else:
            self._idle_at = now
        self._view.update_me(
            devices=_steady(me.devices, self.owner.ledger.devices()),
            grants=self.owner.ledger.grants(),
            cached=self.owner.cached,
            plain=self.owner.plain.listed(),
            endpoints=(*(one for one in me.endpoints if one.backend is Backend.OLLAMA), *ours),
        )


def _timeless(endpoint: Endpoint) -> Endpoint:
    """Without what only the passing of time changes."""
    return replace(endpoint, idle=0.0, expires=0.0)


def _steady(told: tuple[Device, ...], now: tuple[Device, ...]) -> tuple[Device, ...]:
    """``now``, but as it was ``told`` where only free memory moved, and only a little: that is no news."""
    known = {device.id: device for device in told}

    def small(old: Device, new: Device) -> bool:
        step = max(_FREE_STEP, new.total // 200)
        return (
            replace(old, free=new.free, available=new.available) == new
            and abs(old.free - new.free) < step
            and abs(old.available - new.available) < step
        )

    return tuple(
        old if (old := known.get(device.id)) is not None and small(old, device) else device for device in now
    )


def _must_not_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the task %s ended by a fault of our own", task.get_name(), exc_info=task.exception())
