"""Reads of files that may never come to an end: of a share whose server is away, or of a disk that fails.

Such a read keeps its thread, for minutes or for ever. So it has one for itself, and nobody waits long for it:
in the loop's shared threads a few of them would stop everything else that uses those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sollold.models.stores.threads import alone

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that anybody waits for a read that is over in a moment where all is well."""


async def read_patiently(work: Callable[[], T], path: str | Path, seconds: float = PATIENCE) -> T:
    """What ``work`` gives, which blocks while it reads ``path``.

    Raises:
        LookupError: it took longer than ``seconds``; the message names the folder. The read itself goes on.
    """
    try:
        return await asyncio.wait_for(asyncio.shield(alone(work, name=f"read {path}")), seconds)
    except TimeoutError:
        raise LookupError(no_answer(Path(path).parent)) from None


def no_answer(place: str | Path, then: str = "") -> str:
    """A folder that does not answer, and what that means."""
    return f"{place} does not answer{then}; is it on a share whose server is switched off or cut off?"
