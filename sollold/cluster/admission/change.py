"""Changing a cluster's secret without interruption: the effect of each step on a keyring. Pure.

The leader makes every node accept the new secret, then use it, then accept no other. Each step may arrive
twice, or late: a node that missed some fetches the secret from a member (`sollold.cluster.admission.policy`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sollold.cluster.admission.keyring import MAX_MEMBERS, MAX_OLD, Keyring, KeyringMember, Pending
from sollold.cluster.admission.orders import SecretOrder, Step

_MAX_AHEAD = 1024
"""A generation this far above our own cannot result from changing secrets."""


class Refused(ValueError):
    """The order is refused; the message says why."""


def obeyed(ring: Keyring, order: SecretOrder, me: str) -> Keyring:
    """Return the keyring of the node ``me`` after ``order``; unchanged if it was carried out before.

    Raises:
        Refused: it is for another cluster, out of date, or out of sequence.
    """
    if order.founder != ring.founder and not ring.open:
        raise Refused("it belongs to another cluster")
    if any(member.node == me for member in order.evicted):
        raise Refused("it evicts this node")
    if order.generation > ring.newest + _MAX_AHEAD:
        raise Refused(f"generation {order.generation} does not follow {ring.newest}")
    current = (order.generation, order.secret) == (ring.generation, ring.secret)
    if not current and order.generation <= ring.generation:
        raise Refused(f"generation {ring.generation} of the secret is in use")
    if order.step is Step.INSTALL:
        return ring if current else _installed(ring, order)
    if order.step is Step.USE:
        return ring if current else used(ring, _pending(order))
    if not current:
        raise Refused(f"it still uses generation {ring.generation} of the secret")
    members = merged(order.members, ring.members, without=order.evicted)
    # What is pending belongs to the next change: this step arrived late.
    return replace(ring, old=(), members=members, evicted=order.evicted)


def _installed(ring: Keyring, order: SecretOrder) -> Keyring:
    pending = ring.pending
    if pending is not None and (pending.generation, pending.secret) > (order.generation, order.secret):
        raise Refused(f"generation {pending.generation} of the secret is on its way")
    return replace(ring, pending=_pending(order))


def used(ring: Keyring, pending: Pending) -> Keyring:
    """Return the keyring that uses ``pending`` and still accepts the former secret."""
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
            entry for entry in ring.admitted if entry.node not in {member.node for member in pending.evicted}
        ),
    )
    if ring.open:
        # The cluster was open: it becomes established and closed. Its former members prove nothing.
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
    """Return the keyring after an unfinished change: only the secret in use is accepted."""
    return replace(ring, old=(), pending=None)


def seen(ring: Keyring, live: Iterable[tuple[str, str]]) -> Keyring:
    """Return the keyring with the live machines (id, name) added to its members."""
    names = {member.node: member.name for member in ring.members}
    refused = ring.refused
    news = [
        KeyringMember(node, name) for node, name in live if names.get(node) != name and node not in refused
    ]
    return replace(ring, members=merged(news, ring.members)) if news else ring


def merged(
    *lists: Iterable[KeyringMember], without: Iterable[KeyringMember] = ()
) -> tuple[KeyringMember, ...]:
    """Return all machines of ``lists`` once, as named in the earliest list, except those ``without``."""
    gone = {member.node for member in without}
    found: dict[str, KeyringMember] = {}
    for member in (member for members in lists for member in members):
        if member.node not in gone:
            found.setdefault(member.node, member)
    return tuple(found.values())[:MAX_MEMBERS]


def caught_up(ring: Keyring, fetched: Keyring) -> Keyring:
    """Return the keyring of a node that was away, updated by one fetched from a member: its history stays."""
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
    """Whether a change of the secret is in progress here, or was interrupted."""
    return bool(ring.old) or ring.pending is not None


def _pending(order: SecretOrder) -> Pending:
    return Pending(order.secret, order.generation, order.founder, order.members, order.evicted)
