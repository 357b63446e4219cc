"""Finds pinned models (negative keep_alive) that were lost and must be loaded again. Pure.

A model is lost if its process failed or one of its machines went. If its head is online without it, the head
ended it on command, and it is not lost. If it was only behind a broken network link and comes back, there are
two, of which one is kept (`redundant_pins`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, Record, State
from sollold.facts import dataclass
from sollold.leader.snapshot import in_use, is_loading

STANDS = 20.0
"""Seconds for which it must have been lost: a flapping link must move no model, and a machine may restart."""
AGAIN = 15.0
"""Seconds until the next attempt, whatever the result of the last."""
TOLD_AGAIN = 300.0
"""Seconds before a changed reason is logged again: the free bytes in the message keep changing."""
FORGOTTEN = 3600.0
"""Seconds after which no more attempts are made, and an absent machine no longer counts as part of the
cluster."""

_Content = tuple[str, str, bool, str]
"""Model, digest, embedding and template. Deployments that have these in common are interchangeable."""


@dataclass(slots=True)
class _Pinned:
    """A pinned content: the endpoint as last seen, and since when it is lost."""

    head: str
    endpoint: Endpoint
    leaves: bool = False
    """Whether it was about to end since its head drains, or to be reloaded."""
    lost: float | None = None
    replicas: frozenset[str] = frozenset()
    """If lost: unpinned deployments of the content that served already, while one of them still does."""
    next: float = 0.0
    told: str = ""
    """Last logged reason why it could not be loaded again; ``told_at``: when it was logged."""
    told_at: float = 0.0


_NOT_PINNED = _Pinned("", Endpoint("", "", "", Backend.LOCAL, State.DRAINING))


@dataclass(frozen=True, slots=True)
class LostModel:
    """A pinned model that has been lost for ``seconds``; ``head``: node id of its former head.

    ``reason``: why the leader could not load it again; known only on the leader itself.
    """

    model: str
    head: str
    seconds: float
    reason: str = ""


class PinnedPolicy:
    """Watches pinned endpoints in the records. Every node does: a new leader must know what was lost."""

    def __init__(self) -> None:
        self._pinned: dict[_Content, _Pinned] = {}
        self._seen: dict[str, float] = {}
        """Time each node was last seen."""
        self._replaced: set[str] = set()
        """Deployments that this node, as the leader, ends to load them with other options."""
        self._unloading: set[str] = set()
        """Deployments that are being unloaded by order, as long as the records still show them."""

    def observe(self, records: Sequence[Record], now: float) -> None:
        """Learn from the records what is pinned and what was lost."""
        self._seen |= dict.fromkeys((record.node for record in records), now)
        # A node that drains is probably about to leave on purpose.
        draining = {record.node for record in records if record.draining}
        self._seen = {
            node: seen for node, seen in self._seen.items() if now - seen < FORGOTTEN and node not in draining
        }
        self._unloading &= {endpoint.id for record in records for endpoint in record.endpoints}
        found = _by_content(records)
        for content, endpoints in found.items():
            before = self._pinned.get(content, _NOT_PINNED)
            for head, endpoint in endpoints:
                # A model being loaded again counts as lost until it is ready, since the load may fail.
                running = endpoint.state is State.READY or (is_loading(endpoint) and before.lost is None)
                leaves = endpoint.closing or head.draining or endpoint.id in self._replaced
                if endpoint.pinned and running and endpoint.id not in self._unloading:
                    self._pinned[content] = _Pinned(head.node, endpoint, leaves, next=before.next)
                elif leaves and endpoint.id == before.endpoint.id:
                    # An idle one ends so soon that no record may show it ready and closing.
                    before.leaves = True
        heads = {record.node: record for record in records}
        for content, pinned in list(self._pinned.items()):
            endpoints = found.get(content, [])
            ready = frozenset(e.id for _, e in endpoints if e.state is State.READY and not e.closing)
            if pinned.lost is None:
                lost = _is_lost(pinned, endpoints, heads.get(pinned.head))
                if lost is None:
                    del self._pinned[content]
                elif lost:
                    pinned.lost, pinned.replicas = now, ready
            elif ready & pinned.replicas:
                pinned.replicas |= ready
            elif pinned.replicas:
                # The last one has ended, by its keep_alive for example.
                pinned.lost, pinned.replicas = now, frozenset()
            elif ready or now - pinned.lost >= FORGOTTEN:
                del self._pinned[content]

    def due(self, records: Sequence[Record], now: float) -> list[tuple[str, Endpoint]]:
        """Return (head, endpoint), as last seen, for each model to load again now."""
        if 2 * len(records) < len(self._seen):
            # In a minority partition: the other nodes may still have it.
            return []
        loading = {
            content for content, found in _by_content(records).items() for _, e in found if is_loading(e)
        }
        due = []
        for content, pinned in self._pinned.items():
            waited = pinned.lost is not None and now - pinned.lost >= STANDS
            if waited and now >= pinned.next and not pinned.replicas and content not in loading:
                pinned.next = now + AGAIN
                due.append((pinned.head, pinned.endpoint))
        return due

    def lost(self, now: float) -> tuple[LostModel, ...]:
        """Return all lost models, except those that a replica still serves."""
        return tuple(
            LostModel(pinned.endpoint.model, pinned.head, now - pinned.lost, pinned.told)
            for pinned in self._pinned.values()
            if pinned.lost is not None and not pinned.replicas
        )

    def is_lost(self, model: str, digest: str) -> bool:
        """Return whether this content was pinned and is lost."""
        return any(
            lost.lost is not None
            and (lost.endpoint.digest == digest if digest else lost.endpoint.model.lower() == model.lower())
            for lost in self._pinned.values()
        )

    def has_other_version(self, model: str, digest: str) -> bool:
        """Return whether other content of this name is pinned: all versions of it stay loaded."""
        return any(
            pinned.endpoint.digest != digest and pinned.endpoint.model.lower() == model.lower()
            for pinned in self._pinned.values()
        )

    def should_log(self, endpoint: Endpoint, reason: str, now: float) -> bool:
        """Return whether to log why a due model can't be loaded: the reason changed, and not too recently."""
        pinned = self._pinned.get(_content(endpoint))
        if pinned is None or pinned.told == reason or (pinned.told and now - pinned.told_at < TOLD_AGAIN):
            return False
        pinned.told, pinned.told_at = reason, now
        return True

    def note_replaced(self, deployments: Iterable[str]) -> None:
        """Note that these end to be loaded with other options: if that fails, the pinned ones are lost."""
        self._replaced = {*deployments, *self._replaced & {p.endpoint.id for p in self._pinned.values()}}
        for pinned in self._pinned.values():
            pinned.leaves |= pinned.endpoint.id in self._replaced

    def forget(self, *names: str) -> bool:
        """Unpin the models or deployments of these names: they are being unloaded.

        Returns:
            Whether one was lost. The other nodes must then be told, since the records do not show that it
            must not be loaded again.
        """
        lost = False
        for content, pinned in list(self._pinned.items()):
            if {pinned.endpoint.model, pinned.endpoint.id} & set(names):
                lost |= pinned.lost is not None
                self._replaced.discard(pinned.endpoint.id)
                del self._pinned[content]
        return lost

    def note_unloading(self, deployments: Iterable[str]) -> None:
        """Note that these are being unloaded by order, even if they were about to end anyway."""
        self._unloading.update(deployments)

    def keep(self, deployment: str) -> None:
        """Pin a deployment again: it was not unloaded."""
        self._unloading.discard(deployment)


