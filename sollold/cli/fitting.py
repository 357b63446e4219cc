"""A table of rich that fits the terminal: no word is broken, the columns that matter least go first."""

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
_SHORTEST = 8
"""Columns that are left of a text that has to be cut."""


@dataclass(slots=True)
class Fitting:
    """Rows under titles, drawn for the width there is.

    Attributes:
        right: titles of columns that are aligned to the right.
        whole: titles of columns whose text is never wrapped, at words neither.
        spare: titles of columns that are left out where there is no room, the first of them first.
    """

    titles: Sequence[str]
    right: Iterable[str] = ()
    whole: Iterable[str] = ()
    spare: Sequence[str] = ()
    _rows: list[tuple[Sequence[RenderableType], str]] = field(default_factory=list)

    def add_row(self, *cells: RenderableType, style: str = "") -> None:
        """A row; cells that are not given are empty."""
        self._rows.append(((*cells, *[""] * (len(self.titles) - len(cells))), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Asked by rich: the table."""
        sizes = [self._sizes(at, console, options) for at in range(len(self.titles))]
        shown = list(range(len(self.titles)))
        for title in self.spare:
            if _sum(sizes[at][0] for at in shown) <= options.max_width:
                break
            shown.remove(self.titles.index(title))
        widths = _widths([sizes[at] for at in shown], options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for at, width in zip(shown, widths, strict=True):
            title = self.titles[at]
            table.add_column(
                title,
                justify="right" if title in self.right else "left",
                width=width,
                no_wrap=title in self.whole,
                overflow="ellipsis" if title in self.whole else "fold",
            )
        for cells, style in self._rows:
            table.add_row(*(cells[at] for at in shown), style=style)
        yield table

    def _sizes(self, at: int, console: Console, options: ConsoleOptions) -> tuple[int, int]:
        """The fewest columns that the text of a column takes, and the most."""
        least = most = 0
        for cell in (self.titles[at], *(cells[at] for cells, _ in self._rows)):
            # Not by the width there is: what is too long is to be seen.
            size = Measurement.get(
                console, options.update(max_width=1000), Text(cell) if isinstance(cell, str) else cell
            )
            most = max(most, size.maximum)
            least = max(least, size.maximum if self.titles[at] in self.whole else size.minimum)
        return least, most


def _sum(widths: Iterable[int]) -> int:
    given = list(widths)
    return sum(given) + _GAP * max(0, len(given) - 1)


def _widths(sizes: list[tuple[int, int]], width: int) -> list[int]:
    """What each column gets: what it needs and could use; the widest give where that is too much."""
    widths = [least for least, _ in sizes]
    while _sum(widths) > width and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1
    room = width - _sum(widths)
    for at, (_, most) in enumerate(sizes):
        more = max(0, min(room, most - widths[at]))
        widths[at] += more
        room -= more
    return widths
