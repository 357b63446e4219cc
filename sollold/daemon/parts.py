"""Assembles the parts of a node, bottom up. Nothing is started here."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from functools import partial

from sollold import __version__
from sollold.agent.agent import Agent
from sollold.agent.fetcher import Fetcher
from sollold.api.http.server_tls import certificate_of
from sollold.cluster.admission.orders import secret_of
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.record_check import printable_name
from sollold.cluster.net.certificate_authority import Subject, authority_pem, subject_of
from sollold.cluster.net.identity import Identity
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.reach_check import ReachCheck
from sollold.cluster.net.rpc_server import RpcServer
from sollold.control.activity import Activity
from sollold.control.cluster import ClusterService
from sollold.control.keys import Keys
from sollold.control.local_models import OwnModels
from sollold.control.logs import LogService
from sollold.control.member_pass import MemberPasses
from sollold.control.monitor import Monitor
from sollold.control.ollama_relay import OllamaRelay
from sollold.control.responses import ResponseService
from sollold.control.secret_change import SecretChanges
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.tunnel import Tunnels
from sollold.engines.ollama.service import LocalOllama
from sollold.leader.leader import Leader
from sollold.leader.speed_calibration import SpeedCalibration
from sollold.machine.devices import DeviceMeter
from sollold.models.gguf import demo_model as demo_model
from sollold.models.library import Library
from sollold.models.stores.catalogue import Catalogue
from sollold.models.transfer.cleanup import sweep
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.peer_source import Sender
from sollold.models.transfer.pull import Puller
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.remote_header import RemoteHeaders
from sollold.models.transfer.socket_source import DirectSource
from sollold.serving.counters import Counters
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engines import Engines
from sollold.serving.loader import Loader
from sollold.serving.router import Router
from sollold.serving.service import Serving
from sollold.settings.paths import Places
from sollold.settings.schema import Settings


class Parts:
    """All parts of one node, each created with those that it needs.

    Args:
        drain: starts or ends a drain of this node.

    Attributes:
        settings: the effective settings.
    """

    def __init__(
        self,
        settings: Settings,
        folders: Places,
        *,
        demo: bool,
        drain: Callable[[bool], Awaitable[None]],
    ) -> None:
        self.settings = settings
        self._folders = folders
        self._drain = drain
        self._build_cluster()
        self._build_models(demo)
        self._build_engines()
        self._build_transfers()
        self._build_serving()

    def _build_cluster(self) -> None:
        """Build this node's membership, and the measurement of its machine."""
        settings, state = self.settings, self._folders.state
        key = NodeKey.load(state)
        tokens, ring = secret_of(settings.cluster, state, key.node)
        self.identity = Identity(key, tokens)
        self.meter = DeviceMeter(settings.node, state)
        self.peers = RpcServer(self.identity)
        record = Record(
            node=self.identity.node,
            name=printable_name(settings.node.name or platform.node()) or self.identity.node,
            version=0,
            addresses=(),
            http_port=settings.http.port,
            peer_port=settings.cluster.port,
            release=__version__,
            open=tokens.open,
            tls=settings.http.requires_tls,
        )
        self.node = ClusterNode(settings.cluster, self.identity, record, self.peers, state, ring)
        self.calls = self.node.calls
        self.keys = Keys(self.node, self.calls, state / "keys.json")
        self.keys.register(self.peers)
        self.reach_check = ReachCheck(self.node, self.node.reach, self.calls)
        self.reach_check.register(self.peers)
        self.passes = MemberPasses(
            self.node, self.calls, lambda: authority_pem(self.identity.tokens.accepted[0])
        )
        self.passes.register(self.peers)
        self.secret = SecretChanges(self.node, self.calls)
        self.secret.register(self.peers)
        self.tls = certificate_of(settings.http, self.identity, self._subject)
        self.required_tls = self.tls if settings.http.requires_tls else None
        """None if HTTP is allowed: then a certificate is issued when a client uses TLS for the first time."""

    def _subject(self) -> Subject:
        """Return the names and addresses for this node's certificate."""
        return subject_of(self.node.me.name, self.node.me.addresses, self.settings.http.hosts)

    def _build_models(self, demo: bool) -> None:
        """Build the models of this node and of the cluster."""
        settings, state = self.settings, self._folders.state
        write_demo = demo_model.write if demo else None
        self.catalogue = Catalogue(settings.models, state, demo=write_demo, sweep=sweep)
        self.library = Library(self.catalogue, self.node, self.calls, self.peers, settings.models.aliases)
        self.own_models = OwnModels(self.catalogue, self.peers)

    def _build_engines(self) -> None:
        """Build what runs on this node, and the leader, which plans it."""
        settings, folders, view, calls = self.settings, self._folders, self.node, self.calls
        self.tunnels = Tunnels(self.node.reach, view)
        self.agent = Agent(
            settings,
            folders,
            self.meter,
            view,
            calls,
            self.tunnels,
            self.catalogue.with_digest,
            self.library.nodes_with,
            self.catalogue.header,
            partial(DirectSource, self.node.reach),
        )
        self.agent.register(self.peers)
        self.agent.learn_from_failures(self.catalogue.load_failed)
        self.speeds = SpeedCalibration(view, self.library, folders.state / "speeds.json")
        self.leader = Leader(
            settings,
            view,
            calls,
            self.library,
            self.speeds.correction,
            draft_stats=self.speeds.draft_stats,
        )
        self.leader.register(self.peers)
        self.ollama = LocalOllama(
            settings.ollama,
            view,
            self.catalogue,
            Journal(folders.state / "ollama.json"),
            folders.state / "logs",
            own_port=settings.http.port,
            stores=settings.models.ollama_stores,
        )
        self.agent.account_for_ollama(
            lambda endpoint, force: self.ollama.unload(endpoint, force=force), self.ollama.loaded_bytes
        )
        self.library.lists.sources.append(self.ollama.refresh)
        self.own_models.delete_from_ollama = self.ollama.delete
        self.own_models.copy_in_ollama = self.ollama.copy
        self.relay = OllamaRelay(self.ollama, view, calls, self.library.lists.refresh)
        self.relay.register(self.peers)

    def _build_transfers(self) -> None:
        """Build the transfer of model files between nodes and from the hubs."""
        settings, me = self.settings, self.identity.node
        self.pace = RateLimit(settings.models.transfer_rate)
        self.sender = Sender(self.catalogue, self.peers, me, self.pace)
        self.internet = Internet()
        self.registry = OllamaRegistry(self.internet)
        self.puller = Puller(
            self.library,
            self.catalogue,
            self.calls,
            me,
            self.pace,
            self.internet,
            self.registry,
            lambda: self.ollama.url_of_api,
            self.ollama.has,
            reach=self.node.reach,
            pulled=self.ollama.created.add,
        )
        self.fetcher = Fetcher(
            self.puller,
            lambda digest: self.catalogue.with_digest(digest) is not None,
            self.agent.grants.obey,
            self.catalogue.own,
            settings.models.fetch_seconds > 0,
        )
        self.fetcher.register(self.peers)

    def _build_serving(self) -> None:
        """Build the request path, and the cluster-wide commands."""
        settings, view, calls = self.settings, self.node, self.calls
        engines = Engines(self.agent.deployments, self.ollama)
        self.counters = Counters()
        self.endpoints = EndpointServer(view, engines, settings.serving, self.peers, counters=self.counters)
        router = Router(self.identity.node, settings.ollama.strategy)
        self.loader = Loader(view, calls, settings.serving.queue, self.agent.deployments)
        self.serving = Serving(
            view,
            self.library,
            calls,
            self.endpoints,
            self.loader,
            router,
            settings.serving,
            settings.http,
            settings.placement,
            self.counters,
        )
        self.cluster = ClusterService(
            view,
            self.library,
            calls,
            self.leader,
            self.loader,
            router,
            self._drain,
            self.agent.deployments.keep_alive,
            self.agent.grants.external_watch.scan,
            self.agent.grants.external_watch.name,
            self.serving.open,
            settings.http.wait_limit,
            RemoteHeaders(self.internet, self.registry),
        )
        self.cluster.register(self.peers)
        self.logs = LogService(view, calls, self.library.resolve, self._folders.state / "logs")
        self.logs.register(self.peers)
        self.responses = ResponseService(view.me.node, calls)
        self.responses.register(self.peers)
        gpus = self.meter.gpu_loads if self.meter.can_tell_load else None
        self.monitor = Monitor(view, calls, Activity(), self.node.left, gpus, self.node.evicted)
        self.monitor.register(self.peers)
