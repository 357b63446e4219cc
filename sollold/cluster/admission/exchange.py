"""Admission protocol between a stranger and a member, on its own TLS connection (ALPN ``sollold-join``).

The stranger presents no certificate: the handshake proves the member's key to it, and the stranger signs
that key and a random number that the member drew for this connection. A signature made for another
connection is invalid here, so a man in the middle cannot use it: the secret goes to the key that signed.

Messages are framed. The stranger sends `Hello`, the member its `Greeting`; the stranger its `Request` or
nothing more; the member its `Answer`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, ClassVar, TypeVar, cast

import msgspec
from msgspec import Meta

from sollold.cluster.admission.keyring import DisplayName, Founder, Generation, Keyring, Members
from sollold.cluster.admission.policy import Standing
from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.record_check import printable_name
from sollold.cluster.net.acceptor import is_crowded
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.framing import FrameError, Unframer, frame
from sollold.cluster.net.identity import JOIN, peer_key_of
from sollold.cluster.net.node_key import NodeKey, id_of_key
from sollold.cluster.net.open_sockets import literal
from sollold.cluster.net.push_pull_stream import FrameClient
from sollold.cluster.net.rpc import PeerError
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

T = TypeVar("T")

_MAX_BYTES = 4096
MAX_ANSWER_BYTES = 512 * 1024
"""Maximum size of the message of a member, for which anybody may pose: an `Answer` has some hundred names."""
_TIMEOUT = 5.0
_MAX_CONNECTIONS = 64
_MAX_PER_ADDRESS = 4
"""Maximum concurrent strangers, in total and per address."""


class AdmissionState(StrEnum):
    """Result of a request."""

    ADMITTED = "admitted"
    WAITING = "waiting"
    """An admin must admit the machine."""
    EVICTED = "evicted"
    """An admin evicted the machine; it must be admitted by an admin again."""
    BUSY = "busy"
    """The member may be about to leave its cluster: try again."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The stranger's first message. ``port``: its port for nodes, so that the member can ask it in turn."""

    port: Annotated[int, Meta(ge=1, le=65535)]


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """The member's first message. ``number``: random, for this connection."""

    number: Annotated[bytes, Meta(min_length=32, max_length=32)]
    standing: Standing


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Request to be admitted: public key, display name, and a signature of `request_content`."""

    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    name: DisplayName
    signature: Annotated[bytes, Meta(max_length=64)]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The member's answer. ``secret`` (64 hex digits) and the fields after it only with ADMITTED."""

    state: AdmissionState
    secret: Annotated[str, Meta(max_length=64)] = ""
    founder: Founder = ""
    age: float = 0.0
    generation: Generation = 0
    members: Members = ()
    evicted: Members = ()
    closed: bool = False

    def keyring(self, member: str) -> Keyring:
        """Return the keyring of a node that ``member`` admitted with this answer.

        Raises:
            PeerError: it contains no secret.
        """
        if self.state is not AdmissionState.ADMITTED or re.fullmatch("[0-9a-f]{64}", self.secret) is None:
            raise PeerError(member, "its answer has no secret", transport=True)
        return Keyring(
            self.secret,
            self.founder,
            # In this order an age that is not a number counts as 0.
            time.time() - min(max(0.0, self.age), 1e12),
            alone=False,
            admitted_by=member,
            closed=self.closed,
            generation=self.generation,
            members=self.members,
            evicted=self.evicted,
        )


def request_content(member: bytes, number: bytes, name: str) -> bytes:
    """Return what the stranger signs: the member's public key, proved by TLS, the number and its own name."""
    return b"sollold join 1" + member + number + name.encode()


