"""Which node is asked next: those that the caller named first, those that fail last. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sollold.facts import dataclass

MOST_NODES = 64
"""Addresses that are remembered."""
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 30.0


@dataclass(slots=True)
class KnownNode:
    """A node's address and how it did.

    Attributes:
        url: its HTTP API.
        node, name: its id and name; empty until it, or another, has told them.
        reached: it has answered once.
        failures: in a row; 0: it answers as far as is known.
        retry_at: when it is worth a look again, on the monotonic clock.
    """

    url: str
    node: str = ""
    name: str = ""
    reached: bool = False
    failures: int = 0
    retry_at: float = 0.0


class NodeList:
    """The nodes that a client knows. ``named``: URLs in the order in which they are to be asked."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._nodes: list[KnownNode] = []
        self.add(named)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[KnownNode]:
        return iter(tuple(self._nodes))

    def add(self, urls: Iterable[str]) -> None:
        """More addresses, behind those that are known."""
        for url in urls:
            url = url.rstrip("/")
            if self._by_url(url) is None and len(self._nodes) < MOST_NODES:
                self._nodes.append(KnownNode(url))

    def learn(self, asked: str, cluster: dict[str, Any]) -> None:
        """Take in what the node at ``asked`` says of its cluster (``/api/cluster``)."""
        for told in cluster.get("nodes") or ():
            node, url, name = (str(told.get(key) or "") for key in ("node", "url", "name"))
            # The address by which the asked node is reached is better than the one that it has on its LAN.
            known = self._by_url(asked) if told.get("me") else self._by_id(node) or self._by_url(url)
            if known is None:
                self.add([url])
                known = self._by_url(url)
            if known is not None:
                known.node, known.name = node, name

    def order(self) -> list[KnownNode]:
        """The nodes in the order in which they are to be asked."""
        return sorted(self._nodes, key=lambda one: one.failures > 0)

    def failed(self, url: str, now: float) -> None:
        """The node does not answer, or broke off."""
        if (known := self._by_url(url)) is not None:
            known.failures += 1
            known.retry_at = now + min(_LONGEST_RETRY, _FIRST_RETRY * 2 ** (known.failures - 1))

    def answered(self, url: str) -> None:
        """The node answers: it has its old place again."""
        if (known := self._by_url(url)) is not None:
            known.reached, known.failures, known.retry_at = True, 0, 0.0

    def due(self, now: float) -> list[KnownNode]:
        """Nodes that failed and are worth a look again."""
        return [known for known in self._nodes if known.failures and known.retry_at <= now]

    def name_of(self, url: str) -> str:
        """What people call the node at ``url``."""
        known = self._by_url(url)
        return known.name if known is not None and known.name else url

    def _by_url(self, url: str) -> KnownNode | None:
        return next((known for known in self._nodes if known.url == url), None)

    def _by_id(self, node: str) -> KnownNode | None:
        return next((known for known in self._nodes if node and known.node == node), None)
