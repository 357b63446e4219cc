"""Metrics of several engines in one exposition."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from sollold.api.cluster.metric_families import render_engine_metrics
from sollold.control.engine_metrics import EngineText

TEXT = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total {}
# HELP llamacpp:requests_deferred Number of requests deferred.
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 0
"""


def test_samples_are_labelled_by_model_and_families_appear_once() -> None:
    texts = [EngineText("d1", "demo:latest", TEXT.format(7)), EngineText("d2", "big:70b", TEXT.format(5))]
    text = render_engine_metrics(texts).decode()
    assert text.count("# TYPE llamacpp:prompt_tokens_total counter") == 1
    found = {
        (sample.name, sample.labels["model"], sample.labels["deployment"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["llamacpp:prompt_tokens_total", "demo:latest", "d1"] == 7
    assert found["llamacpp:prompt_tokens_total", "big:70b", "d2"] == 5
    assert found["llamacpp:requests_deferred", "big:70b", "d2"] == 0


def test_invalid_metrics_of_one_engine_are_skipped() -> None:
    texts = [EngineText("d1", "demo", "{{{ no such thing"), EngineText("d2", "big", TEXT.format(5))]
    assert b'model="big"' in render_engine_metrics(texts)
