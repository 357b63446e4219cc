"""Runs work on a request's schemas in a thread if they are large, since all other requests would wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from aiohttp import web

T = TypeVar("T")

_LARGE = 32 * 1024
_WITH_SCHEMAS = (
    *("tools", "functions", "response_format", "json_schema", "format", "text"),
    *("output_config", "output_format"),
)
_ENCODER = msgspec.json.Encoder()
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="schemas")
"""A single thread: several would not be faster, and the loop would wait for each of them in turn."""


async def off_loop(request: web.Request, body: dict[str, Any], work: Callable[[], T]) -> T:
    """Return the result of ``work`` on ``body``, the decoded body of ``request``."""
    length = request.content_length
    if length is not None and length < _LARGE and "Content-Encoding" not in request.headers:
        return work()
    schemas = [body[name] for name in _WITH_SCHEMAS if name in body]
    if not schemas or len(_ENCODER.encode(schemas)) < _LARGE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work)
