"""What the event loop reports of itself: errors that are none stay out of the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

logger = logging.getLogger("sollold")


def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception handler for a loop.

    uvloop calls it fatal when a connection that was given up during its handshake, since another address of
    the node answered first or time was up, has bytes left to send.
    """
    error = context.get("exception")
    given_up = isinstance(error, RuntimeError) and "the handler is closed" in str(error)
    if given_up and str(context.get("message", "")).startswith("Fatal error on SSL protocol"):
        logger.debug("a connection was given up during its handshake")
        return
    loop.default_exception_handler(context)
