"""The metrics of ``/metrics``: requests through this node, loads, the node's own record, missing nodes.

Names follow Prometheus' conventions (base units, ``_total`` for counters) and, if there is one, the name that
vLLM's dashboards use, after the prefix. Imported at the first request, since with prometheus_client it takes
2 MB.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sollold import __version__
from sollold.api.cluster.views import is_listed, names_of
from sollold.api.http.request_log import KeyUsage, ResponseCounts
from sollold.cluster.gossip.record import Endpoint, Record, State
from sollold.control import activity
from sollold.control.cluster import ClusterService
from sollold.control.engine_metrics import EngineText
from sollold.control.monitor import Monitor
from sollold.machine.device import Device
from sollold.machine.gpus import GpuLoad

_MAX_FAMILIES = 100
_MAX_SAMPLES = 1000
"""Maximum number of samples per family of one engine, in case an engine misbehaves."""


def node_metrics(
    cluster: ClusterService, monitor: Monitor, dropped: Callable[[], dict[str, int]]
) -> list[Metric]:
    """Return the current metrics of the node and the cluster: few, and to be read on the event loop."""
    return [
        *_cluster(cluster, monitor, dropped()),
        *_devices(cluster.me, monitor),
        *_endpoints(cluster.me),
        *_links(cluster, monitor),
    ]


def _cluster(cluster: ClusterService, monitor: Monitor, dropped: dict[str, int]) -> Iterator[Metric]:
    me, live, offline = cluster.me, cluster.live(), monitor.offline()
    yield InfoMetricFamily(
        "sollold_build",
        "Versions of this node",
        value={"version": __version__, "llama_cpp": me.build, "node": me.name},
    )
    yield _gauge("sollold_tasks", "Tasks of the daemon's event loop", len(asyncio.all_tasks()))
    yield _gauge("sollold_nodes", "Live nodes of the cluster", len(live))
    lost = sum(not node.stopped for node in offline)
    yield _gauge("sollold_nodes_missing", "Nodes that stopped responding without leaving", lost)
    names = _distinct({node.record.node: node.record.name for node in offline})
    yield _labelled(
        GaugeMetricFamily,
        "sollold_node_offline_timestamp_seconds",
        "When a node that is offline was last seen, until it returns or is removed",
        ["name", "reason"],
        (((names[n.record.node], "stopped" if n.stopped else "lost"), n.since) for n in offline),
    )
    leader = cluster.leader()
    yield _gauge("sollold_leader", "Whether this node leads", leader.leader == me.node)
    yield _gauge("sollold_term", "The term of the leader", leader.counter)
    yield _gauge("sollold_draining", "Whether this node drains", me.draining)
    active = monitor.activity.active()
    yield _gauge("sollold_requests_in_progress", "Requests in progress through this node", active)
    events = (((str(kind),), count) for kind, count in sorted(monitor.events.counts.items()))
    yield _labelled(CounterMetricFamily, "sollold_events", "Events seen by this node", ["kind"], events)
    reasons = (((reason,), count) for reason, count in dropped.items())
    text = "Packets and messages of other nodes rejected"
    yield _labelled(CounterMetricFamily, "sollold_gossip_dropped", text, ["reason"], reasons)


_MEMORY: dict[str, tuple[str, Callable[[Device], float]]] = {
    "limit": ("Maximum memory of the device to reserve", lambda device: device.limit),
    "granted": ("Reserved for models", lambda device: device.granted),
    "available": ("Memory that a further reservation could get", lambda device: device.available),
    "free": ("Free memory of the device, as last measured", lambda device: device.free),
}
_GPU: dict[str, tuple[str, Callable[[GpuLoad], float]]] = {
    "utilization_ratio": ("Fraction of time in which the GPU was busy", lambda gpu: gpu.utilization),
    "temperature_celsius": ("Temperature of the GPU", lambda gpu: gpu.temperature),
    "power_watts": ("Power drawn by the GPU", lambda gpu: gpu.power),
}
_ENDPOINT: dict[str, tuple[str, Callable[[Endpoint], float]]] = {
    "ready": ("Whether the endpoint answers", lambda endpoint: endpoint.state is State.READY),
    "failed": ("Whether the endpoint has failed", lambda endpoint: endpoint.state is State.FAILED),
    "active": ("Requests running in the engine", lambda endpoint: endpoint.active),
    "waiting": ("Requests queued", lambda endpoint: endpoint.waiting),
    "slots": ("Maximum of concurrent requests", lambda endpoint: endpoint.slots),
    "tokens_per_second": ("Tokens per second of a single stream", lambda endpoint: endpoint.speed),
    "bytes": ("Memory used on all nodes", lambda endpoint: endpoint.bytes),
}
_DRAFTS: dict[str, tuple[str, Callable[[Endpoint], float]]] = {
    "drafted": ("Tokens drafted", lambda endpoint: endpoint.drafts.drafted),
    "accepted": ("Tokens drafted and accepted", lambda endpoint: endpoint.drafts.accepted),
}


def _devices(me: Record, monitor: Monitor) -> Iterator[Metric]:
    for name, (text, value) in _MEMORY.items():
        samples = (((device.id, str(device.kind)), value(device)) for device in me.devices)
        family = f"sollold_device_memory_{name}_bytes"
        yield _labelled(GaugeMetricFamily, family, text, ["device", "kind"], samples)
    for name, (text, load) in _GPU.items():
        known = (((gpu.device,), load(gpu)) for gpu in monitor.gpu_loads if not math.isnan(load(gpu)))
        yield _labelled(GaugeMetricFamily, f"sollold_gpu_{name}", text, ["device"], known)


def _endpoints(me: Record) -> Iterator[Metric]:
    names = ["deployment", "model", "backend"]
    listed = [((e.id, e.model, str(e.backend)), e) for e in me.endpoints if is_listed(e)]
    for name, (text, value) in _ENDPOINT.items():
        samples = ((labels, value(endpoint)) for labels, endpoint in listed)
        yield _labelled(GaugeMetricFamily, f"sollold_endpoint_{name}", text, names, samples)
    for name, (text, value) in _DRAFTS.items():
        samples = ((labels, value(endpoint)) for labels, endpoint in listed if endpoint.drafts.by)
        yield _labelled(CounterMetricFamily, f"sollold_endpoint_{name}_tokens", text, names, samples)


def _links(cluster: ClusterService, monitor: Monitor) -> Iterator[Metric]:
    links, names = cluster.me.links, names_of(cluster.live(), monitor.offline())
    labels = _distinct({node: names.get(node, node) for node, _, _ in links})
    text = "Round-trip time to another node, as last measured"
    trips = (((labels[node],), seconds) for node, seconds, _ in links)
    yield _labelled(GaugeMetricFamily, "sollold_link_round_trip_seconds", text, ["peer"], trips)
    text = "Bandwidth to another node, as last measured"
    rates = (((labels[node],), rate) for node, _, rate in links)
    yield _labelled(GaugeMetricFamily, "sollold_link_bytes_per_second", text, ["peer"], rates)


def render_metrics(
    current: list[Metric], answers: ResponseCounts, monitor: Monitor, usage: dict[str, KeyUsage]
) -> bytes:
    """Render `node_metrics` and the counts since the start, which are updated meanwhile.

    Call it off the loop: tens of thousands of samples take 1 s.
    """
    counts = (_answers(answers), _requests(monitor.activity), _loads(monitor), _recoveries(monitor.activity))
    return generate_latest(_Metrics(itertools.chain(current, *counts, _keys(usage))))


def _requests(counts: activity.Activity) -> Iterator[Metric]:
    names = ["route", "model"]
    requests = CounterMetricFamily(
        "sollold_requests", "Requests to models that have ended", labels=[*names, "outcome"]
    )
    prompt = CounterMetricFamily(
        "sollold_prompt_tokens", "Tokens of prompts; estimated if a stream ended early", labels=names
    )
    generated = CounterMetricFamily("sollold_generation_tokens", "Tokens generated", labels=names)
    texts = {
        "first_token": ("sollold_time_to_first_token_seconds", "Time from the request to the first token"),
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
    for (route, model), stats in counts.stats.copy().items():
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


def _loads(monitor: Monitor) -> Iterator[Metric]:
    loads = CounterMetricFamily(
        "sollold_model_loads", "Loads by this node that have ended", labels=["model", "result"]
    )
    seconds = HistogramMetricFamily(
        "sollold_model_load_seconds",
        "Time from the start of a load until the model is ready",
        labels=["model"],
    )
    for model, stats in monitor.loads.copy().items():
        loads.add_metric([model, "ok"], stats.ok)
        loads.add_metric([model, "failed"], stats.failed)
        seconds.add_metric([model], stats.seconds.cumulative(), stats.seconds.sum)
    yield from (loads, seconds)


def _recoveries(requests: activity.Activity) -> Iterator[Metric]:
    text = "Number of times an answer was resumed after a fault"
    yield CounterMetricFamily("sollold_recoveries", text, value=requests.resumed)
    gap = HistogramMetricFamily(
        "sollold_recovery_gap_seconds", "Time without a token while an answer was resumed"
    )
    gap.add_metric([], requests.gap.cumulative(), requests.gap.sum)
    yield gap


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """Return a distinct label per node id, so that nodes of equal name have separate series."""
    count = Counter(names.values())
    return {node: name if count[name] == 1 else f"{name} ({node})" for node, name in names.items()}


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _labelled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: list[str],
    samples: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    """Return a family with ``samples``: the values of ``labels``, and the sample's own."""
    family = kind(name, text, labels=labels)
    for values, sample in samples:
        family.add_metric(values, sample)
    return family


