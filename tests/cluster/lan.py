"""Nodes without a token on loopback addresses, which found clusters by themselves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from sollold.cluster.admission.change import unsettled
from sollold.cluster.admission.keyring import Keyring
from sollold.cluster.admission.orders import secret_of
from sollold.cluster.gossip.record import Record
from sollold.cluster.net.identity import Identity
from sollold.cluster.net.node import ClusterNode
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.rpc_server import RpcServer
from sollold.control.secret_change import SecretChanges
from sollold.settings.schema import ClusterSettings
from tests.keys import key

SORTED = sorted((key(number) for number in range(5)), key=lambda one: one.node)


@dataclass
class Lan:
    """Nodes without a token, which know each other's addresses as seeds."""

    folder: Path
    door: str = "1h"
    ports: dict[int, int] = field(default_factory=dict)
    running: dict[int, ClusterNode] = field(default_factory=dict)
    changes: dict[int, SecretChanges] = field(default_factory=dict)

    async def start(self, number: int, *seeds: int, door: str = "") -> ClusterNode:
        state = self.folder / f"state{number}"
        state.mkdir(exist_ok=True)
        settings = ClusterSettings(
            host=f"127.0.0.{number + 1}",
            port=self.ports.get(number, 0),
            mdns=False,
            door=door or self.door,
            seeds=tuple(f"127.0.0.{one + 1}:{self.ports[one]}" for one in seeds),
        )
        if not (state / "node-key").exists():
            (state / "node-key").write_text(SORTED[number].private.private_bytes_raw().hex())
        own = NodeKey.load(state)
        tokens, ring = secret_of(settings, state, own.node)
        identity = Identity(own, tokens)
        record = Record(own.node, f"m{number}", 0, (), 1, 0, "0")
        peers = RpcServer(identity)
        node = ClusterNode(settings, identity, record, peers, state, ring)
        self.changes[number] = SecretChanges(node, node.calls)
        self.changes[number].register(peers)
        await node.start()
        self.ports[number] = node.port
        self.running[number] = node
        return node

    async def stop(self, number: int) -> None:
        await self.running.pop(number).close()

    def ring(self, number: int) -> Keyring:
        found = self.running[number].admission
        assert found is not None
        return found.ring

    def one(self, *numbers: int) -> bool:
        """All, or those of these numbers, are one cluster."""
        some = [self.running[number] for number in numbers or self.running]
        nodes = {node.me.node for node in some}
        return all({one.node for one in node.live()} == nodes for node in some)

    def led(self, *numbers: int) -> bool:
        """They are one cluster and agree who leads."""
        some = [self.running[number] for number in numbers or self.running]
        leaders = {node.leader().leader for node in some}
        return self.one(*numbers) and len(leaders) == 1 and leaders != {""}

    def settled(self, *numbers: int) -> bool:
        """They have one secret, and no change of it is under way."""
        rings = [self.ring(number) for number in numbers or self.running]
        return len({ring.secret for ring in rings}) == 1 and not any(map(unsettled, rings))

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.running.values()))
