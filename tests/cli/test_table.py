"""Tables of lists: aligned, cut where the terminal is narrow, never wrapped."""

from __future__ import annotations

import pytest

from sollold.cli.table import columns, lines

ROWS = [("llama3.1:70b", "40 GiB", "anna, bert"), ("模型:latest", "1 GiB", "")]


def test_columns_are_aligned_also_with_wide_signs() -> None:
    made = list(lines(("model", "size", "nodes"), ROWS, right=("size",)))
    assert made[0] == "model           size  nodes"
    assert made[1] == "llama3.1:70b  40 GiB  anna, bert"
    assert columns(made[2]) == len("llama3.1:70b  40 GiB") and made[2].endswith("  1 GiB")


@pytest.mark.parametrize("width", [30, 24, 20])
def test_a_narrow_terminal_cuts_the_widest(width: int) -> None:
    made = list(lines(("model", "size", "nodes"), ROWS, right=("size",), width=width))
    assert len(made) == 3 and all(columns(line) <= max(width, 8 * 3 + 4) for line in made)
    assert "…" in made[1]


@pytest.mark.parametrize(("width", "titles"), [(32, ["model", "size", "nodes"]), (25, ["model", "nodes"])])
def test_figures_are_left_out_and_never_cut(width: int, titles: list[str]) -> None:
    rows = [("llama3.1:70b", "40.25 GiB", "anna, bert")]
    made = list(lines(("model", "size", "nodes"), rows, right=("size",), spare=("size",), width=width))
    assert made[0].split() == titles and all(columns(line) <= width for line in made)
    assert ("40.25 GiB" in made[1]) == ("size" in titles)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(40, "llama3.1:70b  872edff07609  anna, bert"), (29, "llama3.1:70b  anna, bert"), (10, "llama3.1:…")],
)
def test_columns_are_left_out_before_what_matters_is_cut(width: int, expected: str) -> None:
    rows = [("llama3.1:70b", "872edff07609", "anna, bert")]
    titles = ("model", "id", "nodes")
    made = list(lines(titles, rows, whole=("model", "id"), spare=("id", "nodes"), width=width))
    assert made[1] == expected


def test_what_no_row_has_is_left_out_and_orders_to_the_terminal_are_not_passed_on() -> None:
    made = list(lines(("model", "not usable"), [("a\x1b[31m\nb", "")]))
    assert made == ["model", "a\ufffd[31m b"]
