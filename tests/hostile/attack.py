"""Sends hostile requests from one place of the network, many at a time, and notes how each was answered."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.hostile.requests import Hostile, Requests

AT_ONCE = 8
READ = 256 * 1024
"""Bytes of an answer after which the caller hangs up."""
WAITS = 1.0
"""Seconds for what may rightly be waited for; `LONGEST` for all else."""
LONGEST = 30.0
MEANT = {
    501: ("is not supported", "does not support", "needs an Ollama"),
    503: ("try again", "ask again", "drain", "stopping", "use --force", "later", "reached"),
    504: ("within", "deadline"),
    507: ("memory", "GiB", "MiB", "context"),
}
"""Errors of a server that may be right, and words that say why."""


@dataclass(slots=True)
class Tally:
    """What came of the requests.

    Attributes:
        statuses: how many got which; 0: the connection was ended without one, -1: none came in time.
        excuses: the messages of answers above 500, with their digits left out.
        wrong: those of them that must not be, with one of the requests.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    excuses: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, Hostile] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, sent: Hostile, status: int, body: bytes, took: float) -> None:
        """Note one answer."""
        self.statuses[status] += 1
        self.slowest = max(self.slowest, took)
        if status < 500 or (status == 505 and sent.kind.startswith("framing")):
            return
        text = body.decode(errors="replace")
        excuse = f"{status} {re.sub('[0-9]+|[0-9a-f]{16}', '#', text)[:200]}"
        self.excuses[excuse] += 1
        # What answers HEAD says nothing.
        said = sent.method == "HEAD" or any(word in text for word in MEANT.get(status, ()))
        if status not in MEANT or not said:
            self.wrong.setdefault(excuse, sent)


async def attack(host: str, port: int, requests: Requests, count: int, tally: Tally) -> None:
    """Send ``count`` requests to ``host``, `AT_ONCE` at a time."""
    left = count

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            sent = requests.next()
            began = time.monotonic()
            status, body = await exchange(host, port, sent)
            tally.add(sent, status, body, time.monotonic() - began)

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))


async def exchange(host: str, port: int, sent: Hostile) -> tuple[int, bytes]:
    """Send one request; its status and the beginning of the answer's body."""
    answer = bytearray()
    reader, writer = await asyncio.open_connection(host, port, limit=READ)
    try:
        writer.write(sent.data)
        async with asyncio.timeout(WAITS if sent.waits else LONGEST):
            while len(answer) < READ and (piece := await reader.read(65536)):
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
    met = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    # After "100 Continue" comes the answer itself.
    if met and met[1] == b"100":
        met = re.search(rb"\r\n\r\nHTTP/1\.[01] (\d{3})", answer) or met
    return int(met[1]) if met else 0, bytes(answer).partition(b"\r\n\r\n")[2]
