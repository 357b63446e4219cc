"""Invitations: a code, typed in at a machine, admits it, for example where multicast does not reach it.

The newcomer connects with ALPN ``sollold-invited`` and presents no certificate; the handshake proves the
member's key to it, and its own key signs the exchange. Messages are framed: `Opening`, `Reply`, `Proof`,
`Outcome`. The newcomer proves first that it knows the code, so a wrong one costs a try, and an eavesdropper
or an impostor of the member gets at most one guess.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from sollold.cluster.admission.exchange import MAX_ANSWER_BYTES, Answer, applicant, decoded
from sollold.cluster.admission.keyring import DisplayName
from sollold.cluster.admission.pake import (
    MESSAGE_BYTES,
    PROOF_BYTES,
    Agreed,
    BadExchange,
    Side,
    new_code,
    plain_code,
    same,
)
from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.record_check import printable_name
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.framing import HEADER, frame
from sollold.cluster.net.identity import INVITED, peer_key_of
from sollold.cluster.net.node_key import NodeKey, id_of_key
from sollold.cluster.net.open_sockets import literal
from sollold.cluster.net.rpc import PeerError
from sollold.facts import dataclass
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

T = TypeVar("T")

INVITATION_SECONDS = 600.0
TRIES = 3
"""Wrong codes after which an invitation is withdrawn from an address: a stranger there must not use up the
tries of the machine that was invited."""
_MAX_WRONG = 3 * TRIES
"""The same from all addresses together, after which it is withdrawn from all."""
_MAX_EXCHANGES = 30
"""Maximum exchanges started with one invitation, even without a try: each costs computing time."""
_MAX_PER_ADDRESS = 10
"""Maximum exchanges started from one address."""
_MAX_CONCURRENT = 16
_MAX_CONCURRENT_EACH = 4
"""Maximum concurrent newcomers, in total and per address."""
_MAX_BYTES = 4096
_TIMEOUT = 15.0
_CONNECT_SECONDS = 5.0
_SHOWN_SECONDS = 600.0
"""Seconds for which the withdrawal of an invitation is shown."""

Proved = Annotated[bytes, Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]


class InvitationVerdict(StrEnum):
    """Result of a request."""

    OPEN = "open"
    """There is an invitation: continue."""
    NONE = "none"
    """No invitation is open here."""
    WRONG = "wrong"
    """The code is wrong."""
    EVICTED = "evicted"
    """An admin evicted this machine; it must be admitted by an admin again."""
    ADMITTED = "admitted"


class Opening(msgspec.Struct, frozen=True, array_like=True):
    """The newcomer's first message: its public key, display name and SPAKE2 message."""

    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    name: DisplayName
    message: Annotated[bytes, Meta(min_length=MESSAGE_BYTES, max_length=MESSAGE_BYTES)]


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The member's response: its name, and with OPEN its SPAKE2 message."""

    verdict: InvitationVerdict
    name: DisplayName
    message: Annotated[bytes, Meta(max_length=MESSAGE_BYTES)] = b""


class Proof(msgspec.Struct, frozen=True, array_like=True):
    """The newcomer's proof that it knows the code and owns its key, which signs `signed_content`."""

    proof: Proved
    signature: Annotated[bytes, Meta(max_length=64)]


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """The result: with ADMITTED the member's proof and a sealed `Answer`, with WRONG the remaining tries."""

    verdict: InvitationVerdict
    tries: Annotated[int, Meta(ge=0, le=TRIES)] = 0
    proof: Annotated[bytes, Meta(max_length=PROOF_BYTES)] = b""
    sealed: Annotated[bytes, Meta(max_length=MAX_ANSWER_BYTES)] = b""


def signed_content(member: bytes, opening: bytes, reply: bytes) -> bytes:
    """Return what the newcomer signs: the member's public key, and both SPAKE2 messages."""
    return b"sollold invited 1" + member + opening + reply


