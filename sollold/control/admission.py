"""Admits machines to the cluster on an admin's command, and joins this one to a cluster by a code."""

from __future__ import annotations

import asyncio
from collections.abc import Container

from sollold.cluster.admission.admission import Admission
from sollold.cluster.admission.invitation import INVITATION_SECONDS, InvitationVerdict, Invited
from sollold.cluster.admission.orders import AdmitOrder, DoorOrder
from sollold.cluster.admission.pake import plain_code
from sollold.cluster.gossip.record import Record, WaitingMachine
from sollold.cluster.net.certificate_authority import authority_pem
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.seeds import Seed, resolve
from sollold.control.nodes import matching
from sollold.control.secret_change import SecretChanges
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.settings.schema import ClusterSettings

PORT = ClusterSettings().port
"""Default port for nodes."""
_CALL_SECONDS = 5.0
_NO_DOOR_TOKEN = "only machines with the cluster.token of the settings belong to this cluster"
_NO_DOOR_OPEN = "any machine may join this cluster at any time; `sollold cluster secure` ends that"


@dataclass(frozen=True, slots=True)
class Invite:
    """A new invitation. ``seed``: the address to join at; ``seconds``: how long it is valid."""

    code: str
    seed: str
    seconds: float


class AdmissionService:
    """Admits waiting machines, opens the door for a while, invites, and joins by an invitation."""

    def __init__(self, view: ClusterNode, calls: RpcClient, secret: SecretChanges) -> None:
        self._view = view
        self._calls = calls
        self.secret = secret

    def authority(self) -> str:
        """Return the certificate of the authority that signs for all nodes of the cluster, in PEM.

        Raises:
            Refusal: BAD_REQUEST while the cluster is open, since anyone could sign in its name.
        """
        tokens = self._view.tokens
        if tokens.open:
            message = "an open cluster has no authority to trust; `sollold cluster secure` gives it a secret"
            raise bad_request(message)
        return authority_pem(tokens.accepted[0])

    async def admit(self, text: str) -> WaitingMachine:
        """Admit the waiting machine with this name, id or code, at whichever node; it joins within seconds.

        Raises:
            Refusal: NOT_FOUND when none, or several, match; UNAVAILABLE when its node can't be reached.
        """
        found: dict[str, tuple[WaitingMachine, list[Record]]] = {}
        pairs = [(machine, record) for record in self._view.live() for machine in record.waiting]
        text = _as_code(text.strip(), {m.code for m, _ in pairs})
        for machine, record in matching(
            text, pairs, lambda pair: (pair[0].node, pair[0].code), lambda pair: pair[0].name
        ):
            found.setdefault(machine.node, (machine, []))[1].append(record)
        if len(found) != 1:
            raise Refusal(Fault.NOT_FOUND, self._no_match(text, [m for m, _ in found.values()]))
        ((waiting, records),) = found.values()
        if waiting.evicted:
            await self.secret.pardon(waiting.node)
        # An evicted machine may have come in through an open door by now.
        order = AdmitOrder(waiting.node)
        results = await asyncio.gather(
            *(self._call(record, "admit", order) for record in records), return_exceptions=True
        )
        # One of the nodes at which it waits is enough.
        if True in results:
            return waiting
        if fault := next((result for result in results if isinstance(result, BaseException)), None):
            raise fault
        if not waiting.evicted:
            raise Refusal(Fault.NOT_FOUND, f"{waiting.name} is no longer waiting")
        return waiting

    async def open_door(self, seconds: float) -> list[str]:
        """Admit all machines that ask any node within ``seconds``; 0 ends that. Return the nodes' names.

        Raises:
            Refusal: BAD_REQUEST when the settings have a token, or anyone may join; UNAVAILABLE when a node
                can't be reached.
        """
        ring = self._view.keyring()
        if ring is None or ring.open:
            raise bad_request(_NO_DOOR_OPEN if ring is not None else _NO_DOOR_TOKEN)
        live = self._view.live()
        results = await asyncio.gather(
            *(self._call(record, "door", DoorOrder(seconds)) for record in live), return_exceptions=True
        )
        failed = [str(r) for r in results if isinstance(r, Refusal)]
        done = [record.name for record, r in zip(live, results, strict=True) if not isinstance(r, Exception)]
        if failed:
            admitted = "are" if seconds else "are no longer"
            prefix = f"new machines {admitted} admitted at {', '.join(done)}; " if done else ""
            raise Refusal(Fault.UNAVAILABLE, f"{prefix}failed: {'; '.join(failed)}", retry_after=2.0)
        return done

    def invite(self) -> Invite:
        """Return a new code, with which one machine may join at this node.

        Raises:
            Refusal: BAD_REQUEST when the settings have a token, or anyone may join.
        """
        admission, me = self._view.admission, self._view.me
        if admission is None:
            text = (
                "the secret comes from cluster.token: put the same one into the settings of the new machine"
            )
            raise bad_request(text)
        if admission.ring.open:
            text = "any machine may join this cluster: cluster.seeds of the new machine tells it where"
            raise bad_request(text)
        host = (*me.addresses, "127.0.0.1")[0]
        port = "" if me.peer_port == PORT else f":{me.peer_port}"
        seed = f"[{host}]{port}" if ":" in host else f"{host}{port}"
        return Invite(admission.invitations.invite(), seed, INVITATION_SECONDS)

    async def join(self, code: str, seed: str) -> str:
        """Join the cluster of the member at ``seed`` by a code. Return the name of that member.

        Raises:
            Refusal: BAD_REQUEST when this machine can't join, or the code or the seed is invalid; NOT_FOUND
                when no invitation is open there; UNAVAILABLE when no member responds there.
        """
        search = self._free_admission().search
        try:
            plain, place = plain_code(code), Seed.read(seed, PORT)
        except ValueError as error:
            raise bad_request(str(error).removeprefix("cluster.seeds: ")) from None
        addresses = await resolve(place)
        if not addresses:
            raise Refusal(Fault.UNAVAILABLE, f"host name {place.host} can't be resolved", retry_after=5.0)
        try:
            invited = await search.accept(plain, addresses)
        except (PeerError, TimeoutError, OSError) as error:
            if isinstance(error, PeerError) and error.node == self._view.me.node:
                message = f"{place.host} is this machine itself: name the one that printed the code"
                raise bad_request(message) from None
            message = (
                f"no member with an invitation responds at {place.host} port {place.port} "
                f"({error or 'it took too long'}): check that sollold runs there, without cluster.token, and "
                "that its firewall lets the port through"
            )
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=5.0) from None
        return _joined(invited)

    def _free_admission(self) -> Admission:
        """Return this machine's `Admission` if it belongs to no cluster yet.

        Raises:
            Refusal: BAD_REQUEST when it belongs to one.
        """
        admission = self._view.admission
        if admission is None:
            message = "cluster.token in the settings says where this machine belongs: remove it and restart"
            raise bad_request(message)
        if admission.ring.open:
            message = (
                'this machine is in an open cluster: remove cluster.door = "open" from its settings, restart'
            )
            raise bad_request(message)
        me = self._view.me.node
        others = [r.name for r in self._view.live() if r.node != me]
        if others or not admission.ring.alone:
            names = f" with {', '.join(others)}" if others else ""
            message = (
                f"this machine is already a member of a cluster{names}. To leave it: stop sollold, delete "
                "the file keyring in its state folder, start sollold, and join again"
            )
            raise bad_request(message)
        return admission

    def _no_match(self, text: str, found: list[WaitingMachine]) -> str:
        if found:
            kind = "id" if text == found[0].code else "code"
            words = ", ".join(m.node if kind == "id" else m.code for m in found)
            return f"several machines named {text!r} wait; name one by its {kind}: {words}"
        waiting = {m.node: m for record in self._view.live() for m in record.waiting}
        names = ", ".join(sorted(f"{m.name} ({m.code})" for m in waiting.values()))
        ring = self._view.keyring()
        if ring is None or ring.open:
            hint = _NO_DOOR_OPEN if ring is not None else _NO_DOOR_TOKEN
        else:
            hint = f"waiting: {names}" if names else ""
        return f"no machine {text!r} waits for admission" + (f"; {hint}" if hint else "")

    async def _call(self, record: Record, method: str, order: AdmitOrder | DoorOrder) -> bool:
        try:
            return await self._calls.call(record.node, method, order, bool, timeout=_CALL_SECONDS)
        except PeerError as error:
            message = f"{record.name}: {error}"
            if "no call is named" in str(error):
                message = f"{record.name} has cluster.token in its settings: no machine waits there"
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=2.0) from None


