"""The metrics of ``/metrics``: requests through this node, loads, the node's own record, missing nodes.

Names follow Prometheus' conventions (base units, ``_total`` for counters) and, if there is one, the name that
vLLM's dashboards use, after the prefix. Imported at the first request, since with prometheus_client it takes
2 MB.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sollold import __version__
from sollold.api.cluster.engine_families import EngineFamilies
from sollold.api.cluster.views import is_listed, names_of
from sollold.api.http.request_log import KeyUsage, ResponseCounts
from sollold.cluster.gossip.record import State
from sollold.control import activity
from sollold.control.cluster import ClusterService
from sollold.control.engine_metrics import EngineText
from sollold.control.monitor import Monitor


class _Node(Collector):
    """Metrics of the node's record, links and devices, and of the cluster, read at each request."""

    def __init__(
        self, cluster: ClusterService, monitor: Monitor, dropped: Callable[[], dict[str, int]]
    ) -> None:
        self._cluster = cluster
        self._monitor = monitor
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        yield from self._cluster_metrics()
        yield from self._devices()
        yield from self._endpoints()
        yield from self._links()

    def _cluster_metrics(self) -> Iterator[Metric]:
        me, live, offline = self._cluster.me, self._cluster.live(), self._monitor.offline()
        yield InfoMetricFamily(
            "sollold_build",
            "Versions of this node",
            value={"version": __version__, "llama_cpp": me.build, "node": me.name},
        )
        yield _gauge("sollold_tasks", "Tasks of the daemon's event loop", len(asyncio.all_tasks()))
        yield _gauge("sollold_nodes", "Live nodes of the cluster", len(live))
        lost = sum(not node.stopped for node in offline)
        yield _gauge("sollold_nodes_missing", "Nodes that stopped responding without leaving", lost)
        missing = GaugeMetricFamily(
            "sollold_node_offline_timestamp_seconds",
            "When a node that is offline was last seen, until it returns or is removed",
            labels=["name", "reason"],
        )
        labels = _distinct({node.record.node: node.record.name for node in offline})
        for node in offline:
            missing.add_metric([labels[node.record.node], "stopped" if node.stopped else "lost"], node.since)
        yield missing
        leader = self._cluster.leader()
        yield _gauge("sollold_leader", "Whether this node leads", 1 if leader.leader == me.node else 0)
        yield _gauge("sollold_term", "The term of the leader", leader.counter)
        yield _gauge("sollold_draining", "Whether this node drains", 1 if me.draining else 0)
        requests = self._monitor.activity
        yield _gauge(
            "sollold_requests_in_progress", "Requests in progress through this node", requests.active()
        )
        events = CounterMetricFamily("sollold_events", "Events seen by this node", labels=["kind"])
        for kind, count in sorted(self._monitor.events.counts.items()):
            events.add_metric([str(kind)], count)
        yield events
        dropped = CounterMetricFamily(
            "sollold_gossip_dropped", "Packets and messages of other nodes rejected", labels=["reason"]
        )
        for reason, count in self._dropped().items():
            dropped.add_metric([reason], count)
        yield dropped

    def _devices(self) -> Iterator[Metric]:
        texts = {
            "limit": "Maximum memory of the device to reserve",
            "granted": "Reserved for models",
            "available": "Memory that a further reservation could get",
            "free": "Free memory of the device, as last measured",
        }
        families = {
            name: GaugeMetricFamily(f"sollold_device_memory_{name}_bytes", text, labels=["device", "kind"])
            for name, text in texts.items()
        }
        for device in self._cluster.me.devices:
            for name, family in families.items():
                family.add_metric([device.id, str(device.kind)], getattr(device, name))
        yield from families.values()
        busy = GaugeMetricFamily(
            "sollold_gpu_utilization_ratio", "Fraction of time in which the GPU was busy", labels=["device"]
        )
        heat = GaugeMetricFamily(
            "sollold_gpu_temperature_celsius", "Temperature of the GPU", labels=["device"]
        )
        power = GaugeMetricFamily("sollold_gpu_power_watts", "Power drawn by the GPU", labels=["device"])
        for gpu in self._monitor.gpu_loads:
            for family, value in ((busy, gpu.utilization), (heat, gpu.temperature), (power, gpu.power)):
                if value == value:
                    family.add_metric([gpu.device], value)
        yield from (busy, heat, power)

    def _endpoints(self) -> Iterator[Metric]:
        names = ["deployment", "model", "backend"]
        ready = GaugeMetricFamily("sollold_endpoint_ready", "Whether the endpoint answers", labels=names)
        failed = GaugeMetricFamily("sollold_endpoint_failed", "Whether the endpoint has failed", labels=names)
        active = GaugeMetricFamily("sollold_endpoint_active", "Requests running in the engine", labels=names)
        waiting = GaugeMetricFamily("sollold_endpoint_waiting", "Requests queued", labels=names)
        slots = GaugeMetricFamily("sollold_endpoint_slots", "Maximum of concurrent requests", labels=names)
        speed = GaugeMetricFamily(
            "sollold_endpoint_tokens_per_second", "Tokens per second of a single stream", labels=names
        )
        size = GaugeMetricFamily("sollold_endpoint_bytes", "Memory used on all nodes", labels=names)
        drafted = CounterMetricFamily("sollold_endpoint_drafted_tokens", "Tokens drafted", labels=names)
        accepted = CounterMetricFamily(
            "sollold_endpoint_accepted_tokens", "Tokens drafted and accepted", labels=names
        )
        for endpoint in self._cluster.me.endpoints:
            if not is_listed(endpoint):
                continue
            labels = [endpoint.id, endpoint.model, str(endpoint.backend)]
            ready.add_metric(labels, 1 if endpoint.state is State.READY else 0)
            failed.add_metric(labels, 1 if endpoint.state is State.FAILED else 0)
            active.add_metric(labels, endpoint.active)
            waiting.add_metric(labels, endpoint.waiting)
            slots.add_metric(labels, endpoint.slots)
            speed.add_metric(labels, endpoint.speed)
            size.add_metric(labels, endpoint.bytes)
            if endpoint.drafts.by:
                drafted.add_metric(labels, endpoint.drafts.drafted)
                accepted.add_metric(labels, endpoint.drafts.accepted)
        yield from (ready, failed, active, waiting, slots, speed, size, drafted, accepted)

    def _links(self) -> Iterator[Metric]:
        names = names_of(self._cluster.live(), self._monitor.offline())
        round_trip = GaugeMetricFamily(
            "sollold_link_round_trip_seconds",
            "Round-trip time to another node, as last measured",
            labels=["peer"],
        )
        rate = GaugeMetricFamily(
            "sollold_link_bytes_per_second", "Bandwidth to another node, as last measured", labels=["peer"]
        )
        links = self._cluster.me.links
        labels = _distinct({node: names.get(node, node) for node, _, _ in links})
        for node, seconds, speed in links:
            round_trip.add_metric([labels[node]], seconds)
            rate.add_metric([labels[node]], speed)
        yield from (round_trip, rate)


