"""Which models that were to stay loaded (keep_alive negative) were lost and are to be loaded again. Pure.

Lost is one whose process, or a machine of it, ended by itself: that its head has ended on an order shows by
the head being there without it. Where it was behind a cut cable, and comes back, there are two: one stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, Record, State
from sollold.facts import dataclass
from sollold.leader.snapshot import in_use, is_loading

STANDS = 20.0
"""Seconds that it must have been lost: a cable that flaps moves no model, and a machine may restart."""
AGAIN = 15.0
"""Seconds until it is tried once more, whatever came of it."""
TOLD_AGAIN = 300.0
"""Seconds after which it is logged again why one can't be loaded: the free bytes in it change."""
FORGOTTEN = 3600.0
"""Seconds after which it is tried no more, and a machine that went counts as one that was taken away."""

_Content = tuple[str, str, bool, str]
"""Model, digest, embedding and template: what one deployment answers for like another."""


@dataclass(slots=True)
class _Pinned:
    """One content that is to stay loaded: as it was seen last, and since when it is lost."""

    head: str
    endpoint: Endpoint
    leaves: bool = False
    """It was about to end since a machine of it drains, or to be loaded anew."""
    lost: float | None = None
    next: float = 0.0
    told: str = ""
    """Why it could not be loaded again, as it was logged; ``told_at``: when."""
    told_at: float = 0.0


_NEVER = _Pinned("", Endpoint("", "", "", Backend.LOCAL, State.DRAINING))


@dataclass(frozen=True, slots=True)
class LostModel:
    """A model that was to stay loaded and is gone for ``seconds``, from ``head``, a node's id.

    ``reason``: why the leader could not load it again, on the leader itself.
    """

    model: str
    head: str
    seconds: float
    reason: str = ""


class PinnedPolicy:
    """Watches the pinned endpoints in the records. Every node does: a new leader must know what was lost."""

    def __init__(self) -> None:
        self._pinned: dict[_Content, _Pinned] = {}
        self._seen: dict[str, float] = {}
        """Nodes: when last."""

    def observe(self, records: Sequence[Record], now: float) -> None:
        """Learn what is pinned, and what was lost."""
        self._seen |= dict.fromkeys((record.node for record in records), now)
        self._seen = {node: at for node, at in self._seen.items() if now - at < FORGOTTEN}
        found = _by_content(records)
        for content, endpoints in found.items():
            before = self._pinned.get(content, _NEVER)
            for head, one in endpoints:
                # One that is loaded again is lost until it is ready: it may fail.
                there = one.state is State.READY or (is_loading(one) and before.lost is None)
                if one.pinned and there:
                    leaves = one.closing or head.draining
                    self._pinned[content] = _Pinned(head.node, one, leaves, next=before.next)
        heads = {record.node: record for record in records}
        for content, pinned in list(self._pinned.items()):
            endpoints = found.get(content, [])
            if pinned.lost is None:
                lost = _is_lost(pinned, endpoints, heads.get(pinned.head))
                if lost is None:
                    del self._pinned[content]
                elif lost:
                    pinned.lost = now
            if pinned.lost is not None:
                answers = any(one.state is State.READY and not one.closing for _, one in endpoints)
                if answers or now - pinned.lost >= FORGOTTEN:
                    del self._pinned[content]

    def due(self, records: Sequence[Record], now: float) -> list[tuple[str, Endpoint]]:
        """(head, endpoint) for each that is to be loaded again now: as they were."""
        if 2 * len(records) < len(self._seen):
            # The others may be there, behind a cable that is cut, and have it.
            return []
        loading = {
            content for content, found in _by_content(records).items() for _, e in found if is_loading(e)
        }
        due = []
        for content, pinned in self._pinned.items():
            waited = pinned.lost is not None and now - pinned.lost >= STANDS
            if waited and now >= pinned.next and content not in loading:
                pinned.next = now + AGAIN
                due.append((pinned.head, pinned.endpoint))
        return due

    def lost(self, now: float) -> tuple[LostModel, ...]:
        """All that are to be loaded again."""
        return tuple(
            LostModel(one.endpoint.model, one.head, now - one.lost, one.told)
            for one in self._pinned.values()
            if one.lost is not None
        )

    def is_lost(self, model: str, digest: str) -> bool:
        """Whether this content was to stay loaded and is gone."""
        return any(
            one.lost is not None
            and (one.endpoint.digest == digest if digest else one.endpoint.model.lower() == model.lower())
            for one in self._pinned.values()
        )

    def is_news(self, endpoint: Endpoint, reason: str, now: float) -> bool:
        """Whether the reason for which one that is due can't be loaded is to be logged: it is another."""
        pinned = self._pinned.get(_content(endpoint))
        if pinned is None or pinned.told == reason or (pinned.told and now - pinned.told_at < TOLD_AGAIN):
            return False
        pinned.told, pinned.told_at = reason, now
        return True

    def forget(self, *names: str) -> bool:
        """Somebody unloads the model, or the deployment, of this name: it is no longer to stay.

        Whether one was lost: the other nodes can't see in the records that it is not to be loaded again.
        """
        lost = False
        for content, one in list(self._pinned.items()):
            if {one.endpoint.model, one.endpoint.id} & set(names):
                lost |= one.lost is not None
                del self._pinned[content]
        return lost


def needless(records: Iterable[Record]) -> dict[str, str]:
    """Deployment → head, of those that are to stay loaded, but for which another alike does. It is the one
    in use, or with more context, or used last.
    """
    alike: dict[tuple[_Content, Asked], list[tuple[bool, int, float, str, str]]] = {}
    for content, found in _by_content(records).items():
        for head, one in found:
            if one.pinned and one.state is State.READY and not (one.closing or head.draining):
                used = (not in_use(one), -one.context, one.idle, one.id, head.node)
                alike.setdefault((content, one.asked), []).append(used)
    return {one: node for copies in alike.values() for *_, one, node in sorted(copies)[1:]}


def _content(endpoint: Endpoint) -> _Content:
    return endpoint.model, endpoint.digest, endpoint.embedding, endpoint.template


def _by_content(records: Iterable[Record]) -> dict[_Content, list[tuple[Record, Endpoint]]]:
    """The deployments of llama.cpp with their heads: what an Ollama keeps is its own."""
    found: dict[_Content, list[tuple[Record, Endpoint]]] = {}
    for record in records:
        for one in record.endpoints:
            if one.backend is not Backend.OLLAMA:
                found.setdefault(_content(one), []).append((record, one))
    return found


def _is_lost(pinned: _Pinned, endpoints: list[tuple[Record, Endpoint]], head: Record | None) -> bool | None:
    """Whether it is; None: it is no longer pinned, or was ended on an order."""
    for _, one in endpoints:
        if one.id == pinned.endpoint.id:
            if one.state is State.FAILED:
                return True if one.answered else None
            return False if one.pinned and (pinned.leaves or one.state is not State.DRAINING) else None
    return True if head is None or head.draining or pinned.leaves else None