@dataclass(slots=True)
class Invitation:
    """A code and its uses, by address. ``until``: expiry on the monotonic clock."""

    code: str
    until: float
    wrong: Counter[str] = field(default_factory=Counter)
    begun: Counter[str] = field(default_factory=Counter)

    @property
    def tries(self) -> int:
        """Remaining wrong codes, from all addresses together."""
        return _MAX_WRONG - self.wrong.total()

    def tries_from(self, address: str) -> int:
        """Return the remaining wrong codes from an address."""
        return min(TRIES - self.wrong[address], self.tries)

    def valid(self, now: float, address: str) -> bool:
        """Whether its code still admits, in an exchange that has begun."""
        return now < self.until and self.tries_from(address) > 0

    def usable(self, now: float) -> bool:
        """Whether another exchange may begin, at least from some addresses."""
        return now < self.until and self.tries > 0 and self.begun.total() < _MAX_EXCHANGES

    def usable_from(self, now: float, address: str) -> bool:
        """Whether another exchange may begin from an address."""
        return self.usable(now) and self.valid(now, address) and self.begun[address] < _MAX_PER_ADDRESS


class Invitations:
    """The member's side: at most one invitation at a time.

    Args:
        key, name: this node's key and name.
        let_in: admits a machine (id, name) that knew the code; returns the answer with the secret.
        refused: whether a node was evicted.
        changed: called when `shown` changed.
    """

    def __init__(
        self,
        key: NodeKey,
        name: str,
        *,
        let_in: Callable[[str, str], Answer],
        refused: Callable[[str], bool],
        changed: Callable[[], None],
    ) -> None:
        self._key = key
        self._name = name
        self._let_in = let_in
        self._refused = refused
        self._changed = changed
        self._invitation: Invitation | None = None
        self._withdrawn = 0.0
        self._speaking: Counter[str] = Counter()
        """Number of connected newcomers by address."""
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Withdraw the invitation."""
        self._invitation = None
        if self._timer is not None:
            self._timer.cancel()

    def invite(self) -> str:
        """Return a new code; an unused former one becomes invalid."""
        code = new_code()
        self._invitation = Invitation(plain_code(code), time.monotonic() + INVITATION_SECONDS)
        self._withdrawn = 0.0
        log.info("an invitation is open for %.0f minutes", INVITATION_SECONDS / 60)
        self._tell_later(INVITATION_SECONDS)
        return code

    @property
    def shown(self) -> str:
        """An open or recently withdrawn invitation, as the end of a sentence; empty if there is none."""
        invitation = self._open()
        if invitation is not None:
            expiry = time.strftime("%H:%M", time.localtime(time.time() + invitation.until - time.monotonic()))
            tries = f"{invitation.tries} tries" if invitation.tries > 1 else "one try"
            return f"has an invitation open until {expiry}, with {tries} left"
        if time.monotonic() < self._withdrawn:
            return f"withdrew an invitation after {_MAX_WRONG} wrong codes"
        return ""

    def _open(self) -> Invitation | None:
        invitation = self._invitation
        return invitation if invitation is not None and invitation.usable(time.monotonic()) else None

    def _tell_later(self, seconds: float) -> None:
        """Report that `shown` changed, now and again after ``seconds``."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds + 0.1, self._changed)
        self._changed()

    def accept(self) -> asyncio.Protocol:
        """Return the protocol for one newcomer."""
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(_MAX_BYTES), self._serve)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        address = literal(peer)[0] if peer else ""
        self._speaking[address] += 1
        try:
            if self._speaking[address] > _MAX_CONCURRENT_EACH or self._speaking.total() > _MAX_CONCURRENT:
                return
            # A newcomer that disconnects, sends invalid data or takes too long gets nothing.
            with contextlib.suppress(OSError, EOFError, TimeoutError, BadExchange, *UNDECODABLE):
                async with asyncio.timeout(_TIMEOUT):
                    await self._speak(reader, writer, address)
        finally:
            self._speaking[address] -= 1
            self._speaking += Counter()  # drops the addresses without a connection
            writer.close()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        opening = await _read(reader, Opening)
        invitation = self._invitation
        if invitation is None or not invitation.usable_from(time.monotonic(), address):
            await _write(writer, Reply(InvitationVerdict.NONE, self._name))
            return
        invitation.begun[address] += 1
        if invitation.begun.total() == _MAX_EXCHANGES:
            log.warning("the invitation is withdrawn after %d connections", _MAX_EXCHANGES)
            self._changed()
        public = self._key.public

        def respond() -> tuple[bytes, Agreed]:
            side = Side(invitation.code, opening.key, public, joins=False)
            return side.message, side.finish(opening.message)

        message, agreed = await asyncio.to_thread(respond)
        await _write(writer, Reply(InvitationVerdict.OPEN, self._name, message))
        proof = await _read(reader, Proof)
        node, content = id_of_key(opening.key), signed_content(public, opening.message, message)
        proved = self._key.verify(node, opening.key, proof.signature, content)
        if self._invitation is not invitation or not invitation.valid(time.monotonic(), address):
            outcome = Outcome(InvitationVerdict.NONE)
        elif proved and same(proof.proof, agreed.newcomer):
            outcome = self._right(node, printable_name(opening.name) or node, agreed)
        else:
            outcome = self._wrong(invitation, node, printable_name(opening.name) or node, address)
        await _write(writer, outcome)

    def _wrong(self, invitation: Invitation, node: str, name: str, address: str) -> Outcome:
        """Count a wrong code."""
        invitation.wrong[address] += 1
        remaining = invitation.tries_from(address)
        log.warning("%s (%s) at %s tried a wrong code, %d tries left", name, node, address, remaining)
        if not invitation.tries:
            log.warning("the invitation is withdrawn after %d wrong codes", _MAX_WRONG)
            self._withdrawn = time.monotonic() + _SHOWN_SECONDS
        self._tell_later(_SHOWN_SECONDS if self._withdrawn else invitation.until - time.monotonic())
        return Outcome(InvitationVerdict.WRONG, remaining)

    def _right(self, node: str, name: str, agreed: Agreed) -> Outcome:
        """Admit a machine that knew the code."""
        if self._refused(node):
            return Outcome(InvitationVerdict.EVICTED)
        self._invitation = None
        answer = self._let_in(node, name)
        self._changed()
        return Outcome(
            InvitationVerdict.ADMITTED, 0, agreed.member, agreed.seal(msgspec.msgpack.encode(answer))
        )


