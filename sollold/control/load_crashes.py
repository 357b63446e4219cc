"""Remembers the nodes on which llama.cpp has only crashed: it may not suit the machine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Record, State
from sollold.engines.llamacpp.exit_reason import ended_by_signal
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class CrashingNode:
    """A node on which every load has ended with a crash since it got its llama.cpp, or since one succeeded.

    Attributes:
        node: its id, ``name``: its name; ``build``: of its llama.cpp.
        models: the models whose loads crashed.
        reason: of the last crash.
    """

    node: str
    name: str
    build: str
    models: tuple[str, ...] = ()
    reason: str = ""


class LoadCrashes:
    """Learns from the records; a failed load is in them for a minute only."""

    def __init__(self) -> None:
        self._nodes: dict[str, CrashingNode] = {}

    def observe(self, live: Sequence[Record]) -> None:
        """Note the crashes and successful loads that the records show."""
        nodes = {record.node: CrashingNode(record.node, record.name, record.build) for record in live}
        # A node that restarts is away, or without a build, for a moment.
        self._nodes = {
            node: known
            for node, known in self._nodes.items()
            if node in nodes and known.build == nodes[node].build
        }
        for record in live:
            for endpoint in record.endpoints:
                if endpoint.backend is Backend.OLLAMA:
                    continue
                if endpoint.state is State.READY:
                    for node in (record.node, *(placed.node for placed in endpoint.placed)):
                        self._nodes.pop(node, None)
                elif endpoint.crashed and not endpoint.answered and ended_by_signal(endpoint.reason):
                    node = endpoint.culprit or record.node
                    if (entry := self._nodes.get(node) or nodes.get(node)) is not None:
                        models = tuple(dict.fromkeys((*entry.models, endpoint.model)))
                        self._nodes[node] = replace(entry, models=models, reason=endpoint.reason)

    def found(self) -> tuple[CrashingNode, ...]:
        """Return the nodes on which llama.cpp only crashes."""
        return tuple(self._nodes.values())
