"""A bar that scales to the available width; a bar that is cut off would show wrong proportions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

_MIN_WIDTH = 4


class Bar:
    """Parts of a whole, one after another; for a table's cell.

    Args:
        parts: (share of the whole from 0 to 1, sign, style).
        width: preferred width in columns.
        rest: the character for the remainder.
    """

    def __init__(self, parts: Sequence[tuple[float, str, str]], width: int, rest: str = "") -> None:
        self._parts = parts
        self._width = width
        self._rest = rest

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Called by rich: the minimum and maximum width, in columns."""
        return Measurement(_MIN_WIDTH, self._width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Called by rich: the bar, as wide as allowed."""
        width = min(self._width, options.max_width)
        text = Text(no_wrap=True, overflow="crop")
        for share, sign, style in self._parts:
            text.append(sign * round(width * share), style=style)
        if self._rest:
            text.append(self._rest * (width - len(text)), style="dim")
        yield text
