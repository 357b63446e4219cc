"""A machine on the LAN that is not a member of the cluster and attacks the members' peer port.

Each attempt returns the data received that only members may receive, which should be empty. What any stranger
may receive (the greeting, and the state of its admission) is checked and not returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from sollold.cluster.admission.exchange import (
    AdmissionState,
    Answer,
    Greeting,
    Hello,
    Request,
    request_content,
)
from sollold.cluster.gossip.packet import Dead, Left, Message, Suspect, compound, encode, head
from sollold.cluster.net.framing import frame
from sollold.cluster.net.identity import INVITED, JOIN, Identity, Tokens
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.packet_seal import Sealer

MEMBERS_ONLY = (
    "sollold-http", "sollold-tunnel", "sollold-link", "sollold-sync", "http/1.1", "h2", "nothing",
)  # fmt: skip
ASKED = (
    b"POST /call/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n\x90",
    b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /stream/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b"\0\0\0\x04%s",
    b"\x0e\x04\0\0\0\0\0\0%s",
)
NAMED = (
    b"reserve",
    b"deploy",
    b"unload",
    b"models",
    b"file",
    b"serve",
    b"record",
    b"blob",
    b"keys",
    b"rotate",
)
_QUIET = 0.3
"""Seconds of silence that end an attempt. A member has closed most connections by then."""


@dataclass(slots=True)
class Stranger:
    """Makes attempts on one member.

    Attributes:
        members: ids of all members, which are visible on the network.
        tried: number of attempts by kind.
    """

    host: str
    port: int
    members: tuple[str, ...]
    random: random.Random
    tried: Counter[str] = field(default_factory=Counter)
    key: NodeKey = field(default_factory=lambda: NodeKey(secrets.token_bytes(32)))

    async def attempt(self) -> bytes:
        """Make a random attempt and return what it received and should not have."""
        kind = self.random.choice(TRIES)
        self.tried[kind.__name__] += 1
        try:
            async with asyncio.timeout(10):
                return await kind(self)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return b""

    # --- parts

    async def exchange(self, context: ssl.SSLContext | None, *parts: bytes, name: str | None = None) -> bytes:
        """Connect, send ``parts``, and read until the member closes the connection or is silent."""
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=context, server_hostname=name if context else None
        )
        received = b""
        try:
            for part in parts:
                writer.write(part)
            with contextlib.suppress(TimeoutError):
                while piece := await asyncio.wait_for(reader.read(65536), _QUIET):
                    received += piece
        except OSError:
            pass
        finally:
            writer.transport.abort()
        return received

    def member_request(self) -> bytes:
        """Return a request that a member might send."""
        return self.random.choice(ASKED) % self.random.choice(NAMED)

    def garbage(self) -> bytes:
        return self.random.randbytes(self.random.choice((1, 4, 40, 1200, 20_000)))

    def identity(self) -> Identity:
        """Return an identity with the own key and a well-known or random secret."""
        secret = self.random.choice(("open", secrets.token_hex(32)))
        return Identity(self.key, Tokens.read(secret))


def _bare(protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    return context


async def no_certificate(stranger: Stranger) -> bytes:
    return await stranger.exchange(
        _bare(stranger.random.choice(MEMBERS_ONLY)), stranger.member_request(), stranger.garbage(), name="x"
    )


async def no_protocol(stranger: Stranger) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await stranger.exchange(context, stranger.member_request(), name="x")


async def certificate_of_another_cluster(stranger: Stranger) -> bytes:
    context = stranger.identity().client_context(stranger.random.choice(MEMBERS_ONLY), anyone=True)
    context.verify_mode = ssl.CERT_NONE
    return await stranger.exchange(context, stranger.member_request(), stranger.garbage(), name="x")


async def older_tls(stranger: Stranger) -> bytes:
    context = _bare(stranger.random.choice((JOIN, *MEMBERS_ONLY)))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return await stranger.exchange(context, stranger.member_request(), name="x")


async def plain(stranger: Stranger) -> bytes:
    # Without TLS, only a TLS alert may be received.
    received = await stranger.exchange(
        None, stranger.random.choice((stranger.member_request(), stranger.garbage()))
    )
    return b"" if len(received) < 16 else received


async def asks_like_a_member_when_joining(stranger: Stranger) -> bytes:
    """Send requests of members over the protocol for strangers."""
    return await stranger.exchange(
        _bare(stranger.random.choice((JOIN, INVITED))),
        stranger.member_request(),
        stranger.garbage(),
        name="x",
    )


async def nonsense_when_joining(stranger: Stranger) -> bytes:
    hello = frame(msgspec.msgpack.encode(Hello(1)))
    broken = bytearray(hello)
    broken[stranger.random.randrange(len(broken))] ^= 1 << stranger.random.randrange(8)
    data = stranger.random.choice(
        (bytes(broken), frame(stranger.garbage()[:4000]), b"\xff" * 9, frame(b"\xc1"), b"\0" * 400)
    )
    return _greeting(await stranger.exchange(_bare(JOIN), data, name="x"))


async def joins(stranger: Stranger) -> bytes:
    """Apply for admission, correctly or nearly so; the answer may only be that it waits."""
    context = Identity(stranger.key, Tokens.read("open")).client_context(JOIN)
    reader, writer = await asyncio.open_connection(
        stranger.host, stranger.port, ssl=context, server_hostname="x"
    )
    try:
        writer.write(frame(msgspec.msgpack.encode(Hello(stranger.random.randrange(1, 65536)))))
        greeting = msgspec.msgpack.decode(await _framed(reader), type=Greeting)
        member = writer.get_extra_info("ssl_object").peer_key
        key = stranger.random.choice((stranger.key, NodeKey(secrets.token_bytes(32))))
        name = stranger.random.choice(("pc", "node0", "\x1b[2J", "x" * 64, "a\nb", "", "\u202e"))
        number = stranger.random.choice((greeting.number, bytes(32)))
        request = Request(key.public, name, key.sign(request_content(member, number, name)))
        if stranger.random.random() < 0.3:
            request = corrupted(request, stranger.random)
        writer.write(frame(msgspec.msgpack.encode(request)))
        data = await _framed(reader)
        answer = msgspec.msgpack.decode(data, type=Answer)
        disclosed = answer.secret or answer.members or answer.evicted or answer.founder
        return (
            b"" if answer.state in (AdmissionState.WAITING, AdmissionState.BUSY) and not disclosed else data
        )
    finally:
        writer.transport.abort()


def corrupted(request: Request, random: random.Random) -> Request:
    """Return the request with one field that does not match its signature."""
    return random.choice(
        (
            lambda: msgspec.structs.replace(request, signature=bytes(64)),
            lambda: msgspec.structs.replace(request, signature=b""),
            lambda: msgspec.structs.replace(request, key=bytes(32)),
            lambda: msgspec.structs.replace(request, name=request.name[:60] + "2"),
            lambda: msgspec.structs.replace(request, key=random.randbytes(31)),
        )
    )()


async def datagrams(stranger: Stranger) -> bytes:
    """Send packets that are not sealed with the cluster's secret; none may be answered."""
    node = stranger.random.choice((stranger.key.node, *stranger.members))
    sealer = Sealer(
        (stranger.identity().tokens.accepted[0],), node=node, boot=stranger.random.getrandbits(48)
    )
    victim = stranger.random.choice(stranger.members)
    lies: tuple[Message, ...] = (
        Suspect(victim, 2**61, node), Dead(victim, 2**61, node),
        Left(victim, 2**61, stranger.random.randbytes(64)),
    )  # fmt: skip
    packets = [sealer.seal(compound(head(node, 1), [encode(lie)])) for lie in lies]
    packets += [stranger.garbage()[:1200], packets[0][:-1], b"", b"\x01" * 33, packets[0], packets[0]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.setblocking(False)
        link.connect((stranger.host, stranger.port))
        for packet in packets:
            with contextlib.suppress(BlockingIOError):
                link.send(packet)
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(link, 2000), _QUIET)
        except TimeoutError:
            return b""


async def _framed(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _greeting(received: bytes) -> bytes:
    """Return the part of ``received`` after the greeting that any stranger gets."""
    if not received:
        return b""
    length = int.from_bytes(received[:4], "big")
    msgspec.msgpack.decode(received[4 : 4 + length], type=Greeting)
    return received[4 + length :]


Try = Callable[[Stranger], Awaitable[bytes]]
TRIES: tuple[Try, ...] = (
    no_certificate, no_protocol, certificate_of_another_cluster, older_tls, plain,
    asks_like_a_member_when_joining,
    nonsense_when_joining, joins, joins, datagrams, datagrams,
)  # fmt: skip


async def try_all(strangers: list[Stranger], tries: int, concurrency: int) -> list[str]:
    """Make ``tries`` attempts on the members in turn and describe what strangers received."""
    leaks: list[str] = []
    remaining = list(range(tries))

    async def caller() -> None:
        while remaining:
            stranger = strangers[remaining.pop() % len(strangers)]
            before = stranger.tried.copy()
            if received := await stranger.attempt():
                leaks.append(f"{next(iter(stranger.tried - before), '?')} received {received[:200]!r}")

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return leaks
