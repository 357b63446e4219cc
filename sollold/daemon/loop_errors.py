"""Event loop exception handler that keeps harmless errors out of the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

logger = logging.getLogger("sollold")


def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an exception reported by a loop.

    When a connection is abandoned during its handshake, because another address of the node answered first
    or the time was up, and has bytes left to send, uvloop reports that as fatal.
    """
    error = context.get("exception")
    given_up = isinstance(error, RuntimeError) and "the handler is closed" in str(error)
    if given_up and str(context.get("message", "")).startswith("Fatal error on SSL protocol"):
        logger.debug("a connection was given up during its handshake")
        return
    loop.default_exception_handler(context)
