"""Tables of lists: aligned, cut where the terminal is narrow, never wrapped."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

from sollold.cli import models, nodes
from sollold.cli.table import columns, lines

ROWS = [("llama3.1:70b", "40 GiB", "anna, bert"), ("模型:latest", "1 GiB", "")]


def test_columns_are_aligned_with_wide_characters() -> None:
    made = list(lines(("model", "size", "nodes"), ROWS, right=("size",)))
    assert made[0] == "model           size  nodes"
    assert made[1] == "llama3.1:70b  40 GiB  anna, bert"
    assert columns(made[2]) == len("llama3.1:70b  40 GiB") and made[2].endswith("  1 GiB")


@pytest.mark.parametrize("width", [30, 24, 20])
def test_a_narrow_terminal_cuts_the_widest_column(width: int) -> None:
    made = list(lines(("model", "size", "nodes"), ROWS, right=("size",), width=width))
    assert len(made) == 3 and all(columns(line) <= max(width, 8 * 3 + 4) for line in made)
    assert "…" in made[1]


@pytest.mark.parametrize(("width", "titles"), [(32, ["model", "size", "nodes"]), (25, ["model", "nodes"])])
def test_numbers_are_omitted_and_never_cut(width: int, titles: list[str]) -> None:
    rows = [("llama3.1:70b", "40.25 GiB", "anna, bert")]
    made = list(lines(("model", "size", "nodes"), rows, right=("size",), spare=("size",), width=width))
    assert made[0].split() == titles and all(columns(line) <= width for line in made)
    assert ("40.25 GiB" in made[1]) == ("size" in titles)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(40, "llama3.1:70b  872edff07609  anna, bert"), (29, "llama3.1:70b  anna, bert"), (12, "llama3.1:70b")],
)
def test_optional_columns_are_omitted_before_others_are_cut(width: int, expected: str) -> None:
    rows = [("llama3.1:70b", "872edff07609", "anna, bert")]
    titles = ("model", "id", "nodes")
    made = list(lines(titles, rows, whole=("model", "id"), spare=("id", "nodes"), width=width))
    assert made[1] == expected


def test_names_and_ids_are_never_cut() -> None:
    titles = ("machine", "id", "at")
    rows = [("gaming-box", "872edff07609abcd", "anna"), ("模型", "13ab", "")]
    made = list(lines(titles, rows, whole=titles, width=20))
    assert made == [
        "machine  gaming-box",
        "id       872edff07609abcd",
        "at       anna",
        "",
        "machine  模型",
        "id       13ab",
    ]
    assert len(list(lines(titles, rows, whole=titles, width=40))) == 3


def test_empty_columns_are_omitted_and_control_characters_replaced() -> None:
    made = list(lines(("model", "not usable"), [("a\x1b[31m\nb", "")]))
    assert made == ["model", "a\ufffd[31m b"]


def test_node_names_are_not_cut_and_versions_are_aligned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts: dict[str, Any] = {"addresses": ["192.168.1.11"], "http_port": 11435, "draining": False}
    facts |= {"total": 2**40, "available": 2**40, "devices": [{"id": "CUDA0"}, {"id": "CPU"}], "setup": ""}
    found = [
        {**facts, "name": name, "leader": leader, "release": "0.1.0", "build": "b11434"}
        for name, leader in (("workstation-模型", True), ("bert", False))
    ]

    class Daemon:
        def get(self, path: str) -> dict[str, Any]:
            return {"nodes": found}

    monkeypatch.setattr(nodes, "client", lambda options, timeout=0.0: Daemon())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    options = argparse.Namespace(node="", json=False, quiet=False, offline=False, waiting=False)
    nodes.nodes(options)
    assert "workstation-模型 *" in capsys.readouterr().out
    nodes.version(options)
    starts = [columns(line.partition("sollold 0.1")[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert starts == [columns("workstation-模型  ")] * 2


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00Z", "1970-01-01T00:00:01Z", "", "yesterday"])
def test_a_file_without_a_valid_time_has_no_age(moment: str) -> None:
    assert "ago" not in " ".join(models._row({"name": "a", "size": 1, "modified_at": moment}))
