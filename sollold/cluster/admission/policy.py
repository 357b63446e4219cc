"""Who asks whom to be admitted. Every node founds a cluster at its first start, and gives it up for another.

Pure. Two clusters in their first hour become one: a node that is alone asks where several are, and otherwise
the nodes of the one whose founder has the higher id ask at the other, each for itself. So founders that start
at the same moment become one cluster, whatever they see of each other first. After its first hour a cluster
is established: its nodes ask nobody, and only a node that is still alone, in its own first hour, asks there.

A node that was away while the secret was changed fetches it at any machine that it knows as a member of its
own cluster, and that tells of a later generation. Where a cluster that was cut in two changed it on both
sides, the greater of the two names stays.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container

from sollold.cluster.admission.keyring import Generation, Keyring
from sollold.cluster.net.identity import Tokens
from sollold.facts import dataclass

FIRST_HOUR = 3600.0
"""Seconds in which a cluster may still become part of another."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node tells a stranger, and no more.

    Attributes:
        cluster: short name of its cluster, which tells nothing of the secret.
        founder: id of the node that founded it.
        age: seconds since then.
        alone: it has admitted nobody, and was not admitted itself.
        open: it admits whoever asks.
        generation: of its cluster's secret.
    """

    node: str
    name: str
    cluster: str
    founder: str
    age: float
    alone: bool
    open: bool
    generation: Generation = 0

    @property
    def young(self) -> bool:
        """Whether its cluster is in its first hour."""
        return 0 <= self.age < FIRST_HOUR


def standing_of(ring: Keyring, node: str, name: str, open: bool) -> Standing:
    """What the node with this keyring tells. ``open``: it admits whoever asks."""
    cluster = Tokens.read(ring.secret).cluster
    return Standing(node, name, cluster, ring.founder, ring.age(), ring.alone, open, ring.generation)


def asks(mine: Standing, theirs: Standing, waits_at: str = "") -> bool:
    """Whether this node asks that one to be admitted.

    Args:
        waits_at: the cluster that this node asked already, and that has not admitted it yet.
    """
    if theirs.cluster == mine.cluster:
        return False
    if mine.young and theirs.young:
        if mine.alone != theirs.alone:
            return mine.alone
        return theirs.founder < mine.founder
    return mine.alone and (mine.young or theirs.cluster == waits_at)


def behind(mine: Standing, theirs: Standing, known: Container[str]) -> bool:
    """Whether this node's secret is out of date and that node, a member it knows, has the one in use."""
    if theirs.founder != mine.founder or theirs.cluster == mine.cluster or theirs.node not in known:
        return False
    return (theirs.generation, theirs.cluster) > (mine.generation, mine.cluster)


def preferred(standings: list[Standing]) -> Standing:
    """The one of several to ask: an established cluster first, then the one that others will join too.

    Of one cluster a node with the latest secret: another was away, or evicted.
    """
    return min(standings, key=lambda one: (one.young, one.alone, one.founder, -one.generation, one.node))


def code_of(public: bytes) -> str:
    """Eight letters and digits to compare by eye, from a node's public key."""
    code = base64.b32encode(hashlib.sha256(b"sollold code" + public).digest()[:5]).decode()
    return f"{code[:4]}-{code[4:]}"
