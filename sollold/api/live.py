"""The requests that this node is answering now, for people to watch and for the metrics to count."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from sollold.serving.ask import Ask, Routing, Waiting


@dataclass(slots=True)
class Live:
    """One request under way."""

    ask: Ask
    path: str
    started: float = field(default_factory=time.monotonic)
    stage: str = "planning"
    node: str = ""
    events: int = 0
    """What the engine has said so far: for a stream about as many as tokens."""

    def waits(self, waiting: Waiting) -> None:
        """It waits for something else now."""
        self.stage = waiting.stage

    def answers(self, routing: Routing) -> None:
        """The engine has begun."""
        self.stage = "answering"
        self.node = routing.node

    def shown(self) -> dict[str, Any]:
        """For people."""
        return {
            "id": self.ask.id,
            "model": self.ask.model,
            "path": self.path,
            "priority": self.ask.priority,
            "stage": self.stage,
            "node": self.node,
            "seconds": round(time.monotonic() - self.started, 1),
            "events": self.events,
        }


class LiveRequests:
    """All of them. Its size is bounded by the connections that there are."""

    def __init__(self) -> None:
        self._all: dict[int, Live] = {}

    def enter(self, ask: Ask, path: str) -> Live:
        """A request begins; `leave` it."""
        live = Live(ask, path)
        self._all[id(live)] = live
        return live

    def leave(self, live: Live) -> None:
        """It has ended, however."""
        self._all.pop(id(live), None)

    def __len__(self) -> int:
        return len(self._all)

    def shown(self, limit: int = 100) -> list[dict[str, Any]]:
        """The oldest ``limit`` of them, for people."""
        return [live.shown() for live in list(self._all.values())[:limit]]
