"""Which node to ask next: nodes named by the caller first, failing ones last. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sollold.client.login import split_login
from sollold.facts import dataclass

MOST_NODES = 256
"""Maximum number of remembered addresses: as many nodes as a cluster may have."""
_FIRST_RETRY, _MAX_RETRY = 1.0, 30.0
_MAX_DOUBLINGS = 5
"""Doublings after which the delay has reached its maximum; a thousand would be too large for a float."""


@dataclass(slots=True)
class KnownNode:
    """A node's address and state.

    Attributes:
        url: URL of its HTTP API.
        address: the same, including the login if there is one.
        node, name: its id and name; empty while unknown.
        reached: whether it has ever responded.
        failures: consecutive failures; 0: up, as far as is known.
        retry_at: when to check it again, on the monotonic clock.
        trusted: the caller named it, or a trusted node listed it, so it may receive the caller's key.
    """

    url: str
    address: str
    node: str = ""
    name: str = ""
    reached: bool = False
    failures: int = 0
    retry_at: float = 0.0
    trusted: bool = True


class NodeList:
    """The nodes known to a client. ``named``: URLs in order of preference."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._nodes: list[KnownNode] = []
        self.add(named)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[KnownNode]:
        return iter(tuple(self._nodes))

    def asked_by(self, owner: object) -> str:
        """A readable description of ``owner`` with these nodes; contains no key."""
        urls = ", ".join(repr(known.url) for known in self._nodes) or "nodes yet to be found"
        return f"<{type(owner).__module__}.{type(owner).__qualname__} of {urls}>"

    def add(self, urls: Iterable[str], *, trusted: bool = True) -> None:
        """Add addresses after the known ones. ``trusted``: as in `KnownNode`."""
        for address in urls:
            address = address.rstrip("/")
            url, login = split_login(address)
            known = self._by_url(url)
            if known is not None:
                known.trusted = known.trusted or trusted
                known.address = address if login else known.address
            elif len(self._nodes) < MOST_NODES:
                self._nodes.append(KnownNode(url, address, trusted=trusted))

    def learn(self, origin: str, cluster: dict[str, Any]) -> None:
        """Add the nodes that the node at ``origin`` lists in ``/api/cluster``."""
        source = self._by_url(origin)
        trusted = source is not None and source.trusted
        for entry in cluster.get("nodes") or ():
            node, url, name = (str(entry.get(key) or "") for key in ("node", "url", "name"))
            url, _ = split_login(url)
            if origin.startswith("https:") and url.startswith("http:") and not entry.get("me"):
                # Failing over must not send in clear text what the caller encrypts.
                continue
            # The URL by which the node was reached is better than its own address on its LAN.
            known = self._by_url(origin) if entry.get("me") else self._by_id(node) or self._by_url(url)
            if known is not None and known.failures and known.url != url:
                # It may have got another address. The old one is kept: it may lead through a proxy.
                known = self._by_url(url)
            if known is None:
                self.add([url], trusted=trusted)
                known = self._by_url(url)
            elif trusted:
                known.trusted = True
            if known is not None:
                known.node, known.name = node, name

    def order(self) -> list[KnownNode]:
        """The nodes in the order in which to ask them."""
        return sorted(self._nodes, key=lambda known: known.failures > 0)

    def failed(self, url: str, now: float) -> None:
        """Note that the node did not respond, or broke off."""
        if (known := self._by_url(url)) is not None:
            known.failures += 1
            known.retry_at = now + min(
                _MAX_RETRY, _FIRST_RETRY * 2 ** min(known.failures - 1, _MAX_DOUBLINGS)
            )

    def answered(self, url: str) -> None:
        """Note that the node responded, which restores its place in the order."""
        if (known := self._by_url(url)) is not None:
            known.reached, known.failures, known.retry_at = True, 0, 0.0

    def due(self, now: float) -> list[KnownNode]:
        """Failed nodes that are due for another check."""
        return [known for known in self._nodes if known.failures and known.retry_at <= now]

    def is_trusted(self, url: str) -> bool:
        """Whether the node at ``url`` may receive the caller's key."""
        known = self._by_url(url)
        return known is None or known.trusted

    def address_of(self, url: str) -> str:
        """``url`` including its login."""
        known = self._by_url(url)
        return known.address if known is not None else url

    def _by_url(self, url: str) -> KnownNode | None:
        return next((known for known in self._nodes if known.url == url), None)

    def _by_id(self, node: str) -> KnownNode | None:
        return next((known for known in self._nodes if node and known.node == node), None)
