"""What rich draws on a terminal anew and anew, and the terminal as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, TypeVar


class Drawn(Protocol):
    """rich's `Live` and `Progress`."""

    def start(self) -> None:
        """Draw from now on."""
        ...

    def stop(self) -> None:
        """Leave the terminal as it was; where nothing was begun: do nothing."""
        ...


T = TypeVar("T", bound=Drawn)


@contextlib.contextmanager
def on_screen(drawn: T) -> Iterator[T]:
    """Draw within the block.

    rich's own ``with`` leaves a terminal without its cursor when Ctrl-C comes while it draws for the first
    time.
    """
    try:
        drawn.start()
        yield drawn
    finally:
        drawn.stop()
