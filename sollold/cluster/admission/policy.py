"""Decides which node asks which to be admitted. Pure.

Every node founds a cluster at its first start, and may give it up for another.

Two clusters in their first hour merge: a node that is alone asks a cluster with several nodes, and otherwise
the nodes of the cluster whose founder has the higher id ask the other one, each for itself. So founders that
start at the same moment form one cluster, whatever they see of each other first. After its first hour a
cluster is established: its nodes do not ask, and only nodes that are still alone, in their own first hour,
ask it.

A node that was away while the secret changed fetches it from any known member of its own cluster that
announces a later generation. If a partitioned cluster changed it on both sides, the greater of the two
cluster names wins.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container
from typing import Annotated

from msgspec import Meta

from sollold.cluster.admission.keyring import DisplayName, Founder, Generation, Keyring, NodeId
from sollold.cluster.net.identity import Tokens
from sollold.facts import dataclass

FIRST_HOUR = 3600.0
"""Seconds for which a new cluster may still join another."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Everything that a node reveals to a stranger.

    Attributes:
        cluster: short name of its cluster, which reveals nothing about the secret.
        founder: id of the node that founded it.
        age: seconds since then.
        alone: it has admitted no other node, and was not admitted itself.
        open: it admits any machine that asks.
        generation: generation of its cluster's secret.
    """

    node: NodeId
    name: DisplayName
    cluster: Annotated[str, Meta(max_length=64)]
    founder: Founder
    age: float
    alone: bool
    open: bool
    generation: Generation = 0

    @property
    def young(self) -> bool:
        """Whether its cluster is in its first hour."""
        return 0 <= self.age < FIRST_HOUR


def standing_of(ring: Keyring, node: str, name: str, open: bool) -> Standing:
    """Return the standing of the node with this keyring. ``open``: it admits any machine that asks."""
    cluster = Tokens.read(ring.secret).cluster
    return Standing(node, name, cluster, ring.founder, ring.age(), ring.alone, open, ring.generation)


def asks(own: Standing, other: Standing, waits_at: str = "") -> bool:
    """Whether this node must ask that one to be admitted.

    Args:
        waits_at: founder of the cluster that this node already asked and that has not admitted it yet; its
            secret, and so its name, may have changed since.
    """
    if other.cluster == own.cluster:
        return False
    if own.young and other.young:
        if own.alone != other.alone:
            return own.alone
        return other.founder < own.founder
    return own.alone and (own.young or (bool(waits_at) and other.founder == waits_at))


def behind(own: Standing, other: Standing, known: Container[str]) -> bool:
    """Whether this node's secret is outdated and that node, a known member, has the current one."""
    if other.founder != own.founder or other.cluster == own.cluster or other.node not in known:
        return False
    return (other.generation, other.cluster) > (own.generation, own.cluster)


def preferred(standings: list[Standing]) -> Standing:
    """Return the best one to ask: in an established cluster, else in the one that others will join too.

    Within a cluster a node with the latest secret: others were away, or evicted.
    """
    return min(standings, key=lambda s: (s.young, s.alone, s.founder, -s.generation, s.node))


def code_of(public: bytes) -> str:
    """Return eight letters and digits derived from a node's public key, to be compared by eye."""
    code = base64.b32encode(hashlib.sha256(b"sollold code" + public).digest()[:5]).decode()
    return f"{code[:4]}-{code[4:]}"
