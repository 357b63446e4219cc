"""packaging/monitoring uses only metrics of `/metrics` and is valid for Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.control.events import LoadTime
from sollold.machine.gpus import GpuLoad
from tests.api.api_parts import ScriptedService, chunk, parts, record, usage_chunk
from tests.api.conftest import Serve, http, serve
from tests.doubles import until

__all__ = ["http", "serve"]
FOLDER = Path(__file__).parents[2] / "packaging" / "monitoring"
PROMTOOL = shutil.which("promtool")
NAME = re.compile(r"\bsollold_[a-z0-9_]+")


def promtool(*words: str, text: str = "") -> str:
    if PROMTOOL is None:
        pytest.skip("no promtool here (package prometheus)")
    done = subprocess.run(
        [PROMTOOL, *words], input=text, capture_output=True, text=True, timeout=60, cwd=FOLDER, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
async def metrics(serve: Serve, http: ClientSession) -> str:
    """Return ``/metrics`` of a node that has used every feature once."""
    given = parts(ScriptedService(chunk("a"), usage_chunk()))
    cluster: Any = given.cluster
    cluster.change(record(links=(("1" * 16, 0.001, 1e8),)), record("1" * 16, "beta"))
    given.monitor.gpu_loads = [GpuLoad("CUDA0", 0.5, 60.0, 200.0)]
    given.monitor._load_ended(LoadTime("demo:latest", 3.0, True))
    url = await serve(given)
    chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    async with http.post(f"{url}/api/chat", json=chat) as answer:
        await answer.read()
    async with http.get(f"{url}/metrics") as answer:
        return await answer.text()


def names_of(metrics: str) -> set[str]:
    return set(re.findall(r"^(sollold_[a-z0-9_]+)", metrics, re.MULTILINE))


async def test_every_used_metric_exists(metrics: str) -> None:
    existing = names_of(metrics)
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    used = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in NAME.findall(target["expr"])
    }
    used |= set(NAME.findall((FOLDER / "alerts.yml").read_text()))
    assert len(used) > 20
    assert used - existing == set()


async def test_nodes_with_the_same_name_have_separate_series(serve: Serve, http: ClientSession) -> None:
    given = parts()
    cluster: Any = given.cluster
    twins = [record(digit * 16, "debian") for digit in "12"]
    links = tuple((peer.node, 0.001, 1e8) for peer in (*twins, record("3" * 16, "debian")))
    cluster.change(record(links=links), *twins)
    await given.monitor.start()
    try:
        url = await serve(given)
        cluster.change(record(links=links))
        await until(lambda: len(given.monitor.offline()) == 2)
        async with http.get(f"{url}/metrics") as answer:
            text = await answer.text()
    finally:
        await given.monitor.close()
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert f'sollold_link_round_trip_seconds{{peer="debian ({"1" * 16})"}}' in series
    assert [name for name in set(series) if series.count(name) > 1] == []


async def test_the_page_lists_every_metric(metrics: str) -> None:
    """The page lists exactly the existing metrics, and other pages mention no others."""
    kinds = dict(re.findall(r"^# TYPE (sollold_\w+) (\w+)$", metrics, re.MULTILINE))
    docs = FOLDER.parents[1] / "docs"
    rows = re.findall(
        r"^\| (`sollold_.*?) \| (\w+) \| (.*)\|$", (docs / "monitoring.md").read_text("utf-8"), re.MULTILINE
    )
    named = {name: kind.replace("info", "gauge") for cell, kind, _ in rows for name in NAME.findall(cell)}
    assert named == kinds
    # Check the labels of the metrics that have series here.
    labels = {
        name: set(re.findall(r"(?:^|, )(\w+)", re.sub(r"\(.*\)", "", cell)))
        for names, _, cell in rows
        for name in NAME.findall(names)
    }
    for series, given in re.findall(r"^(sollold_\w+)\{(.*)\} ", metrics, re.MULTILINE):
        name = series if series in kinds else re.sub(r"_(bucket|sum|count)$", "", series)
        assert set(re.findall(r'(\w+)="', given)) - {"le"} == labels[name], name
    for page in docs.glob("*.md"):
        assert set(re.findall(r"`(sollold_[a-z0-9_]+)`", page.read_text("utf-8"))) <= kinds.keys(), page


def test_the_dashboard_is_valid() -> None:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and panel["targets"] and panel["title"]


async def test_prometheus_accepts_the_metrics(metrics: str) -> None:
    promtool("check", "metrics", text=metrics)


def test_prometheus_accepts_the_rules_and_they_fire() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")
