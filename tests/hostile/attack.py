"""Sends concurrent hostile requests from one machine and records the responses."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.hostile.requests import Hostile, Requests

CONCURRENCY = 8
MAX_ANSWER_BYTES = 256 * 1024
"""Bytes of an answer after which the caller closes the connection."""
UNANSWERED_LIMIT = 1.0
"""Seconds to wait for a request that may legitimately stay unanswered; `ANSWER_LIMIT` for all others."""
ANSWER_LIMIT = 30.0
LEGITIMATE_ERRORS = {
    501: ("is not supported", "does not support", "needs an Ollama"),
    503: ("try again", "ask again", "drain", "stopping", "use --force", "later", "reached"),
    504: ("within", "deadline"),
    507: ("memory", "GiB", "MiB", "context"),
}
"""Legitimate server errors, and words that their messages must contain."""


@dataclass(slots=True)
class Tally:
    """The results of the requests.

    Attributes:
        statuses: number of answers by status; 0: closed without an answer, -1: no answer in time.
        excuses: number of answers from 500 on by message, with digits masked.
        wrong: illegitimate ones of these, each with one of the requests.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    excuses: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, Hostile] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, sent: Hostile, status: int, body: bytes, took: float) -> None:
        """Count one answer."""
        self.statuses[status] += 1
        self.slowest = max(self.slowest, took)
        if status < 500 or (status == 505 and sent.kind.startswith("framing")):
            return
        text = body.decode(errors="replace")
        excuse = f"{status} {re.sub('[0-9]+|[0-9a-f]{16}', '#', text)[:200]}"
        self.excuses[excuse] += 1
        # Answers to HEAD have no message.
        explained = sent.method == "HEAD" or any(word in text for word in LEGITIMATE_ERRORS.get(status, ()))
        if status not in LEGITIMATE_ERRORS or not explained:
            self.wrong.setdefault(excuse, sent)


async def attack(host: str, port: int, requests: Requests, count: int, tally: Tally) -> None:
    """Send ``count`` requests to ``host``, `CONCURRENCY` at a time."""
    remaining = count

    async def caller() -> None:
        nonlocal remaining
        while remaining > 0:
            remaining -= 1
            sent = requests.next()
            began = time.monotonic()
            status, body = await exchange(host, port, sent)
            tally.add(sent, status, body, time.monotonic() - began)

    await asyncio.gather(*(caller() for _ in range(CONCURRENCY)))


async def exchange(host: str, port: int, sent: Hostile) -> tuple[int, bytes]:
    """Send one request and return the status and the beginning of the body."""
    answer = bytearray()
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_ANSWER_BYTES)
    try:
        writer.write(sent.data)
        async with asyncio.timeout(UNANSWERED_LIMIT if sent.waits else ANSWER_LIMIT):
            while len(answer) < MAX_ANSWER_BYTES and (piece := await reader.read(65536)):
                answer += piece
    except TimeoutError:
        if not answer:
            return (0 if sent.waits else -1), b""
    except OSError:
        pass
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    status_line = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    # The final response follows "100 Continue".
    if status_line and status_line[1] == b"100":
        status_line = re.search(rb"\r\n\r\nHTTP/1\.[01] (\d{3})", answer) or status_line
    return int(status_line[1]) if status_line else 0, bytes(answer).partition(b"\r\n\r\n")[2]