def redundant_pins(records: Iterable[Record]) -> dict[str, str]:
    """Return the redundant pinned deployments, each with its head.

    Of several with equal content and options, the one in use is kept, else the one with the most context,
    else the one used last.
    """
    groups: dict[tuple[_Content, Asked], list[tuple[bool, int, float, str, str]]] = {}
    for content, found in _by_content(records).items():
        for head, endpoint in found:
            if endpoint.pinned and endpoint.state is State.READY and not (endpoint.closing or head.draining):
                used = (not in_use(endpoint), -endpoint.context, endpoint.idle, endpoint.id, head.node)
                groups.setdefault((content, endpoint.asked), []).append(used)
    return {deployment: node for copies in groups.values() for *_, deployment, node in sorted(copies)[1:]}


def _content(endpoint: Endpoint) -> _Content:
    return endpoint.model, endpoint.digest, endpoint.embedding, endpoint.template


def _by_content(records: Iterable[Record]) -> dict[_Content, list[tuple[Record, Endpoint]]]:
    """Group llama.cpp deployments, with their heads, by content. Ollama manages its own models."""
    found: dict[_Content, list[tuple[Record, Endpoint]]] = {}
    for record in records:
        for endpoint in record.endpoints:
            if endpoint.backend is not Backend.OLLAMA:
                found.setdefault(_content(endpoint), []).append((record, endpoint))
    return found


def _is_lost(pinned: _Pinned, endpoints: list[tuple[Record, Endpoint]], head: Record | None) -> bool | None:
    """Return whether it is lost; None when it is no longer pinned, or was ended on command."""
    for _, entry in endpoints:
        if entry.id == pinned.endpoint.id:
            if entry.state is State.FAILED:
                return True if entry.answered else None
            return False if entry.pinned and (pinned.leaves or entry.state is not State.DRAINING) else None
    return True if head is None or head.draining or pinned.leaves else None
