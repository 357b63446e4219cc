"""A rich table that fits the terminal: words are not broken, the least important columns are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sollold.facts import dataclass

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_GAP = 2
_MIN_WIDTH = 8
"""Minimum width of a text that is cut, in columns."""


@dataclass(slots=True)
class Fitting:
    """A table of titled columns, laid out for the available width.

    Attributes:
        right: titles of columns that are aligned to the right.
        whole: titles of columns whose text is wrapped only if dropping columns does not suffice.
        spare: titles of columns that are dropped if there is no room, in the order of dropping.
    """

    titles: Sequence[str]
    right: Iterable[str] = ()
    whole: Iterable[str] = ()
    spare: Sequence[str] = ()
    _rows: list[tuple[Sequence[RenderableType], str]] = field(default_factory=list)

    def add_row(self, *cells: RenderableType, style: str = "") -> None:
        """Add a row; missing cells are empty."""
        self._rows.append(((*cells, *[""] * (len(self.titles) - len(cells))), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Called by rich: the table."""
        sizes = [self._sizes(column, console, options) for column in range(len(self.titles))]
        shown = list(range(len(self.titles)))
        for title in self.spare:
            if _sum(sizes[column][0] for column in shown) <= options.max_width:
                break
            shown.remove(self.titles.index(title))
        widths = _widths([sizes[column] for column in shown], options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, width in zip(shown, widths, strict=True):
            title = self.titles[column]
            table.add_column(
                title,
                justify="right" if title in self.right else "left",
                width=width,
                overflow="fold",
            )
        for cells, style in self._rows:
            table.add_row(*(cells[column] for column in shown), style=style)
        yield table

    def _sizes(self, column: int, console: Console, options: ConsoleOptions) -> tuple[int, int]:
        """Minimum and maximum width of a column's text."""
        minimum = maximum = 0
        for cell in (self.titles[column], *(cells[column] for cells, _ in self._rows)):
            # Not limited to the available width: the caller has to see what is too long.
            size = Measurement.get(
                console, options.update(max_width=1000), Text(cell) if isinstance(cell, str) else cell
            )
            maximum = max(maximum, size.maximum)
            minimum = max(minimum, size.maximum if self.titles[column] in self.whole else size.minimum)
        return minimum, maximum


def _sum(widths: Iterable[int]) -> int:
    listed = list(widths)
    return sum(listed) + _GAP * max(0, len(listed) - 1)


def _widths(sizes: list[tuple[int, int]], width: int) -> list[int]:
    """The width of each column: what it prefers, with the widest reduced until the total fits."""
    widths = [minimum for minimum, _ in sizes]
    while _sum(widths) > width and max(widths) > _MIN_WIDTH:
        widths[widths.index(max(widths))] -= 1
    room = width - _sum(widths)
    for column, (_, maximum) in enumerate(sizes):
        growth = max(0, min(room, maximum - widths[column]))
        widths[column] += growth
        room -= growth
    return widths