class Welcome(asyncio.Protocol):
    """The member's side of the protocol.

    Args:
        key: the member's key.
        standing: returns the standing that is sent to strangers.
        answer: decides on a stranger, by its public key, name and address.
        heard: called with the address that a stranger announces.
    """

    _open: ClassVar[Counter[str]] = Counter()
    """Number of connections by address."""

    def __init__(
        self,
        key: NodeKey,
        standing: Callable[[], Standing],
        answer: Callable[[bytes, str, str], Answer],
        heard: Callable[[Address], None],
    ) -> None:
        self._key = key
        self._standing = standing
        self._answer = answer
        self._heard = heard
        self._bytes = Unframer(_MAX_BYTES)
        self._number = b""
        self._address = ""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Limit the connections and start the timeout."""
        self._transport = cast(asyncio.Transport, transport)
        if peer := transport.get_extra_info("peername"):
            self._address = literal(peer)[0]
        crowded = is_crowded(self._address, Welcome._open.elements(), _MAX_PER_ADDRESS, _MAX_CONNECTIONS)
        Welcome._open[self._address] += 1
        if crowded:
            self._transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(_TIMEOUT, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        Welcome._open[self._address] -= 1
        if not Welcome._open[self._address]:
            del Welcome._open[self._address]
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Handle complete messages; abort on invalid ones."""
        assert self._transport is not None
        try:
            self._bytes.feed(data)
            while not self._transport.is_closing() and (body := self._bytes.take_message()) is not None:
                self._hear(body, self._transport)
        except (FrameError, *UNDECODABLE):
            self._transport.abort()

    def _hear(self, body: bytes, transport: asyncio.Transport) -> None:
        if not self._number:
            hello = msgspec.msgpack.decode(body, type=Hello)
            if self._address:
                self._heard((self._address, hello.port))
            self._number = secrets.token_bytes(32)
            transport.write(frame(msgspec.msgpack.encode(Greeting(self._number, self._standing()))))
            return
        request = msgspec.msgpack.decode(body, type=Request)
        content = request_content(self._key.public, self._number, request.name)
        node = id_of_key(request.key)
        if node == self._key.node or not self._key.verify(node, request.key, request.signature, content):
            transport.abort()
            return
        transport.write(frame(msgspec.msgpack.encode(self._answer(request.key, request.name, self._address))))
        transport.close()


def applicant() -> FrameClient:
    """Return the protocol of a stranger's connection to a possible member."""
    return FrameClient(MAX_ANSWER_BYTES)


async def greet(reach: Dialer, port: int, addresses: Sequence[Address]) -> tuple[Standing, Address]:
    """Return the standing of the node at ``addresses``, and its address. ``port``: our port for nodes.

    Raises:
        PeerError: no node responds there, or not correctly.
        TimeoutError: it took too long.
    """
    async with asyncio.timeout(_TIMEOUT):
        connection, found, address = await reach.connect(
            "", JOIN, applicant, timeout=3.0, addresses=addresses
        )
        try:
            greeting = decoded(await connection.exchange(msgspec.msgpack.encode(Hello(port))), Greeting)
        finally:
            connection.transport.abort()
    if greeting.standing.node != found:
        raise PeerError(found, "it reports another node's id", transport=True)
    # A stranger chose the name, which this node displays, logs and publishes.
    name = printable_name(greeting.standing.name) or found
    return replace(greeting.standing, name=name), address


async def greeted(reach: Dialer, port: int, addresses: Sequence[Address]) -> tuple[Standing, Address] | None:
    """Return the result of `greet`; None if no node responds there correctly."""
    try:
        return await greet(reach, port, addresses)
    except (PeerError, TimeoutError, OSError) as error:
        log.debug("no cluster at %s: %s", addresses, error)
        return None


async def ask(reach: Dialer, key: NodeKey, name: str, port: int, member: str, address: Address) -> Answer:
    """Ask ``member`` to be admitted.

    Raises:
        PeerError: it does not respond there, or not correctly.
        TimeoutError: it took too long.
    """
    name = printable_name(name)
    async with asyncio.timeout(_TIMEOUT):
        connection, found, _ = await reach.connect("", JOIN, applicant, timeout=3.0, addresses=(address,))
        try:
            if found != member:
                raise PeerError(member, "another node answers there", transport=True)
            greeting = decoded(await connection.exchange(msgspec.msgpack.encode(Hello(port))), Greeting)
            public = peer_key_of(connection.transport.get_extra_info("ssl_object"))
            signature = key.sign(request_content(public, greeting.number, name))
            request = msgspec.msgpack.encode(Request(key.public, name, signature))
            return decoded(await connection.exchange(request), Answer)
        finally:
            connection.transport.abort()


def decoded(body: bytes, kind: type[T]) -> T:
    """Decode a member's message.

    Raises:
        PeerError: it is not of this kind.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNDECODABLE as error:
        raise PeerError("", f"its answer is invalid: {error}", transport=True) from error
