"""Log lines for changes in the cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sollold.cluster.gossip.actions import Change, NodeEvent

log = logging.getLogger("sollold.cluster")


def log_change(event: NodeEvent, me: str, name_of: Callable[[str], str]) -> None:
    """Log what happened to a node, or who leads now.

    Args:
        me: this node's id.
        name_of: a node's name for people, by its id.
    """
    change, term = event.change, event.term
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
        log.error(
            "another machine uses the node id %s: its state folder is a copy of ours; "
            "delete the file node-key in one of them and restart that daemon", event.node,
        )  # fmt: skip
    else:
        log.debug("node %s: %s", name, change)
