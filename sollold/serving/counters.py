"""What this node has answered since its daemon started."""

from __future__ import annotations

import time
from dataclasses import field

from sollold.cluster.gossip.record import Backend
from sollold.facts import dataclass


@dataclass(slots=True)
class Counters:
    """Counts that only grow.

    Attributes:
        started: when the daemon did, as a Unix time.
        distributed, local, ollama: answers given to this node's callers, by who computed them.
        resumed: faults after which one of them went on.
        tokens: made by this node's engines, in answers of any node's callers.
        seconds: that they took, each answer's own: at the same time made ones count each.
    """

    started: float = field(default_factory=time.time)
    distributed: int = 0
    local: int = 0
    ollama: int = 0
    resumed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def answered(self, backend: Backend) -> None:
        """Count an answer that began, by who computes it."""
        match backend:
            case Backend.SHARDED:
                self.distributed += 1
            case Backend.LOCAL:
                self.local += 1
            case Backend.OLLAMA:
                self.ollama += 1

    def generated(self, tokens: int, speed: float) -> None:
        """An engine made ``tokens`` at ``speed`` tokens per second."""
        self.tokens += tokens
        self.seconds += tokens / speed
