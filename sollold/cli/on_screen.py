"""Live displays of rich, after which the terminal is restored in every case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, TypeVar


class Drawn(Protocol):
    """rich's `Live` and `Progress`."""

    def start(self) -> None:
        """Start drawing."""
        ...

    def stop(self) -> None:
        """Restore the terminal; does nothing if not started."""
        ...


T = TypeVar("T", bound=Drawn)


@contextlib.contextmanager
def on_screen(display: T) -> Iterator[T]:
    """Show a live display within the block.

    rich's own ``with`` leaves the cursor hidden when Ctrl-C arrives during the first drawing.
    """
    try:
        display.start()
        yield display
    finally:
        display.stop()
