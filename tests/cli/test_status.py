"""The tables of ``sollold status`` and ``sollold ps``."""

from __future__ import annotations

import argparse
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sollold.cli import status


class Daemon:
    """A double that reports the given deployments."""

    def __init__(self, *deployments: dict[str, Any]) -> None:
        self._deployments = list(deployments)

    def get(self, path: str) -> dict[str, Any]:
        return {"deployments": self._deployments}


def test_a_failed_deployment_uses_no_memory_and_its_reason_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = {"node_name": "anna", "device": "CPU", "first": 0, "last": 3, "bytes": 3 << 20}
    failed: dict[str, Any] = {"model": "big:7b", "state": "failed", "reason": "it was killed"}
    failed |= {"node_name": "anna"}
    failed |= {"active": 0, "waiting": 0, "speed": 0.0, "context": 768, "layers": 2, "placed": [placed]}
    failed |= {"pinned": False, "expires": 299.0, "bytes": 3 << 20}
    runs = failed | {"state": "ready", "reason": "", "expires": 120.0}
    monkeypatch.setattr(status, "client", lambda options: Daemon(failed, failed, runs))
    status.ps(argparse.Namespace(json=False, quiet=False))
    output = capsys.readouterr().out
    assert output.count("MiB") == 1 and output.count("2 min") == 1 and "4 min 59 s" not in output
    assert output.count("big:7b on anna: it was killed") == 1


def test_a_narrow_terminal_wraps_names_and_states_instead_of_cutting_them() -> None:
    device = {"id": "CPU", "granted": 0, "available": 1 << 30, "limit": 1 << 30, "total": 1 << 30}
    node = {"name": "living-room-mac-mini", "node": "a", "addresses": ["192.168.1.5"], "http_port": 11435}
    node |= {"build": "b1", "setup": "", "draining": True, "devices": [device], "plain_workers": []}
    console = Console(width=40, file=StringIO())
    with console.capture() as shown:
        console.print(status.node_table({"nodes": [node], "leader": "a"}))
    words = shown.get().split()
    assert {"living-room-mac-mini", "(draining)", "*", "CPU"} <= set(words) and "…" not in shown.get()