class _Requests(Collector):
    """Counts of requests and loads since the start. Read in a thread, while they are updated."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        """Yield counters and histograms, by route and model."""
        yield from self._by_route()
        yield from self._loads()
        requests = self._monitor.activity
        yield _counter(
            "sollold_recoveries", "Number of times an answer was resumed after a fault", requests.resumed
        )
        gap = HistogramMetricFamily(
            "sollold_recovery_gap_seconds", "Time without a token while an answer was resumed"
        )
        gap.add_metric([], requests.gap.cumulative(), requests.gap.sum)
        yield gap

    def _by_route(self) -> Iterator[Metric]:
        names = ["route", "model"]
        requests = CounterMetricFamily(
            "sollold_requests", "Requests to models that have ended", labels=[*names, "outcome"]
        )
        prompt = CounterMetricFamily("sollold_prompt_tokens", "Tokens of prompts", labels=names)
        generated = CounterMetricFamily("sollold_generation_tokens", "Tokens generated", labels=names)
        texts = {
            "first_token": (
                "sollold_time_to_first_token_seconds",
                "Time from the request to the first token",
            ),
            "inter_token": ("sollold_inter_token_latency_seconds", "Time between two tokens of an answer"),
            "queue": ("sollold_request_queue_time_seconds", "Time in the engine's queue"),
            "load": ("sollold_request_load_time_seconds", "Time waiting for the model to load"),
            "duration": (
                "sollold_e2e_request_latency_seconds",
                "Seconds from a request to the end of its response",
            ),
        }
        # A histogram has a dozen lines, so those that do not depend on the route are summed over the routes.
        summed_labels = {"inter_token": ["model"], "queue": ["model"], "load": ["model"]}
        families = {
            key: HistogramMetricFamily(name, text, labels=summed_labels.get(key, names))
            for key, (name, text) in texts.items()
        }
        histograms: dict[tuple[str, ...], activity.Histogram] = {}
        # Copies, since entries are added meanwhile.
        for (route, model), stats in self._monitor.activity.stats.copy().items():
            labels = [route, model]
            for outcome, count in stats.outcomes.copy().items():
                requests.add_metric([*labels, outcome], count)
            prompt.add_metric(labels, stats.prompt_tokens)
            generated.add_metric(labels, stats.generated_tokens)
            for key in families:
                histogram: activity.Histogram = getattr(stats, key)
                if any(histogram.counts):
                    series = (key, model) if key in summed_labels else (key, *labels)
                    summed = histograms.setdefault(series, activity.Histogram(histogram.bounds))
                    summed.add(histogram.counts, histogram.sum)
        for (key, *values), summed in histograms.items():
            families[key].add_metric(values, summed.cumulative(), summed.sum)
        yield from (requests, prompt, generated, *families.values())

    def _loads(self) -> Iterator[Metric]:
        loads = CounterMetricFamily(
            "sollold_model_loads", "Loads by this node that have ended", labels=["model", "result"]
        )
        seconds = HistogramMetricFamily(
            "sollold_model_load_seconds",
            "Time from the start of a load until the model is ready",
            labels=["model"],
        )
        for model, stats in self._monitor.loads.copy().items():
            loads.add_metric([model, "ok"], stats.ok)
            loads.add_metric([model, "failed"], stats.failed)
            seconds.add_metric([model], stats.seconds.cumulative(), stats.seconds.sum)
        yield from (loads, seconds)


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """Return a distinct label per node id, so that nodes of equal name have separate series."""
    count = Counter(names.values())
    return {node: name if count[name] == 1 else f"{name} ({node})" for node, name in names.items()}


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


class _Keys(Collector):
    """Requests with each API key through this node."""

    def __init__(self, usage: dict[str, KeyUsage]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """Yield counters by the key's name. Read in a thread."""
        requests = CounterMetricFamily("sollold_key_requests", "Requests with an API key", labels=["key"])
        prompt = CounterMetricFamily(
            "sollold_key_prompt_tokens", "Prompt tokens with an API key", labels=["key"]
        )
        generated = CounterMetricFamily(
            "sollold_key_generated_tokens", "Tokens generated with an API key", labels=["key"]
        )
        for name, usage in sorted(self._usage.copy().items(), key=lambda item: item[0]):
            requests.add_metric([name], usage.requests)
            prompt.add_metric([name], usage.prompt_tokens)
            generated.add_metric([name], usage.generated_tokens)
        yield from (requests, prompt, generated)


