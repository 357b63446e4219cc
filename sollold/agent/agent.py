"""This node's agent: carries out commands of the leader and of other heads, and informs its own daemon.

It combines the two roles of a node: `GrantManager` grants memory and runs workers, and each `Deployment` is
one whose head is this node. `RecordPublisher` keeps the node's own record up to date.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import aiohttp
import msgspec
from aiohttp import web

from sollold.agent.cache_fill import Connect
from sollold.agent.deployments import Deployments
from sollold.agent.grants import GrantManager
from sollold.agent.record_publisher import RecordPublisher
from sollold.agent.worker_access import WorkerAccess
from sollold.cluster.gossip.record import OLLAMA_PREFIX
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.engines.commands import (
    Commit,
    Deploy,
    Done,
    FillCache,
    Lost,
    Release,
    Renew,
    Reserve,
    Reserved,
    Unload,
)
from sollold.engines.install.find import Llama, LlamaUnusable, look_at
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.context import DeploymentContext
from sollold.engines.llamacpp.deployment import Deployment
from sollold.engines.llamacpp.engine_key import remove_leftovers
from sollold.engines.llamacpp.fit_check import FitCheck
from sollold.engines.llamacpp.kept_prompts import KeptPrompts
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.process_log import prune
from sollold.engines.llamacpp.stale_grants import StaleGrants
from sollold.engines.llamacpp.tunnel import Tunnels
from sollold.machine.devices import DeviceMeter
from sollold.machine.speed import cores
from sollold.models.gguf.header import Header
from sollold.models.model import Model
from sollold.models.stores.patient_read import read_patiently
from sollold.retry import LogAndRetry
from sollold.settings.paths import Places
from sollold.settings.schema import Settings
from sollold.tasks import cancel_and_wait
from sollold.turns import next_turn

log = logging.getLogger("sollold.agent")


class Agent:
    """Both roles of a node in one object. Call `register` before the peer server starts, then `start`, and
    finally `shutdown`. The constructor is long because it creates all parts.

    Args:
        tunnels: opens tunnels to other nodes' workers.
        find_model: returns the model with this digest on this node, or None.
        holders: returns the nodes that have the files of the model with this digest.
        header: reads a local model's header; raises `GgufError`, or `LookupError` if the file system hangs.
        connect: opens another node's files of a model.
    """

    def __init__(
        self,
        settings: Settings,
        places: Places,
        meter: DeviceMeter,
        view: View,
        calls: RpcClient,
        tunnels: Tunnels,
        find_model: Callable[[str], Model | None],
        holders: Callable[[str], tuple[str, ...]],
        header: Callable[[Model], Awaitable[Header]],
        connect: Connect,
    ) -> None:
        self._settings = settings
        self._places = places
        self._meter = meter
        self._view = view
        self._calls = calls
        self._tunnels = tunnels
        self._find_model = find_model
        self._holders = holders
        self._header = header
        self._node = view.me.node
        self._name = partial(name_of, view)
        self._llama: Llama | None = None
        self._journal = Journal(places.state / "children.json")
        self._fit_check = FitCheck(places.state / "fit_check.json")
        self._ports = Ports(settings.llama.server_port)
        self._keys = places.state / "engine_keys"
        self._prompts = KeptPrompts(places.cache / "prompts", settings.serving.kept_prompts)
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._http: aiohttp.ClientSession | None = None
        self._closing = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self._stale_grants = StaleGrants(view, calls)
        self._unload_ollama: Callable[[str, bool], Awaitable[Done]] | None = None
        self.deployments = Deployments(
            view,
            settings.serving.drain_limit,
            note=lambda: self._publisher.note_deployment(),
            changed=self._changed.set,
        )
        self.grants = GrantManager(
            self._node,
            settings,
            places,
            meter,
            self._journal,
            calls,
            leader=view.leader,
            llama=lambda: self._llama,
            changed=self._changed.set,
            end_head=self.deployments.end_head,
            head_process=self.deployments.head_process,
            find_model=find_model,
            connect=connect,
            name=self._name,
        )
        self._worker_access = WorkerAccess(self._node, self.grants, self._name)
        self._publisher = RecordPublisher(view, self.grants, self.deployments.all, self._changed)

    # For the daemon

    def register(self, server: RpcServer) -> None:
        """Register the peer methods of `commands`, access to workers for tunnels, and the raw route
        ``GET /deployments/{id}/wait``.

        The route streams an `Endpoint` as one JSON line per change until it is ready or has failed; if it
        vanishes, the stream just ends.
        """
        server.method("reserve", Reserve, self._reserve)
        server.method("commit", Commit, self._commit)
        server.method("fill", FillCache, self.grants.fill)
        server.method("renew", Renew, self.grants.renew)
        server.method("release", Release, self.grants.release)
        server.method("lost", Lost, self._lost)
        server.method("deploy", Deploy, self._deploy)
        server.method("unload", Unload, self._unload)
        server.tunnel(self._worker_access)
        server.route("GET", "/deployments/{id}/wait", self._wait)

    async def start(self) -> None:
        """Clean up after an earlier run, measure, then accept commands. Does not need llama.cpp yet."""
        self._http = aiohttp.ClientSession()
        await asyncio.to_thread(prune, self._places.state / "logs")
        await self.grants.start()
        await asyncio.to_thread(remove_leftovers, self._keys)
        await asyncio.to_thread(self._prompts.open)
        self._publisher.publish()
        self._unsubscribe = self._view.subscribe(self._view_changed)
        self._tasks = [
            asyncio.create_task(self.grants.run(), name="grants"),
            asyncio.create_task(self._publisher.run(), name="publishing"),
            asyncio.create_task(self._unload_idle(), name="unloading"),
        ]
        for task in self._tasks:
            task.add_done_callback(_must_not_end)

    def learn_from_failures(self, load_failed: Callable[[str, str], Awaitable[None]]) -> None:
        """Call ``load_failed`` with the model's digest and the end of ``llama-server``'s log if it fails."""
        self.deployments.load_failed = load_failed

    def account_for_ollama(
        self, unload: Callable[[str, bool], Awaitable[Done]], loaded: Callable[[], Mapping[str, int]]
    ) -> None:
        """Take this machine's Ollama into account.

        ``unload`` (endpoint, force) carries out an `Unload` of one of its endpoints; ``loaded`` returns
        device → bytes that it has loaded.
        """
        self._unload_ollama = unload
        self.grants.memory.others = loaded

    async def use_llama(self, llama: Llama) -> None:
        """Use this llama.cpp from now on, publish its build, and check the external workers' versions."""
        await self._use_build(llama)
        await self.grants.external_watch.use_llama(llama)

    async def _use_build(self, llama: Llama) -> None:
        self._llama = llama
        self._meter.use_server(llama.server)
        await self.grants.memory.measure()
        self._publisher.publish()
        self._view.update_me(build=llama.build, setup="ready")

    async def shutdown(self) -> None:
        """Stop every deployment and worker. The caller has drained the requests."""
        self._closing = True
        self._unsubscribe()
        await asyncio.to_thread(self._prompts.close)
        await self._stale_grants.close()
        await self.deployments.close()
        await self.grants.close()
        await cancel_and_wait(*self._tasks)
        self._publisher.publish()
        if self._http is not None:
            await self._http.close()

    # Peer methods

    async def _reserve(self, caller: str, request: Reserve) -> Reserved:
        self.grants.ledger.draining = self._closing or self._view.me.draining
        reserved = await self.grants.reserve(caller, request)
        if not reserved.ok:
            self._publisher.publish_exactly()
        return reserved

    async def _commit(self, caller: str, request: Commit) -> Done:
        refusal = await self._inspect_replaced()
        return Done(False, refusal) if refusal else await self.grants.commit(caller, request)

    async def _deploy(self, caller: str, request: Deploy) -> Done:
        refusal = await self.grants.obey(caller, request.term) or await self._inspect_replaced()
        if refusal:
            return Done(False, refusal)
        if request.deployment in self.deployments.all:
            return Done(True)
        if self._closing or self._http is None:
            return Done(False, "the node is stopping")
        if self._llama is None:
            return Done(False, "this node has no llama.cpp yet")
        if request.plan.head != self._node:
            return Done(False, f"the plan's head is {self._name(request.plan.head)}")
        if not self.grants.ledger.live(request.deployment):
            return Done(
                False, f"nothing is reserved for deployment {request.deployment}: it expired or was released"
            )
        model = self._find_model(request.plan.digest)
        if model is None or not model.files:
            return Done(False, f"{request.plan.model} is no longer on this node")
        draft: Model | None = None
        if request.plan.draft_digest:
            draft = self._find_model(request.plan.draft_digest)
            if draft is None or not draft.files:
                return Done(False, f"{request.plan.drafts_by} is no longer on this node")
        self._begin(request, model, draft, self._llama, self._http)
        return Done(True)

    def _begin(
        self,
        request: Deploy,
        model: Model,
        draft: Model | None,
        llama: Llama,
        http: aiohttp.ClientSession,
    ) -> None:
        context = DeploymentContext(
            node=self._node,
            calls=self._calls,
            tunnels=self._tunnels,
            http=http,
            ports=self._ports,
            journal=self._journal,
            logs=self._places.state / "logs",
            keys=self._keys,
            prompts=self._prompts,
            threads=self._settings.llama.threads or cores(),
            extra=self._settings.llama.extra_args,
            local_worker_port=self._worker_access.local_port,
            fit_check=self._fit_check,
            holders=self._holders,
            header=self._header,
            name=self._name,
        )
        self._stale_grants.register_own(request.deployment)
        deployment = Deployment(request, model, llama, context, self._publisher.note_deployment, draft)
        self.deployments.add(deployment)

    async def _lost(self, caller: str, request: Lost) -> Done:
        deployment = self.deployments.all.get(request.deployment)
        if deployment is not None and caller in deployment.participants:
            deployment.end(
                f"{request.reason} ({self._name(caller)})", culprit=caller, crashed=request.crashed
            )
        return Done(True)

    async def _unload(self, caller: str, request: Unload) -> Done:
        refusal = await self.grants.obey(caller, request.term)
        if refusal:
            return Done(False, refusal)
        if request.when_idle:
            deployment = self.deployments.all.get(request.deployment)
            if deployment is not None:
                deployment.stop_accepting(request.reason, within=float("inf"))
            return Done(True)
        if self._unload_ollama is not None and request.deployment.startswith(OLLAMA_PREFIX):
            done = await self._unload_ollama(request.deployment, request.force)
            self.grants.memory.invalidate()
            return done
        reason = request.reason or "unloaded"
        return await self.deployments.unload(request.deployment, reason, force=request.force)

    async def _wait(self, request: web.Request) -> web.StreamResponse:
        deployment = request.match_info["id"]
        if deployment not in self.deployments.all:
            raise web.HTTPNotFound(text="no such deployment on this node\n")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for endpoint in self.deployments.loading(deployment):
            # Regular writes reveal a client that is gone.
            await response.write(msgspec.json.encode(endpoint) + b"\n")
        await response.write_eof()
        return response

    # Internal

    async def _inspect_replaced(self) -> str:
        """If llama.cpp was replaced, for example by an upgrade, inspect and use the new one: all nodes of a
        deployment must run the same build. Return why it can't be used, or an empty string."""
        llama = self._llama
        try:
            if llama is None or not await read_patiently(llama.replaced, llama.server):
                return ""
            found = await asyncio.to_thread(look_at, llama.server, llama.worker)
        except LookupError as error:
            return f"llama.cpp can't be used: {error}"
        except LlamaUnusable as error:
            return f"llama.cpp was replaced: {error}; restart sollold, which finds or builds another"
        log.warning("llama.cpp %s was replaced by %s: %s", llama.build, found.build, found.server)
        await self._use_build(found)
        # Not awaited: it is repeated until a worker of the new build runs.
        checking = self.grants.external_watch.use_llama(found)
        self._tasks.append(asyncio.create_task(checking, name="external workers' versions"))
        return ""

    def _view_changed(self) -> None:
        """Handle a change in the cluster."""
        self._stale_grants.release_stale()
        self.deployments.check_participants()

    async def _unload_idle(self) -> None:
        """Unload what has been idle for too long; forget old failures."""
        retrying = LogAndRetry("the unloading of idle models", log)
        while True:
            await next_turn(1.0 if self.deployments.all else 3.0)
            with retrying:
                self.deployments.unload_idle()


def _must_not_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the task %s ended by an internal error", task.get_name(), exc_info=task.exception())
