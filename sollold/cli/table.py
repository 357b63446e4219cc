"""Plain tables for lists: aligned columns, cut instead of wrapped on a narrow terminal.

If even names and addresses would have to be cut, each row is printed as a list of its cells.

Without rich, whose import takes longer than a request to a node.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from sollold.cli.streams import harmless

_GAP = "  "
_MIN_WIDTH = 8
"""Minimum width of a cut column, in characters."""


def print_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    whole: Iterable[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print rows under their titles.

    On a narrow terminal, columns are dropped and the widest texts cut, or each row becomes a list of titles
    and cells; elsewhere the table is complete.

    Args:
        right: titles of columns that are aligned to the right and never cut.
        whole: titles of columns that are never cut.
        spare: titles of columns that are dropped if there is no room, in the order of dropping.
    """
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    bold = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for number, line in enumerate(lines(titles, rows, right=right, whole=whole, spare=spare, width=width)):
        print(f"\x1b[1m{line}\x1b[0m" if bold and number == 0 else line)


def lines(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    whole: Iterable[str] = (),
    spare: Sequence[str] = (),
    width: int | None = None,
) -> Iterator[str]:
    """The lines of a table for `print_table`, at most ``width`` columns wide if possible."""
    all_ = [list(titles), *([harmless(cell).replace("\n", " ") for cell in row] for row in rows)]
    # Columns without any value are dropped.
    shown = [k for k, _ in enumerate(titles) if len(all_) == 1 or any(row[k] for row in all_[1:])]
    widths = {k: max(columns(row[k]) for row in all_) for k in shown}
    to_right = {k for k in shown if titles[k] in set(right)}
    uncut = to_right | {k for k in shown if titles[k] in set(whole)}
    if width is not None:
        for title in spare:
            if _min_width(widths, uncut) <= width:
                break
            widths.pop(titles.index(title), None)
        if uncut > to_right and _min_width(widths, uncut) > width:
            yield from _lists(all_)
            return
        _cut(widths, width - len(_GAP) * (len(widths) - 1), uncut)
        shown = list(widths)
    for row in all_:
        cells = [_cell(row[k], widths[k], to_right=k in to_right) for k in shown]
        yield _GAP.join(cells).rstrip()


def _lists(table: list[list[str]]) -> Iterator[str]:
    """The rows one below the other, each as lines of a title and a cell."""
    titles, *rows = table
    width = max(map(columns, titles))
    for number, row in enumerate(rows):
        if number:
            yield ""
        for title, cell in zip(titles, row, strict=True):
            if cell:
                yield f"{_cell(title, width, to_right=False)}{_GAP}{cell}"


def columns(text: str) -> int:
    """Width of ``text`` on a terminal, in columns."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        for sign in text
    )


def _min_width(widths: dict[int, int], whole: set[int]) -> int:
    """The minimum width of a table, in columns."""
    minimums = [width if k in whole else min(width, _MIN_WIDTH) for k, width in widths.items()]
    return sum(minimums) + len(_GAP) * (len(minimums) - 1)


def _cut(widths: dict[int, int], room: int, whole: set[int]) -> None:
    """Reduce the widest columns until the table fits."""
    texts = [k for k in widths if k not in whole]
    while texts and sum(widths.values()) > room:
        widest = max(texts, key=lambda k: widths[k])
        if widths[widest] <= _MIN_WIDTH:
            return
        widths[widest] -= 1


def _cell(text: str, width: int, *, to_right: bool) -> str:
    if columns(text) > width:
        while columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    padding = " " * (width - columns(text))
    return padding + text if to_right else text + padding
