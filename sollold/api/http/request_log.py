"""Records HTTP requests: a line in the log, counts for the metrics, and the usage of each key.

Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
import time
from dataclasses import field

from aiohttp import web

from sollold.api.http.access import client_of
from sollold.api.http.exchange import Exchange
from sollold.control.activity import FinishedRequest, Histogram
from sollold.control.keys import Key
from sollold.facts import dataclass

log = logging.getLogger("sollold.access")

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_POLL = ("/api/cluster", "/api/doctor", "/api/ps", "/api/tags", "/api/version", "/metrics", "/web", "/health")
"""Prefixes of routes that dashboards and monitors poll."""


@dataclass(slots=True)
class ResponseCounts:
    """Numbers and durations of the requests answered since the start.

    Attributes:
        counts: (dialect, route, status) → responses; status 499: the caller hung up.
        seconds: (dialect, kind) → durations until the end of the response; kind: ``poll`` or ``request``.
    """

    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    seconds: dict[tuple[str, str], Histogram] = field(default_factory=dict)

    def add(self, dialect: str, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        labels = dialect, route, str(status)
        self.counts[labels] = self.counts.get(labels, 0) + 1
        kind = "poll" if route in ("/", "/ready") or route.startswith(_POLL) else "request"
        histogram = self.seconds.get((dialect, kind))
        if histogram is None:
            histogram = self.seconds[dialect, kind] = Histogram(_BUCKETS)
        histogram.observe(seconds)


@dataclass(slots=True)
class KeyUsage:
    """Usage of one key through this node since its start."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class RequestLog:
    """Writes the log lines. ``mode`` may be changed later.

    Attributes:
        mode: ``off``, ``inference`` (requests to models, changes, and denied requests) or ``all``.
        usage: name of a key → its usage.
    """

    def __init__(self, mode: str = "inference") -> None:
        self.mode = mode
        self.usage: dict[str, KeyUsage] = {}

    def write(self, request: web.Request, exchange: Exchange, status: int, started: float) -> None:
        """Log a request that has ended; ``started``: monotonic time; ``status`` 499: its caller hung up."""
        record = exchange.finished
        if (client := exchange.client) is not None and client.key is not None:
            self.usage.setdefault(client.key.name, KeyUsage()).requests += 1
            if record is not None:
                self.count_tokens(client.key, record)
        if not self._is_logged(request, exchange, status):
            return
        client = client_of(request)
        fields: dict[str, object] = {"client": client.address, "key": client.name}
        fields |= {"route": f"{request.method} {exchange.route or request.path[:200]}", "status": status}
        if record is not None:
            fields |= {"model": record.model, "node": record.node}
            fields |= {"prompt_tokens": record.prompt_tokens, "tokens": record.tokens}
            if record.first_token >= 0:
                fields["first_token"] = f"{record.first_token:.3f}"
            fields |= {"resumed": record.resumed, "outcome": record.outcome}
        fields["error"] = exchange.refused or (record.error if record is not None else "")
        fields["seconds"] = f"{time.monotonic() - started:.3f}"
        # Empty values are left out; names with spaces are quoted, so that the line can be split.
        words = [f"{name}={_quoted(value)}" for name, value in fields.items() if value != ""]
        # Faster than `log.info`, which looks for the line of code and checks each name in `extra`.
        line = log.makeRecord(log.name, logging.INFO, __file__, 0, "%s", (" ".join(words),), None)
        line.__dict__.update(fields, request=exchange.id)
        log.handle(line)

    def count_tokens(self, key: Key | None, record: FinishedRequest) -> None:
        """Count the tokens of a request to a model as used by ``key``, if it has one."""
        if key is not None:
            usage = self.usage.setdefault(key.name, KeyUsage())
            usage.prompt_tokens += record.prompt_tokens
            usage.generated_tokens += record.tokens

    def _is_logged(self, request: web.Request, exchange: Exchange, status: int) -> bool:
        if self.mode == "off" or not log.isEnabledFor(logging.INFO):
            return False
        if self.mode == "all" or exchange.finished is not None or exchange.refused or status in (401, 403):
            return True
        return request.method not in ("GET", "HEAD", "OPTIONS")


REQUEST_LOG = web.AppKey("request_log", RequestLog)
"""The application's `RequestLog`."""


_SPECIAL = frozenset(' "=\\')


def _quoted(value: object) -> object:
    if not isinstance(value, str) or (value.isprintable() and _SPECIAL.isdisjoint(value)):
        return value
    return '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
