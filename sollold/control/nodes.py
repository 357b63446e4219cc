"""Finds nodes and machines by the names, ids and codes that people use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from sollold.cluster.gossip.record import ids_and_hosts
from sollold.cluster.net.view import View
from sollold.errors import Fault, Refusal

T = TypeVar("T")

_ID = re.compile(r"[0-9a-f]{16}")
_CODE = re.compile(r"[A-Z2-7]{4}-[A-Z2-7]{4}")


def matching(
    text: str, candidates: Iterable[T], ids: Callable[[T], Iterable[str]], name: Callable[[T], str]
) -> list[T]:
    """Return those of ``candidates`` that ``text`` means: by an id, else by name.

    Machines choose their own names, so a text that looks like an id or a code never matches a name, even if
    nothing has that id.
    """
    listed = list(candidates)
    found = [item for item in listed if text in ids(item)]
    if found or _ID.fullmatch(text) or _CODE.fullmatch(text):
        return found
    return [item for item in listed if name(item) == text]


def node_named(view: View, text: str) -> str:
    """Return the id of the live node with this name or id.

    Raises:
        Refusal: NOT_FOUND when there is none, or more than one.
    """
    live = view.live()
    found = matching(text, live, lambda r: (r.node,), lambda r: r.name)
    if len(found) == 1:
        return found[0].node
    if found:
        raise Refusal(
            Fault.NOT_FOUND, f"several nodes are named {text!r}; name one by its id: {ids_and_hosts(found)}"
        )
    names = ", ".join(sorted(record.name for record in live))
    raise Refusal(Fault.NOT_FOUND, f"there is no node {text!r}; nodes: {names}")
