"""Merges the metrics of several engines, each sample labelled with its model and deployment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sollold.control.engine_metrics import EngineText

_MOST_FAMILIES = 100
_MOST_SAMPLES = 1000
"""Maximum number of samples per family of one engine, in case an engine misbehaves."""


class EngineFamilies(Collector):
    """Collector of the merged metrics, for `prometheus_client.generate_latest`."""

    def __init__(self, texts: Iterable[EngineText]) -> None:
        self._families: dict[str, Metric] = {}
        for one in texts:
            try:
                self._add(one)
            except ValueError:
                continue  # no such format: an engine that is ending sends half of it

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        yield from self._families.values()

    def _add(self, one: EngineText) -> None:
        labels = {"model": one.model, "deployment": one.deployment}
        for family in islice(text_string_to_metric_families(one.text), _MOST_FAMILIES):
            known = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples[:_MOST_SAMPLES]:
                known.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
