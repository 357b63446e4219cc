"""Nodes as people name them."""

from __future__ import annotations

from sollold.cluster.net.view import View
from sollold.errors import Fault, Refusal


def node_named(view: View, text: str) -> str:
    """The id of the live node with this name or id.

    Raises:
        Refusal: NOT_FOUND when there is none, or more than one.
    """
    live = view.live()
    found = [record.node for record in live if text in (record.node, record.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Refusal(
            Fault.NOT_FOUND, f"several nodes are named {text!r}; name one by its id: {', '.join(found)}"
        )
    known = ", ".join(sorted(record.name for record in live))
    raise Refusal(Fault.NOT_FOUND, f"there is no node {text!r}; there are {known}")
