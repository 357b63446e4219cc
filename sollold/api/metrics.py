"""``/metrics`` for Prometheus: the requests through this node, and what its own record says."""

from __future__ import annotations

import time
from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sollold.api.cluster_view import shown
from sollold.api.fault_shape import Dialect
from sollold.api.live import LiveRequests
from sollold.api.parts import Cluster
from sollold.api.route import Route
from sollold.cluster.record import State

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class _Node(Collector):
    """The node's record and its live requests, read when asked."""

    def __init__(self, cluster: Cluster, live: LiveRequests) -> None:
        self._cluster = cluster
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """What is so at present."""
        me = self._cluster.me
        yield _gauge("sollold_nodes", "Nodes of the cluster that are alive", len(self._cluster.live()))
        leads = self._cluster.leader().leader == me.node
        yield _gauge("sollold_leader", "Whether this node leads", 1 if leads else 0)
        yield _gauge("sollold_term", "The term of the leader", self._cluster.leader().counter)
        yield _gauge("sollold_requests_in_progress", "Requests that came through this node", len(self._live))
        memory = GaugeMetricFamily("sollold_device_bytes", "Memory of a device", labels=["device", "kind"])
        for device in me.devices:
            for kind, value in (
                ("limit", device.limit),
                ("granted", device.granted),
                ("available", device.available),
                ("free", device.free),
            ):
                memory.add_metric([device.id, kind], value)
        yield memory
        names = ["deployment", "model", "backend"]
        ready = GaugeMetricFamily("sollold_endpoint_ready", "Whether it answers", labels=names)
        active = GaugeMetricFamily("sollold_endpoint_active", "Requests in the engine", labels=names)
        waiting = GaugeMetricFamily("sollold_endpoint_waiting", "Requests in line", labels=names)
        speed = GaugeMetricFamily("sollold_endpoint_tokens_per_second", "Of a single stream", labels=names)
        size = GaugeMetricFamily("sollold_endpoint_bytes", "Memory over all nodes", labels=names)
        for endpoint in me.endpoints:
            if not shown(endpoint):
                continue
            labels = [endpoint.id, endpoint.model, str(endpoint.backend)]
            ready.add_metric(labels, 1 if endpoint.state is State.READY else 0)
            active.add_metric(labels, endpoint.active)
            waiting.add_metric(labels, endpoint.waiting)
            speed.add_metric(labels, endpoint.speed)
            size.add_metric(labels, endpoint.bytes)
        yield from (ready, active, waiting, speed, size)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


class Metrics:
    """Counts requests, answers ``/metrics``. Its registry is its own: nodes in one process differ."""

    def __init__(self, cluster: Cluster, live: LiveRequests) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "sollold_http_requests", "Answers given", ["dialect", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "sollold_http_request_seconds",
            "From the request to the end of its answer",
            ["dialect"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_Node(cluster, live))

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route(
                "GET",
                "/metrics",
                self.show,
                Dialect.OLLAMA,
                "Metrics for Prometheus",
                produces=("text/plain",),
            )
        ]

    def count(self, dialect: Dialect, status: int, started: float) -> None:
        """An answer was given; ``started`` on the monotonic clock. 499: the caller hung up."""
        self._requests.labels(str(dialect), str(status)).inc()
        self._seconds.labels(str(dialect)).observe(time.monotonic() - started)

    async def show(self, request: web.Request) -> web.Response:
        """``/metrics``."""
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