@dataclass(frozen=True, slots=True)
class Invited:
    """Result of using a code.

    Attributes:
        node, name: the member that was asked; ``address``: its address.
        tries: remaining tries, with WRONG. ``answer``: set with ADMITTED.
    """

    verdict: InvitationVerdict
    node: str
    name: str
    address: Address
    tries: int = 0
    answer: Answer | None = None


async def use_code(reach: Dialer, key: NodeKey, name: str, code: str, hosts: Sequence[Address]) -> Invited:
    """Ask the member at ``hosts`` to be admitted by ``code``, as returned by `plain_code`.

    Raises:
        PeerError: it does not respond there, or not correctly, or does not know the code itself.
        TimeoutError: it took too long.
    """
    async with asyncio.timeout(_TIMEOUT):
        connection, member, address = await reach.connect(
            "", INVITED, applicant, timeout=_CONNECT_SECONDS, addresses=hosts
        )
        try:
            if member == key.node:
                raise PeerError(member, "that is this machine itself", transport=True)
            public = peer_key_of(connection.transport.get_extra_info("ssl_object"))
            side = await asyncio.to_thread(Side, code, key.public, public, joins=True)
            opening = Opening(key.public, printable_name(name), side.message)
            reply = decoded(await connection.exchange(msgspec.msgpack.encode(opening)), Reply)
            shown = printable_name(reply.name) or member
            if reply.verdict is not InvitationVerdict.OPEN:
                return Invited(reply.verdict, member, shown, address)
            agreed = await asyncio.to_thread(side.finish, reply.message)
            signature = key.sign(signed_content(public, side.message, reply.message))
            proof = msgspec.msgpack.encode(Proof(agreed.newcomer, signature))
            outcome = decoded(await connection.exchange(proof), Outcome)
            if outcome.verdict is not InvitationVerdict.ADMITTED:
                return Invited(outcome.verdict, member, shown, address, outcome.tries)
            if not same(outcome.proof, agreed.member):
                raise PeerError(member, "it does not know the code itself", transport=True)
            answer = decoded(agreed.unseal(outcome.sealed), Answer)
            return Invited(outcome.verdict, member, shown, address, 0, answer)
        except BadExchange as error:
            raise PeerError(member, str(error), transport=True) from None
        finally:
            connection.transport.abort()


async def _read(reader: asyncio.StreamReader, kind: type[T]) -> T:
    size = int.from_bytes(await reader.readexactly(HEADER), "big")
    if size > _MAX_BYTES:
        raise BadExchange(f"a message of {size} bytes; the limit is {_MAX_BYTES}")
    return msgspec.msgpack.decode(await reader.readexactly(size), type=kind)


async def _write(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    writer.write(frame(msgspec.msgpack.encode(message)))
    await writer.drain()
