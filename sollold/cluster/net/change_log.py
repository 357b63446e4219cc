"""Logs changes in the cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sollold.cluster.gossip.actions import Change, NodeEvent
from sollold.cluster.gossip.double import Double

log = logging.getLogger("sollold.cluster")


_COPY_HINT = (
    "the state folder of one is a copy of the other's; delete the file node-key in one of them and restart "
    "that daemon"
)


def log_change(event: NodeEvent, me: str, name_of: Callable[[str], str], double: Double | None) -> None:
    """Log a change of a node or of the leader.

    Args:
        me: this node's id.
        name_of: returns a node's display name by its id.
        double: the two machines that use a node id, if it is about them.
    """
    change, term = event.change, event.term
    machines = double.machines if double is not None else ""
    name = name_of(event.node)
    if change is Change.JOINED:
        log.info("node %s joined", name)
    elif change is Change.DIED:
        log.warning("node %s is gone", name)
    elif change is Change.LEFT:
        log.info("node %s left", name)
    elif change is Change.RESTARTED:
        log.info("node %s was restarted", name)
    elif change is Change.LEADER and term.leader:
        log.info(
            "leader: %s%s, term %d", name_of(term.leader), " (this node)" if term.leader == me else "",
            term.counter,
        )  # fmt: skip
    elif change is Change.LEADER:
        log.info("no leader")
    elif change is Change.CLONED:
        log.error("another machine uses the node id %s%s; %s", event.node, machines, _COPY_HINT)
    elif change is Change.DOUBLED:
        log.error("two machines use the id of node %s%s; %s", name, machines, _COPY_HINT)
    else:
        log.debug("node %s: %s", name, change)
