"""Changes the cluster's secret while it runs: for all members, or for all but one that is evicted.

Any node accepts the command and passes it to the leader, which has every node accept the new secret, then
use it, then accept no other (`sollold.cluster.admission.change`). Nodes that are away fetch it later with
their own key. Serf's and Consul's keyrings work in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from sollold.cluster.admission.change import merged
from sollold.cluster.admission.keyring import MAX_MEMBERS, KeyringMember, Members, NodeId
from sollold.cluster.admission.orders import SecretAnswer, SecretOrder, Step
from sollold.cluster.gossip.record import Record
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import name_of, wait_until
from sollold.control.nodes import matching
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.leader.client import NotYet, retry_until_accepted

log = logging.getLogger("sollold.cluster")

_STEP_SECONDS = 3.0
_ROLL_SECONDS = 30.0
_LEAD_SECONDS = 10.0
"""Maximum seconds until this node leads, when it evicts the leader."""
_POLL_SECONDS = 0.05
_MAX_TRIES = 3
BY_SETTINGS = (
    "the secret comes from cluster.token in the settings. To change it: add a new one to cluster.old_tokens "
    "on every node and restart each, then swap the two and restart each, then remove the former and restart"
)


class ChangeKind(StrEnum):
    """Why the secret is changed."""

    ROTATE = "rotate"
    EVICT = "evict"
    SECURE = "secure"
    PARDON = "pardon"
    """An evicted node may be admitted again."""


@dataclass(frozen=True, slots=True)
class Roll:
    """Peer method ``roll`` of the leader. ``nodes``: those to evict, to pardon, or (SECURE) to keep."""

    kind: ChangeKind
    nodes: Annotated[tuple[NodeId, ...], Meta(max_length=MAX_MEMBERS)] = ()


@dataclass(frozen=True, slots=True)
class Rolled:
    """The result of a change.

    Attributes:
        refusal: why nothing was changed; empty on success. ``again``: whether a retry may succeed.
        done: nodes that use the new secret; ``away``: members that will fetch it when they are back.
        unsure: nodes that did not confirm every step; repeating the command fixes that.
    """

    refusal: str = ""
    generation: int = 0
    done: Members = ()
    away: Members = ()
    unsure: Members = ()
    again: bool = False


class SecretChanges:
    """Carries out changes of the secret if this node leads, and otherwise passes them to the leader."""

    def __init__(self, owner: ClusterNode, calls: RpcClient) -> None:
        self._owner = owner
        self._calls = calls
        self._busy = asyncio.Lock()

    def register(self, server: RpcServer) -> None:
        """Register the peer method ``roll``."""
        server.method("roll", Roll, self._on_roll)

    # Commands of an admin

    async def rotate(self) -> Rolled:
        """Give all members a new secret.

        Raises:
            Refusal: BAD_REQUEST when the settings have a token or the cluster is open; UNAVAILABLE without a
                leader.
        """
        return await self._order(Roll(ChangeKind.ROTATE))

    async def evict(self, text: str) -> tuple[KeyringMember, Rolled]:
        """Evict the node with this name or id: it loses its connections at once, and its key is refused.

        Raises:
            Refusal: as `rotate`; NOT_FOUND when no member, or several, have this name.
        """
        member = self._member(text)
        if member.node == self._owner.me.node:
            raise bad_request("a machine can't evict itself: do it on one that stays")
        return member, await self._order(Roll(ChangeKind.EVICT, (member.node,)))

    async def secure(self, nodes: Sequence[str]) -> Rolled:
        """Give an open cluster a secret, shared with these nodes (by id), and close it to all others.

        Raises:
            Refusal: BAD_REQUEST when the cluster is not open, or its leader is not among the nodes.
        """
        return await self._order(Roll(ChangeKind.SECURE, tuple(nodes)))

    async def pardon(self, node: str) -> Rolled:
        """Lift the ban on an evicted node, so that it can be admitted again.

        Raises:
            Refusal: as `rotate`.
        """
        return await self._order(Roll(ChangeKind.PARDON, (node,)))

    def members(self) -> list[dict[str, object]]:
        """Return all members with their state: here, away or evicted."""
        live = self._owner.live()
        present = {record.node for record in live}
        ring = self._owner.keyring()
        rows = [(record.node, record.name, "here") for record in live]
        if ring is not None:
            rows += [(m.node, m.name, "away") for m in ring.members if m.node not in present]
            rows += [(m.node, m.name, "evicted") for m in ring.evicted]
        return [{"node": node, "name": name, "state": state} for node, name, state in rows]

    def _member(self, text: str) -> KeyringMember:
        ring = self._owner.keyring()
        members = merged(_members(self._owner.live()), ring.members if ring is not None else ())
        found = matching(text, members, lambda m: (m.node,), lambda m: m.name)
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(m.node for m in found)
            raise Refusal(Fault.NOT_FOUND, f"several members are named {text!r}; name one by its id: {ids}")
        evicted = ring.evicted if ring is not None else ()
        if banned := matching(text, evicted, lambda m: (m.node,), lambda m: m.name):
            raise Refusal(Fault.NOT_FOUND, f"{banned[0].name} ({banned[0].node}) was evicted already")
        names = ", ".join(m.name for m in members)
        raise Refusal(Fault.NOT_FOUND, f"no member is named {text!r}; members: {names}")

    async def _order(self, roll: Roll) -> Rolled:
        """Have the leader carry out the change, retrying while the leader changes."""

        async def attempt(_: str) -> Rolled:
            self._check(roll.kind)
            leader = self._carrier(roll)
            if not leader:
                raise NotYet("the cluster has no leader right now")
            try:
                rolled = await self._calls.call(leader, "roll", roll, Rolled, timeout=_ROLL_SECONDS)
            except PeerError as error:
                raise NotYet(f"the leader could not be reached: {error}") from None
            if rolled.refusal:
                raise NotYet(rolled.refusal) if rolled.again else bad_request(rolled.refusal)
            return rolled

        return await retry_until_accepted(self._owner, attempt)

    def _check(self, kind: ChangeKind) -> None:
        ring = self._owner.keyring()
        if ring is None:
            raise bad_request(BY_SETTINGS)
        if ring.open and kind is not ChangeKind.SECURE:
            raise bad_request("this cluster is open and has no secret: sollold cluster secure")
        if not ring.open and kind is ChangeKind.SECURE:
            raise bad_request("this cluster has a secret; sollold cluster rotate changes it")

    def _carrier(self, roll: Roll) -> str:
        """Return the node that carries it out: the leader, or its successor if the leader is evicted."""
        leader = self._owner.leader().leader
        if roll.kind is not ChangeKind.EVICT or leader not in roll.nodes:
            return leader
        successors = [(r.draining, r.node) for r in self._owner.live() if r.node != leader]
        return min(successors)[1] if successors else ""

    # As the leader

    async def _on_roll(self, caller: str, roll: Roll) -> Rolled:
        if self._busy.locked():
            return Rolled("the secret is being changed; try again", again=True)
        async with self._busy:
            try:
                self._check(roll.kind)
                if self._carrier(roll) == self._owner.me.node != self._owner.leader().leader:
                    await self._become_leader(roll.nodes)
                if self._owner.leader().leader != self._owner.me.node:
                    return Rolled("this node is not the leader; try again", again=True)
                return await self._carry_out(roll)
            except Refusal as refusal:
                return Rolled(str(refusal))
            finally:
                self._owner.set_aside(frozenset())

    async def _become_leader(self, leaders: Iterable[str]) -> None:
        """Treat the leader as gone, so that this node leads and the others obey it."""
        self._owner.set_aside(frozenset(leaders))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAD_SECONDS):
                await wait_until(self._owner, lambda: self._owner.leader().leader == self._owner.me.node)

    async def _carry_out(self, roll: Roll) -> Rolled:
        order, nodes = self._prepared(roll)
        answers: dict[str, SecretAnswer | None] = {}
        for _ in range(_MAX_TRIES):
            answers = await self._step(order, nodes)
            refusals = {node: a for node, a in answers.items() if a is not None and a.refusal}
            if not refusals:
                break
            newest = max(a.generation for a in refusals.values())
            if newest < order.generation:
                node, refused = next(iter(refusals.items()))
                return Rolled(f"{nodes[node]}: {refused.refusal}")
            # An interrupted change has already used a higher generation there.
            order = replace(order, generation=newest + 1)
        else:
            return Rolled("another change of the secret is in progress; try again", again=True)
        ready = {node: nodes[node] for node, a in answers.items() if a is not None}
        if roll.kind is not ChangeKind.SECURE:  # membership of an open cluster proves nothing
            reported = [a.members for a in answers.values() if a is not None]
            order = replace(order, members=merged(order.members, *reported, without=order.evicted))
        order = replace(order, step=Step.USE)
        using = await self._step(order, ready)
        if roll.kind is ChangeKind.PARDON:
            # Only in the last step: a node that comes back may take the lead.
            remaining = tuple(m for m in order.evicted if m.node not in roll.nodes)
            order = replace(order, evicted=remaining)
        removed = await self._step(replace(order, step=Step.REMOVE), ready)
        done = {node for node in ready if _agreed(using[node])}
        unsure = {node for node in ready if not (_agreed(using[node]) and _agreed(removed[node]))}
        log.info("%s: %d nodes use generation %d of the secret", roll.kind, len(done), order.generation)
        return Rolled(
            generation=order.generation,
            done=_as_members(ready, done),
            away=tuple(m for m in order.members if m.node not in ready),
            unsure=_as_members(ready, unsure),
        )

    def _prepared(self, roll: Roll) -> tuple[SecretOrder, dict[str, str]]:
        """Return the order for the first step, and the nodes to take it, with their names by id.

        Raises:
            Refusal: BAD_REQUEST when the leader itself is not among those that stay.
        """
        ring, me = self._owner.keyring(), self._owner.me.node
        assert ring is not None
        live = {record.node: record.name for record in self._owner.live()}
        evicted, known = ring.evicted, ring.members
        if roll.kind is ChangeKind.EVICT:
            targets = [m for m in merged(_members(self._owner.live()), known) if m.node in roll.nodes]
            evicted = merged(targets, evicted)
        elif roll.kind is ChangeKind.SECURE:
            live, known = {node: name for node, name in live.items() if node in roll.nodes}, ()
        banned = {m.node for m in evicted}
        nodes = {node: name for node, name in live.items() if node not in banned}
        if me not in nodes:
            raise bad_request(f"{self._owner.me.name} leads: it must be among those that stay")
        members = merged((KeyringMember(node, name) for node, name in nodes.items()), known, without=evicted)
        founder = ring.founder or me
        secret = secrets.token_hex(32)
        order = SecretOrder(Step.INSTALL, founder, ring.newest + 1, secret, members, evicted)
        return order, nodes

    async def _step(self, order: SecretOrder, nodes: Iterable[str]) -> dict[str, SecretAnswer | None]:
        """Return each node's reply to a step; None if there was none."""
        targets = list(nodes)
        answers = await asyncio.gather(*(self._send(node, order) for node in targets))
        return dict(zip(targets, answers, strict=True))

    async def _send(self, node: str, order: SecretOrder) -> SecretAnswer | None:
        """Return the reply of ``node`` to a step, asking again while it does not know the leader yet."""
        try:
            async with asyncio.timeout(_STEP_SECONDS):
                while True:
                    answer = await self._calls.call(
                        node, "secret", order, SecretAnswer, timeout=_STEP_SECONDS
                    )
                    if not answer.again:
                        return answer
                    await asyncio.sleep(_POLL_SECONDS)
        except (PeerError, TimeoutError) as error:
            if "no call is named" in str(error):
                reason = "it runs an earlier release, which can't change its secret, or has cluster.token set"
                return SecretAnswer(reason, 0)
            log.warning("%s did not %s the new secret: %s", name_of(self._owner, node), order.step, error)
            return None


def _agreed(answer: SecretAnswer | None) -> bool:
    return answer is not None and not answer.refusal


def _members(records: Iterable[Record]) -> list[KeyringMember]:
    return [KeyringMember(record.node, record.name) for record in records]


def _as_members(names: dict[str, str], nodes: Iterable[str]) -> tuple[KeyringMember, ...]:
    return tuple(KeyringMember(node, names[node]) for node in sorted(nodes, key=lambda node: names[node]))
