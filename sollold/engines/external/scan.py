"""LAN scan for external workers. Runs only on request, since it connects to every host of the network."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection, Iterable, Sequence

from sollold.engines.external.probe import look
from sollold.engines.external.rpc_protocol import Version
from sollold.machine.external_worker import ExternalState, ExternalWorker

PORTS = range(50052, 50056)
"""Default port of llama.cpp's workers, and the next few."""
CONNECT_SECONDS = 0.7
AT_A_TIME = 128
MOST_NETWORKS = 4
_WIDTH = 24


def hosts_beside(addresses: Iterable[str]) -> tuple[str, ...]:
    """Return the IPv4 addresses in the same /24 as each of ``addresses``, for up to `MOST_NETWORKS`. Pure."""
    networks: dict[ipaddress.IPv4Network, None] = {}
    for address in addresses:
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv4Address) and ip.is_private and not ip.is_loopback:
            networks[ipaddress.IPv4Network(f"{ip}/{_WIDTH}", strict=False)] = None
    chosen = list(networks)[:MOST_NETWORKS]
    return tuple(str(host) for network in chosen for host in network.hosts())


async def scan(
    hosts: Sequence[str], ports: Sequence[int], local: Version | None, taken: Collection[str] = ()
) -> tuple[ExternalWorker, ...]:
    """Return the workers found on ``ports`` of ``hosts``. Takes some seconds.

    Args:
        local: protocol version of the local llama.cpp; None: unknown.
        taken: addresses in use by deployments: reported as TAKEN without a probe.
    """
    targets = [(host, port) for host in hosts for port in ports]
    found: dict[tuple[str, int], ExternalWorker] = {}
    remaining = iter(targets)

    async def probe_next(wait: float) -> None:
        await asyncio.sleep(wait)
        for host, port in remaining:
            address = f"{host}:{port}"
            if address in taken:
                found[host, port] = ExternalWorker(address, ExternalState.TAKEN)
                continue
            result = await look(host, port, local, connect=CONNECT_SECONDS)
            if result.state is not ExternalState.DEAD:
                found[host, port] = result.worker(address)

    async with asyncio.TaskGroup() as group:
        # Staggered: otherwise all connections to hosts that do not exist would time out in the same moment.
        for index in range(min(AT_A_TIME, len(targets))):
            group.create_task(probe_next(index * CONNECT_SECONDS / AT_A_TIME))
    return tuple(found[target] for target in targets if target in found)
