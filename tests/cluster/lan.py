"""Nodes without a token on loopback addresses, which form clusters by themselves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from sollold.cluster.admission.admission import Admission
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

SORTED = sorted((key(number) for number in range(5)), key=lambda node_key: node_key.node)


@dataclass
class Lan:
    """Nodes without a token. ``start`` takes the numbers of the nodes that it gets as seeds."""

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
            seeds=tuple(f"127.0.0.{seed + 1}:{self.ports[seed]}" for seed in seeds),
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

    def admission(self, number: int) -> Admission:
        admission = self.running[number].admission
        assert admission is not None
        return admission

    def ring(self, number: int) -> Keyring:
        return self.admission(number).ring

    def joined(self, *numbers: int) -> bool:
        """Return whether all nodes, or those with these numbers, form one cluster."""
        some = [self.running[number] for number in numbers or self.running]
        nodes = {node.me.node for node in some}
        return all({record.node for record in node.live()} == nodes for node in some)

    def led(self, *numbers: int) -> bool:
        """Return whether they form one cluster and agree on the leader."""
        some = [self.running[number] for number in numbers or self.running]
        leaders = {node.leader().leader for node in some}
        return self.joined(*numbers) and len(leaders) == 1 and leaders != {""}

    def settled(self, *numbers: int) -> bool:
        """Return whether they share one secret and no change of it is in progress."""
        rings = [self.ring(number) for number in numbers or self.running]
        return len({ring.secret for ring in rings}) == 1 and not any(map(unsettled, rings))

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.running.values()))
