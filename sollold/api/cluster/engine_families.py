"""Merges the metrics of several engines, each sample labelled with its model and deployment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sollold.control.engine_metrics import EngineText

_MAX_FAMILIES = 100
_MAX_SAMPLES = 1000
"""Maximum number of samples per family of one engine, in case an engine misbehaves."""


class EngineFamilies(Collector):
    """Collector of the merged metrics, for `prometheus_client.generate_latest`."""

    def __init__(self, texts: Iterable[EngineText]) -> None:
        self._families: dict[str, Metric] = {}
        for engine in texts:
            try:
                self._add(engine)
            except ValueError:
                continue  # invalid: an engine that is stopping sends only half of its metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        yield from self._families.values()

    def _add(self, engine: EngineText) -> None:
        labels = {"model": engine.model, "deployment": engine.deployment}
        for family in islice(text_string_to_metric_families(engine.text), _MAX_FAMILIES):
            merged = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples[:_MAX_SAMPLES]:
                merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
