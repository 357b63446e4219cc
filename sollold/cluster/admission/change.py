"""Changing the secret of a cluster without a gap: what each step makes of a keyring. Pure.

The leader has every node accept the new secret, then use it, then accept no other. Each step may come twice,
or late: a node that missed some fetches the secret at a member (`sollold.cluster.admission.policy`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sollold.cluster.admission.keyring import MAX_MEMBERS, MAX_OLD, Keyring, KeyringMember, Pending
from sollold.cluster.admission.orders import SecretOrder, Step

_AHEAD = 1024
"""A generation this far above the own is not reached by changing secrets."""


class Refused(ValueError):
    """The order is not obeyed; the text says why."""


def obeyed(ring: Keyring, order: SecretOrder, me: str) -> Keyring:
    """The keyring of the node ``me`` after ``order``; the same when it was obeyed before.

    Raises:
        Refused: it is for another cluster, out of date, or no step that can follow.
    """
    if order.founder != ring.founder and not ring.open:
        raise Refused("it belongs to another cluster")
    if any(one.node == me for one in order.evicted):
        raise Refused("it evicts this node")
    if order.generation > ring.newest + _AHEAD:
        raise Refused(f"generation {order.generation} does not follow {ring.newest}")
    current = (order.generation, order.secret) == (ring.generation, ring.secret)
    if not current and order.generation <= ring.generation:
        raise Refused(f"generation {ring.generation} of the secret is in use")
    if order.step is Step.INSTALL:
        return ring if current else _installed(ring, order)
    if order.step is Step.USE:
        return ring if current else used(ring, _pending(order))
    if not current:
        raise Refused(f"it uses generation {ring.generation} of the secret")
    members = merged(order.members, ring.members, without=order.evicted)
    return replace(ring, old=(), pending=None, members=members, evicted=order.evicted)


def _installed(ring: Keyring, order: SecretOrder) -> Keyring:
    waits = ring.pending
    if waits is not None and (waits.generation, waits.secret) > (order.generation, order.secret):
        raise Refused(f"generation {waits.generation} of the secret is on its way")
    return replace(ring, pending=_pending(order))


def used(ring: Keyring, pending: Pending) -> Keyring:
    """The keyring that uses ``pending``, and accepts the former secret still."""
    old = tuple(dict.fromkeys((ring.secret, *ring.old)))[:MAX_OLD]
    fresh = replace(
        ring,
        secret=pending.secret,
        generation=pending.generation,
        old=old,
        pending=None,
        members=merged(pending.members, ring.members, without=pending.evicted),
        evicted=pending.evicted,
        admitted=tuple(
            one for one in ring.admitted if one.node not in {gone.node for gone in pending.evicted}
        ),
    )
    if ring.open:
        # Of a cluster that was open: established, and shut from the start. Who was there says nothing.
        fresh = replace(
            fresh,
            founder=pending.founder,
            founded=0.0,
            alone=False,
            closed=True,
            secured=True,
            members=pending.members,
        )
    return fresh


def settled(ring: Keyring) -> Keyring:
    """The keyring after a change that nobody ended: the secret in use is the only one."""
    return replace(ring, old=(), pending=None)


def seen(ring: Keyring, live: Iterable[tuple[str, str]]) -> Keyring:
    """The keyring that remembers the machines (id, name) which are here now."""
    names = {one.node: one.name for one in ring.members}
    refused = ring.refused
    news = [
        KeyringMember(node, name) for node, name in live if names.get(node) != name and node not in refused
    ]
    return replace(ring, members=merged(news, ring.members)) if news else ring


def merged(
    *lists: Iterable[KeyringMember], without: Iterable[KeyringMember] = ()
) -> tuple[KeyringMember, ...]:
    """All machines of ``lists`` once, as an earlier list names them, but for those ``without``."""
    gone = {one.node for one in without}
    found: dict[str, KeyringMember] = {}
    for one in (one for each in lists for one in each):
        if one.node not in gone:
            found.setdefault(one.node, one)
    return tuple(found.values())[:MAX_MEMBERS]


def caught_up(ring: Keyring, fetched: Keyring) -> Keyring:
    """The keyring of a node that was away, after it fetched that of a member: its own history stays."""
    return replace(
        ring,
        secret=fetched.secret,
        generation=fetched.generation,
        old=(),
        pending=None,
        alone=False,
        closed=ring.closed or fetched.closed,
        members=merged(fetched.members, ring.members, without=fetched.evicted),
        evicted=fetched.evicted,
    )


def unsettled(ring: Keyring) -> bool:
    """Whether a change of the secret is under way here, or was broken off."""
    return bool(ring.old) or ring.pending is not None


def _pending(order: SecretOrder) -> Pending:
    return Pending(order.secret, order.generation, order.founder, order.members, order.evicted)