_KEY: dict[str, tuple[str, Callable[[KeyUsage], float]]] = {
    "requests": ("Requests with an API key", lambda usage: usage.requests),
    "prompt_tokens": ("Prompt tokens with an API key", lambda usage: usage.prompt_tokens),
    "generated_tokens": ("Tokens generated with an API key", lambda usage: usage.generated_tokens),
}


def _keys(usage_by_key: dict[str, KeyUsage]) -> Iterator[Metric]:
    rows = sorted(usage_by_key.copy().items(), key=lambda item: item[0])
    for name, (text, value) in _KEY.items():
        samples = (((key,), value(usage)) for key, usage in rows)
        yield _labelled(CounterMetricFamily, f"sollold_key_{name}", text, ["key"], samples)


def _answers(answers: ResponseCounts) -> Iterator[Metric]:
    yield _labelled(
        CounterMetricFamily,
        "sollold_http_requests",
        "Requests answered; status 499: the client closed the connection",
        ["dialect", "route", "status"],
        answers.counts.copy().items(),
    )
    seconds = HistogramMetricFamily(
        "sollold_http_request_seconds",
        "Seconds from a request to the end of its response; kind poll: routes for dashboards",
        labels=["dialect", "kind"],
    )
    for kind, histogram in answers.seconds.copy().items():
        bounds = [(_bound(bound), count) for bound, count in histogram.cumulative()]
        seconds.add_metric(kind, bounds, histogram.sum)
    yield seconds


def _bound(text: str) -> str:
    """Return a bound as a decimal (``1.0``), the form that its series have always had."""
    return text if text == "+Inf" else str(float(text))


class _Metrics(Collector):
    """Passes metrics on to `generate_latest`."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self._metrics


def render_engine_metrics(texts: Iterable[EngineText]) -> bytes:
    """Merge the engines' own metrics, each sample labelled with its model and deployment.

    Call it off the loop.
    """
    families: dict[str, Metric] = {}
    for engine in texts:
        try:
            _merge(engine, families)
        except ValueError:
            continue  # invalid: an engine that is stopping sends only half of its metrics
    return generate_latest(_Metrics(families.values()))


def _merge(engine: EngineText, families: dict[str, Metric]) -> None:
    labels = {"model": engine.model, "deployment": engine.deployment}
    for family in itertools.islice(text_string_to_metric_families(engine.text), _MAX_FAMILIES):
        merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        for sample in family.samples[:_MAX_SAMPLES]:
            merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