def _as_code(text: str, codes: Container[str]) -> str:
    """Return ``text`` as the code that it means, if that is one of ``codes``: case and dash do not matter."""
    letters = "".join(letter for letter in text if letter.isalnum()).upper()
    code = f"{letters[:4]}-{letters[4:]}"
    return code if code in codes else text


def _joined(invited: Invited) -> str:
    """Return the name of the member that admitted this machine.

    Raises:
        Refusal: it was not admitted.
    """
    if invited.verdict is InvitationVerdict.ADMITTED:
        return invited.name
    if invited.verdict is InvitationVerdict.EVICTED:
        text = (
            f"this machine was evicted from the cluster of {invited.name}: admit it there with sollold admit"
        )
        raise bad_request(text)
    if invited.verdict is InvitationVerdict.WRONG and invited.tries:
        remaining = f"{invited.tries} tries are left" if invited.tries > 1 else "one try is left"
        raise bad_request(f"the code is wrong; {remaining}")
    if invited.verdict is InvitationVerdict.WRONG:
        text = (
            f"the code is wrong, and no more are accepted from this machine; on {invited.name} again: "
            "sollold invite"
        )
        raise bad_request(text)
    text = (
        f"no invitation is open on {invited.name}: it was used, has expired, or was made on another machine. "
        "Make a new one there: sollold invite"
    )
    raise Refusal(Fault.NOT_FOUND, text)
