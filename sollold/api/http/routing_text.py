"""Formats which endpoint answers, or what a caller is waiting for: headers and ``_routing``. Pure."""

from __future__ import annotations

import time
from typing import Any

from sollold.serving.request import Routing, Waiting

WARNING = "X-Sollold-Warning"


def routing_headers(routing: Routing) -> dict[str, str]:
    """Return the ``X-Sollold-`` headers that identify the endpoint of an answer."""
    headers = {
        "X-Sollold-Backend": str(routing.backend),
        "X-Sollold-Node": header_text(routing.node),
        "X-Sollold-Model": header_text(routing.model),
    }
    if routing.devices:
        headers["X-Sollold-Devices"] = header_text(",".join(routing.devices))
    if routing.resumed:
        headers["X-Sollold-Resumed"] = str(routing.resumed)
        headers["X-Sollold-Gap-Ms"] = f"{routing.gap_ms:.0f}"
    if routing.warnings:
        headers[WARNING] = header_text("; ".join(routing.warnings))[:1000]
    return headers


def header_text(text: str) -> str:
    """Return ``text`` with characters that a header can't contain replaced by ``?``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def waiting_text(waiting: Waiting) -> str:
    """Return one short line for a header or a comment, such as ``loading 43 %`` or ``queued, place 3``."""
    text = waiting.stage
    if waiting.stage == "loading":
        text += f" {waiting.progress * 100:.0f} %"
    if waiting.stage == "queued" and waiting.position:
        text += f", place {waiting.position}"
    if waiting.message:
        text += f": {waiting.message}"
    return header_text(text)[:300]


def sse_comment(waiting: Waiting) -> bytes:
    """Return a comment of a stream of server-sent events, which every client ignores."""
    return b": " + waiting_text(waiting).encode("ascii") + b"\n\n"


def routing_object(routing: Routing, started: float) -> dict[str, Any]:
    """Return ``_routing`` as callers see it; ``started``: monotonic time."""
    shown: dict[str, Any] = {
        "backend": str(routing.backend),
        "duration_ms": round((time.monotonic() - started) * 1000, 3),
        "coordinator_url": routing.coordinator_url,
        "node": routing.node,
        "devices": list(routing.devices),
        "model": routing.model,
        "engine": str(routing.engine),
        "load_ms": round(routing.load_ms, 3),
        "queue_ms": round(routing.queue_ms, 3),
        "resumed": routing.resumed,
        "gap_ms": round(routing.gap_ms, 3),
    }
    if routing.drafts.by:
        drafts = routing.drafts
        shown["speculation"] = {"by": drafts.by}
        if drafts.drafted:
            shown["speculation"]["acceptance"] = round(drafts.acceptance, 3)
    if routing.warnings:
        shown["warnings"] = list(routing.warnings)
    if routing.scores:
        shown["scores"] = [
            {"endpoint": endpoint, "score": score, "why": why} for endpoint, score, why in routing.scores
        ]
    return shown
