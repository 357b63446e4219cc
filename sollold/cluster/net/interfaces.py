"""The machine's network interfaces: which lead to other machines, and which addresses to announce."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from sollold.facts import dataclass
from sollold.retry import LogAndRetry
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.cluster")

_VIRTUAL = re.compile(r"^(docker|br-|virbr|veth|vnet|vmnet|cni|flannel|cali|lxc|lxd|podman|kube|ifb|dummy)")
"""Names of interfaces that lead to this machine's containers and virtual machines."""
_TUNNELS = re.compile(r"^(tun|tap|wg|tailscale|zt|utun|ppp|ipsec|nebula)")
TUNNEL_RANK = 2
"""The rank of interfaces of VPNs; those of network cards are lower."""
_UNSTABLE_FLAGS = 0x01 | 0x08 | 0x20 | 0x40
"""Kernel flags of IPv6 addresses: temporary, duplicate, deprecated, tentative."""
_MAX_ADDRESSES = 8
_SETTLE_SECONDS = 0.5
_LOOK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that is up. ``rank``: 0 network card, 1 probably one, 2 VPN, 3 containers.

    ``networks``: networks of its IPv4 addresses, as ``10.1.2.0/24``.
    """

    name: str
    rank: int
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()


def interfaces(chosen: Sequence[str] = ()) -> tuple[Interface, ...]:
    """Return interfaces with an address, best first; never loopback. ``chosen``: only these, in this order.

    Reads system tables: do not call it on the event loop.
    """
    states = psutil.net_if_stats()
    unstable = _unstable_addresses()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        if state is None or not state.isup or (chosen and name not in chosen):
            continue
        ipv4 = tuple(addr.address for addr in addresses if addr.family == socket.AF_INET)
        ipv6 = tuple(addr.address.partition("%")[0] for addr in addresses if addr.family == socket.AF_INET6)
        ipv4 = tuple(ip for ip in ipv4 if not ipaddress.ip_address(ip).is_loopback)
        ipv6 = tuple(ip for ip in ipv6 if _tellable(ip) and ip not in unstable)
        networks = tuple(
            str(ipaddress.ip_network(f"{addr.address}/{addr.netmask}", strict=False))
            for addr in addresses
            if addr.family == socket.AF_INET and addr.address in ipv4 and addr.netmask
        )
        if ipv4 or ipv6:
            found.append(Interface(name, rank(name), ipv4, ipv6, networks))
    if chosen:
        found.sort(key=lambda interface: chosen.index(interface.name))
    else:
        found.sort(key=lambda interface: (interface.rank, interface.name))
    return tuple(found)


def rank(name: str, system: Path = Path("/sys/class/net")) -> int:
    """Return how likely an interface leads to other machines of the LAN; 0 is best."""
    if _VIRTUAL.match(name):
        return 3
    if _TUNNELS.match(name):
        return TUNNEL_RANK
    return 0 if (system / name / "device").exists() else 1


def tellable(found: Sequence[Interface], *, ipv6: bool = True) -> tuple[str, ...]:
    """Return up to 8 addresses to announce, in the order of the interfaces, IPv4 before IPv6 on each."""
    ordered: list[str] = []
    for interface in found:
        ordered += interface.ipv4
        if ipv6:
            ordered += interface.ipv6
    return tuple(dict.fromkeys(ordered))[:_MAX_ADDRESSES]


def within(address: str, networks: Sequence[str]) -> bool:
    """Whether an IPv4 address belongs to one of ``networks``."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return any(ip in ipaddress.ip_network(network) for network in networks)


def _tellable(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    # A link-local address means something only together with the reader's own interface.
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast)


def _unstable_addresses(table: Path = Path("/proc/net/if_inet6")) -> frozenset[str]:
    """Return IPv6 addresses not to announce: tentative, duplicate, deprecated or temporary (RFC 8981)."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return frozenset()
    fields = [line.split() for line in lines]
    return frozenset(
        str(ipaddress.IPv6Address(int(field[0], 16)))
        for field in fields
        if len(field) == 6 and int(field[4], 16) & _UNSTABLE_FLAGS
    )


def _all_addresses() -> frozenset[str]:
    """Return all addresses, including those of interfaces without a carrier, which keep theirs."""
    families = (socket.AF_INET, socket.AF_INET6)
    return frozenset(
        addr.address for group in psutil.net_if_addrs().values() for addr in group if addr.family in families
    )


class InterfaceWatch:
    """Reports changes: immediately where the system notifies us (Linux), else by polling every half minute.

    Args:
        chosen: names of the interfaces to watch; empty: all.
        changed: called on the loop with the interfaces, also at the start.
        lost: called after that with addresses that the machine no longer has, on any interface.
    """

    def __init__(
        self,
        chosen: Sequence[str],
        changed: Callable[[tuple[Interface, ...]], None],
        lost: Callable[[frozenset[str]], None],
    ) -> None:
        self._chosen = tuple(chosen)
        self._changed = changed
        self._lost = lost
        self._addresses: frozenset[str] = frozenset()
        self._known: tuple[Interface, ...] | None = None
        self._news = asyncio.Event()
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the interfaces, then start to watch."""
        self._listen()
        await self._look()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stop watching."""
        await cancel_and_wait(self._task)
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _listen(self) -> None:
        """Subscribe to rtnetlink(7): groups for links and for IPv4 and IPv6 addresses."""
        if not hasattr(socket, "AF_NETLINK"):
            return
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        except OSError:
            return  # not permitted here: polling has to suffice
        try:
            netlink.setblocking(False)
            netlink.bind((0, 0x1 | 0x10 | 0x100))
            asyncio.get_running_loop().add_reader(netlink.fileno(), self._drain)
        except OSError:
            netlink.close()
            return
        self._socket = netlink

    def _drain(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(OSError):
            while self._socket.recv(65536):
                pass
        self._news.set()

    async def _watch(self) -> None:
        attempt = LogAndRetry("watching the network interfaces", log)
        while True:
            await sleep_until_set(self._news, _LOOK_SECONDS if self._socket is None else 10 * _LOOK_SECONDS)
            await asyncio.sleep(_SETTLE_SECONDS)
            self._news.clear()
            with attempt:
                await self._look()

    async def _look(self) -> None:
        try:
            found = await asyncio.to_thread(interfaces, self._chosen)
            addresses = await asyncio.to_thread(_all_addresses)
        except OSError as error:
            log.warning("the network interfaces can't be read: %s", error)
            return
        if found != self._known:
            self._known = found
            self._changed(found)
        gone, self._addresses = self._addresses - addresses, addresses
        if gone:
            self._lost(gone)
