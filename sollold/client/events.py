"""Log lines of the logger ``sollold.client``, worded as users of SOLLOL's guide expect them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sollold.client.coordinator import DISTRIBUTED

log = logging.getLogger("sollold.client")


class Events:
    """The log lines of one router; unchanged facts are logged once."""

    def __init__(self) -> None:
        self._started: set[str] = set()

    def connected(self, cluster: Mapping[str, Any], enabled: bool, external: bool) -> None:
        """Log that the cluster was found, and what it offers."""
        others = [node for node in cluster["nodes"] if not node["me"] and node["build"]]
        workers = [
            worker
            for node in cluster["nodes"]
            for worker in node["plain_workers"]
            if worker["state"] in ("usable", "taken", "busy")
        ]
        if not enabled:
            log.info("model sharding disabled: enable_distributed is off")
        elif not others and not workers and not external:
            log.warning(
                "no RPC backends found: %s is alone, no other machine of the LAN runs sollold",
                cluster["name"],
            )
            log.warning("model sharding disabled until another machine joins; `sollold doctor` says more")
        else:
            log.info("RPC backends found: %d machines, %d external workers", len(others), len(workers))

    def request(self, model: str) -> RequestEvents:
        """A logger for one request."""
        return RequestEvents(self, model)

    def started(self, model: str, routing: Mapping[str, Any]) -> None:
        """Log a coordinator with its first answer, and again after a restart."""
        location = f"{model} on {routing.get('node')}"
        if location not in self._started or float(routing.get("load_ms") or 0.0) > 0:
            self._started.add(location)
            devices = ", ".join(map(str, routing.get("devices") or ()))
            log.info("coordinator started successfully: %s, layers on %s", location, devices)


class RequestEvents:
    """The log lines of one request."""

    def __init__(self, events: Events, model: str) -> None:
        self._events = events
        self._model = model
        self._loading = False

    def waits(self, text: str) -> None:
        """Log what the request waits for; ``text`` is the daemon's."""
        if text.startswith("loading") and not self._loading:
            self._loading = True
            log.info("starting llama.cpp coordinator for %s", self._model)
        elif text.startswith("recovering"):
            self._loading = False
            log.warning("coordinator process died (%s); resuming on another endpoint", self._model)

    def ends(self, routing: Mapping[str, Any]) -> None:
        """Log the end of the answer."""
        if routing.get("backend") == DISTRIBUTED:
            self._events.started(self._model, routing)
        if lost := routing.get("lost_nodes"):
            log.warning("answer of %s continued after losing %s", self._model, ", ".join(lost))
        elif routing.get("resumed") and routing.get("backend") == DISTRIBUTED:
            log.warning("coordinator process died while %s answered; it was resumed", self._model)