class _Answers(Collector):
    """Metrics of answered HTTP requests."""

    def __init__(self, answers: ResponseCounts) -> None:
        self._answers = answers

    def collect(self) -> Iterator[Metric]:
        """Yield a counter and a histogram. Read in a thread."""
        requests = CounterMetricFamily(
            "sollold_http_requests",
            "Requests answered; status 499: the client closed the connection",
            labels=["dialect", "route", "status"],
        )
        for labels, count in self._answers.counts.copy().items():
            requests.add_metric(labels, count)
        seconds = HistogramMetricFamily(
            "sollold_http_request_seconds",
            "Seconds from a request to the end of its response; kind poll: routes for dashboards",
            labels=["dialect", "kind"],
        )
        for kind, histogram in self._answers.seconds.copy().items():
            bounds = [(_bound(bound), count) for bound, count in histogram.cumulative()]
            seconds.add_metric(kind, bounds, histogram.sum)
        yield from (requests, seconds)


def _bound(text: str) -> str:
    """Return a bound as a decimal (``1.0``), the form that its series have always had."""
    return text if text == "+Inf" else str(float(text))


class _All(Collector):
    """Metrics collected before, followed by those of collectors."""

    def __init__(self, metrics: list[Metric], collectors: tuple[Collector, ...]) -> None:
        self._metrics = metrics
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from self._metrics
        for collector in self._collectors:
            yield from collector.collect()


def node_metrics(
    cluster: ClusterService, monitor: Monitor, dropped: Callable[[], dict[str, int]]
) -> list[Metric]:
    """Return the current metrics of the node and the cluster: few, and to be read on the event loop."""
    return list(_Node(cluster, monitor, dropped).collect())


def render_metrics(
    current: list[Metric], answers: ResponseCounts, monitor: Monitor, usage: dict[str, KeyUsage]
) -> bytes:
    """Render `node_metrics` and the counts. Call it off the loop: tens of thousands of samples take 1 s."""
    return generate_latest(_All(current, (_Answers(answers), _Requests(monitor), _Keys(usage))))


def render_engine_metrics(texts: list[EngineText]) -> bytes:
    """Render the engines' own metrics. Call it off the loop."""
    return generate_latest(EngineFamilies(texts))
