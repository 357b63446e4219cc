"""RPC servers and nodes on loopback addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.settings.schema import ClusterSettings
from tests.keys import key

KEYS = (key(817), key(2), key(5), key(4))
IDS = tuple(key_.node for key_ in KEYS)
"""The first has only digits: code must not mistake it for an address."""


def pc_of(node: str) -> str:
    """The display name of a node."""
    return f"pc-{IDS.index(node)}"


@dataclass
class Pair:
    """Two RPC servers that know each other's addresses."""

    keys: tuple[NodeKey, ...] = KEYS[:2]
    where: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    peers: list[RpcServer] = field(default_factory=list)
    reach: list[Dialer] = field(default_factory=list)
    calls: list[RpcClient] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key_ in self.keys:
            identity = Identity(key_, Tokens.read(""))
            server = RpcServer(identity)
            reach = Dialer(identity, lambda wanted: self.where.get(wanted, []), pc_of)
            server.name = pc_of
            self.peers.append(server)
            self.reach.append(reach)
            self.calls.append(RpcClient(reach, server))

    async def start(self) -> None:
        for index, server in enumerate(self.peers):
            port = await server.start("127.0.0.1", 0)
            self.where.setdefault(self.keys[index].node, [("127.0.0.1", port)])

    async def close(self) -> None:
        for client in self.calls:
            await client.close()
        for server in self.peers:
            await server.close()

    def caller(self, token: str, *old_tokens: str) -> RpcClient:
        """A client with its own key and tokens that knows the servers' addresses."""
        identity = Identity(KEYS[3], Tokens.read(token, old_tokens))
        client = RpcClient(Dialer(identity, lambda node: self.where.get(node, [])), RpcServer(identity))
        self.calls.append(client)
        return client


@dataclass
class Nodes:
    """Nodes on 127.0.0.2, 127.0.0.3, … without mDNS, each with its own state folder."""

    folder: Path
    running: list[ClusterNode] = field(default_factory=list)

    def make(
        self,
        number: int,
        *seeds: ClusterNode,
        token: str = "",
        port: int = 0,
        register: Callable[[RpcServer], Any] | None = None,
        host: str = "",
    ) -> ClusterNode:
        state = self.folder / f"state{number}"
        state.mkdir(exist_ok=True)
        identity = Identity(NodeKey.load(state), Tokens.read(token))
        peers = RpcServer(identity)
        if register is not None:
            register(peers)
        settings = ClusterSettings(
            host=host or f"127.0.0.{number + 1}",
            port=port,
            mdns=False,
            seeds=tuple(f"{seed.me.addresses[0]}:{seed.port}" for seed in seeds),
        )
        record = Record(
            node=identity.node,
            name=f"m{number}",
            version=0,
            addresses=(),
            http_port=1,
            peer_port=0,
            release="0",
        )
        return ClusterNode(settings, identity, record, peers, state)

    async def start(self, number: int, *seeds: ClusterNode, **options: Any) -> ClusterNode:
        node = self.make(number, *seeds, **options)
        await node.start()
        self.running.append(node)
        return node

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.running))
