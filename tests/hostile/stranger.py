"""A machine of the LAN that is no member of the cluster and tries what it can on the members' port for nodes.

Each try returns what the member said that only members may hear: nothing, if all is well. What any stranger
may hear (the greeting, and that it waits for admission) is checked here and not returned.
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
"""Seconds of silence after which nothing more is expected; a member has ended nearly all of them by then."""


@dataclass(slots=True)
class Stranger:
    """Tries things on one member.

    Attributes:
        members: ids of all members, which anybody can see on the network.
        tried: how often each was.
    """

    host: str
    port: int
    members: tuple[str, ...]
    random: random.Random
    tried: Counter[str] = field(default_factory=Counter)
    key: NodeKey = field(default_factory=lambda: NodeKey(secrets.token_bytes(32)))

    async def one(self) -> bytes:
        """Try something; what was said that should not be."""
        kind = self.random.choice(TRIES)
        self.tried[kind.__name__] += 1
        try:
            async with asyncio.timeout(10):
                return await kind(self)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return b""

    # --- parts

    async def said(self, context: ssl.SSLContext | None, *parts: bytes, name: str | None = None) -> bytes:
        """Connect, say ``parts``, and read until the other side ends it or is quiet."""
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=context, server_hostname=name if context else None
        )
        heard = b""
        try:
            for part in parts:
                writer.write(part)
            with contextlib.suppress(TimeoutError):
                while piece := await asyncio.wait_for(reader.read(65536), _QUIET):
                    heard += piece
        except OSError:
            pass
        finally:
            writer.transport.abort()
        return heard

    def asked(self) -> bytes:
        """Something that a member might ask."""
        return self.random.choice(ASKED) % self.random.choice(NAMED)

    def garbage(self) -> bytes:
        return self.random.randbytes(self.random.choice((1, 4, 40, 1200, 20_000)))

    def identity(self) -> Identity:
        """Its own key, with a secret that anybody knows or that nobody has."""
        secret = self.random.choice(("open", secrets.token_hex(32)))
        return Identity(self.key, Tokens.read(secret))


def _bare(protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    return context


async def no_certificate(me: Stranger) -> bytes:
    return await me.said(_bare(me.random.choice(MEMBERS_ONLY)), me.asked(), me.garbage(), name="x")


async def no_protocol(me: Stranger) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await me.said(context, me.asked(), name="x")


async def certificate_of_another_cluster(me: Stranger) -> bytes:
    context = me.identity().client_context(me.random.choice(MEMBERS_ONLY), anyone=True)
    context.verify_mode = ssl.CERT_NONE
    return await me.said(context, me.asked(), me.garbage(), name="x")


async def older_tls(me: Stranger) -> bytes:
    context = _bare(me.random.choice((JOIN, *MEMBERS_ONLY)))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return await me.said(context, me.asked(), name="x")


async def plain(me: Stranger) -> bytes:
    # Without TLS there is nothing to be heard but its alert.
    heard = await me.said(None, me.random.choice((me.asked(), me.garbage())))
    return b"" if len(heard) < 16 else heard


async def asks_like_a_member_when_joining(me: Stranger) -> bytes:
    """With the protocol of strangers, but what only members may say."""
    return await me.said(_bare(me.random.choice((JOIN, INVITED))), me.asked(), me.garbage(), name="x")


async def nonsense_when_joining(me: Stranger) -> bytes:
    hello = frame(msgspec.msgpack.encode(Hello(1)))
    broken = bytearray(hello)
    broken[me.random.randrange(len(broken))] ^= 1 << me.random.randrange(8)
    data = me.random.choice(
        (bytes(broken), frame(me.garbage()[:4000]), b"\xff" * 9, frame(b"\xc1"), b"\0" * 400)
    )
    return _greeting(await me.said(_bare(JOIN), data, name="x"))


async def joins(me: Stranger) -> bytes:
    """As it should be done, or nearly: it waits, and is told nothing else."""
    context = Identity(me.key, Tokens.read("open")).client_context(JOIN)
    reader, writer = await asyncio.open_connection(me.host, me.port, ssl=context, server_hostname="x")
    try:
        writer.write(frame(msgspec.msgpack.encode(Hello(me.random.randrange(1, 65536)))))
        greeting = msgspec.msgpack.decode(await _framed(reader), type=Greeting)
        member = writer.get_extra_info("ssl_object").peer_key
        key = me.random.choice((me.key, NodeKey(secrets.token_bytes(32))))
        name = me.random.choice(("pc", "node0", "\x1b[2J", "x" * 64, "a\nb", "", "\u202e"))
        number = me.random.choice((greeting.number, bytes(32)))
        asked = Request(key.public, name, key.sign(request_content(member, number, name)))
        if me.random.random() < 0.3:
            asked = replace_one(asked, me.random)
        writer.write(frame(msgspec.msgpack.encode(asked)))
        said = await _framed(reader)
        answer = msgspec.msgpack.decode(said, type=Answer)
        told = answer.secret or answer.members or answer.evicted or answer.founder
        return b"" if answer.state in (AdmissionState.WAITING, AdmissionState.BUSY) and not told else said
    finally:
        writer.transport.abort()


def replace_one(asked: Request, random: random.Random) -> Request:
    """With one thing in it that is not what it was signed for."""
    return random.choice(
        (
            lambda: msgspec.structs.replace(asked, signature=bytes(64)),
            lambda: msgspec.structs.replace(asked, signature=b""),
            lambda: msgspec.structs.replace(asked, key=bytes(32)),
            lambda: msgspec.structs.replace(asked, name=asked.name[:60] + "2"),
            lambda: msgspec.structs.replace(asked, key=random.randbytes(31)),
        )
    )()


async def datagrams(me: Stranger) -> bytes:
    """Nothing answers a packet that is not sealed with the cluster's secret."""
    node = me.random.choice((me.key.node, *me.members))
    sealer = Sealer((me.identity().tokens.accepted[0],), node=node, boot=me.random.getrandbits(48))
    victim = me.random.choice(me.members)
    lies: tuple[Message, ...] = (
        Suspect(victim, 2**61, node), Dead(victim, 2**61, node), Left(victim, 2**61, me.random.randbytes(64)),
    )  # fmt: skip
    packets = [sealer.seal(compound(head(node, 1), [encode(lie)])) for lie in lies]
    packets += [me.garbage()[:1200], packets[0][:-1], b"", b"\x01" * 33, packets[0], packets[0]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.setblocking(False)
        link.connect((me.host, me.port))
        for packet in packets:
            with contextlib.suppress(BlockingIOError):
                link.send(packet)
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(link, 2000), _QUIET)
        except TimeoutError:
            return b""


async def _framed(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _greeting(heard: bytes) -> bytes:
    """What of ``heard`` is more than the greeting that anybody gets."""
    if not heard:
        return b""
    length = int.from_bytes(heard[:4], "big")
    msgspec.msgpack.decode(heard[4 : 4 + length], type=Greeting)
    return heard[4 + length :]


Try = Callable[[Stranger], Awaitable[bytes]]
TRIES: tuple[Try, ...] = (
    no_certificate, no_protocol, certificate_of_another_cluster, older_tls, plain,
    asks_like_a_member_when_joining,
    nonsense_when_joining, joins, joins, datagrams, datagrams,
)  # fmt: skip


async def try_all(strangers: list[Stranger], tries: int, at_once: int) -> list[str]:
    """Try ``tries`` things, each on a member by turns; what strangers were told, in words."""
    told: list[str] = []
    left = list(range(tries))

    async def caller() -> None:
        while left:
            me = strangers[left.pop() % len(strangers)]
            before = me.tried.copy()
            if heard := await me.one():
                told.append(f"{next(iter(me.tried - before), '?')} heard {heard[:200]!r}")

    await asyncio.gather(*(caller() for _ in range(at_once)))
    return told
