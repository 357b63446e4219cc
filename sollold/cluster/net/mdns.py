"""mDNS: introduces nodes on the same LAN to each other. It does not show which nodes are alive.

Service ``_sollold._tcp.local.``, instance name = node id; TXT: ``v`` the protocol's version, ``boot`` the
boot number, ``c`` a short name of the cluster that reveals nothing about its token (RFC 6762, RFC 6763).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import TypeVar

from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.interfaces import Interface
from sollold.facts import dataclass
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.cluster")

T = TypeVar("T")

SERVICE = "_sollold._tcp.local."
_PROTOCOL = "1"
_ASK_MILLISECONDS = 3000
_MAX_INSTANCES = 256
"""Maximum instances considered; a LAN full of forged ones must not exhaust the daemon's memory."""
_MAX_UNASKED = 4096
_MAX_FOREIGN_ASKED = 12
_MAX_INTERFACES = 8
_CLOSE_SECONDS = 2.0
_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class DiscoveryStatus:
    """Status of mDNS, for ``sollold doctor``.

    Attributes:
        working: this node announces itself and listens.
        reason: why not, or empty.
        interfaces: addresses of the interfaces used.
        found: nodes of this cluster seen so far; ``foreign``: number of other clusters' nodes announced now.
        unlike: IP addresses of nodes announced now by another release.
    """

    working: bool
    reason: str
    interfaces: tuple[str, ...]
    found: tuple[str, ...]
    foreign: int
    unlike: tuple[str, ...] = ()


class Discovery:
    """Announces this node and looks for others.

    Args:
        node, boot: included in the announcement.
        clusters: names of the cluster; the first is announced, nodes that announce any of them belong to it.
        port: the port for nodes.
        found: called with an announced node's id and addresses; also with our own id of another process.
        ipv6: this node listens on IPv6 as well, so IPv6 is used for mDNS too.
        named: interfaces named by the settings; empty: none, all are used.
        https: announce that clients must use HTTPS.
    """

    def __init__(
        self,
        *,
        node: str,
        boot: int,
        clusters: Sequence[str],
        port: int,
        found: Callable[[str, tuple[Address, ...]], None],
        ipv6: bool,
        named: Sequence[str],
        https: bool = False,
    ) -> None:
        self._node = node
        self._boot = boot
        self._clusters = tuple(clusters)
        self._port = port
        self._found = found
        self._ipv6 = ipv6
        self._named = tuple(named)
        self._extra = {"https": "1"} if https else {}
        self._interfaces: tuple[str, ...] = ()
        self._reason = "not started"
        self._seen: dict[str, tuple[Address, ...]] = {}
        self._foreign: dict[str, tuple[Address, ...]] = {}
        self._unlike: dict[str, str] = {}
        self._wanted: tuple[str, ...] | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._unasked: dict[str, Zeroconf] = {}
        """Instances to be asked once others have answered, or have not in time."""
        self._complained = False

    def status(self) -> DiscoveryStatus:
        """Return the current status."""
        return DiscoveryStatus(
            not self._reason,
            self._reason,
            self._interfaces,
            tuple(sorted(self._seen)),
            len(self._foreign),
            tuple(sorted(self._unlike.values())),
        )

    def seen(self) -> dict[str, tuple[Address, ...]]:
        """Return the nodes of this cluster that were announced, alive or not.

        A node that withdrew its announcement, or did not renew it, has no address.
        """
        return dict(self._seen)

    def use_interfaces(self, found: Sequence[Interface]) -> None:
        """Use these interfaces from now on; the first call starts mDNS."""
        # Every joined group counts against a small system limit, so bridges of containers, which lead
        # nowhere, are left out unless there is nothing else.
        best = [interface for interface in found if interface.rank < 3] or list(found)
        wanted = tuple(interface.ipv4[0] for interface in best if interface.ipv4)[:_MAX_INTERFACES]
        if self._ipv6:
            wanted += tuple(interface.ipv6[0] for interface in best if interface.ipv6)[:_MAX_INTERFACES]
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def foreign(self) -> list[tuple[Address, ...]]:
        """Return the addresses of nodes of other clusters that are announced now; of many a random selection,
        so that forged ones do not crowd out the other sources of addresses.
        """
        found = [addresses for addresses in self._foreign.values() if addresses]
        return random.sample(found, min(len(found), _MAX_FOREIGN_ASKED))

    def announces(self, nodes: Container[str]) -> bool:
        """Whether one of these nodes is announced now as a member of another cluster."""
        return any(node in nodes for node in self._foreign)

    def change_clusters(self, clusters: Sequence[str]) -> None:
        """Change the names of this node's cluster: it joined another one, or its own got more names."""
        before, self._clusters = self._clusters, tuple(clusters)
        if before[0] == self._clusters[0]:
            return
        self._seen.clear()
        self._foreign.clear()
        self._changed.set()

    async def close(self) -> None:
        """Withdraw the announcement and stop."""
        await cancel_and_wait(self._task)
        self._task = None
        self._reason = "stopped"

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            wanted = self._wanted or ()
            if not wanted:
                named = f"none of {', '.join(self._named)} (cluster.interfaces)" if self._named else ""
                address = "address usable by other nodes (fe80:: is not)" if self._ipv6 else "IPv4 address"
                self._reason = f"{named or 'no network interface'} has an {address}"
                await self._changed.wait()
                continue
            try:
                await self._work(wanted)
            except Exception as error:
                # Whatever fails here (no multicast, no route, another responder on the port), the other two
                # sources of addresses keep working.
                self._reason = f"mDNS does not work here: {error or type(error).__name__}"
                if not self._complained:
                    self._complained = True
                    log.warning("%s; seeds and remembered peers are used", self._reason)
                await sleep_until_set(self._changed, _RETRY_SECONDS)

    async def _work(self, addresses: tuple[str, ...]) -> None:
        """Announce and browse on ``addresses`` until the interfaces change.

        Everything is recreated then: an existing browser takes seconds to notice what a new one receives
        at once.
        """
        zeroconf, used = _opened(addresses)
        browser: AsyncServiceBrowser | None = None
        try:
            info = AsyncServiceInfo(
                SERVICE,
                f"{self._node}.{SERVICE}",
                port=self._port,
                server=f"{self._node}.local.",
                parsed_addresses=list(addresses),
                properties={"v": _PROTOCOL, "boot": f"{self._boot:x}", "c": self._clusters[0], **self._extra},
            )
            browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._on_change])
            # Node ids are unique, so the name is not probed first: that takes seconds.
            announced = await zeroconf.async_register_service(info, cooperating_responders=True)
            self._interfaces, self._reason = used, ""
            self._complained = False
            log.info("mDNS works on %s", ", ".join(used))
            await announced
            await self._changed.wait()
        finally:
            asking, self._asking = self._asking, {}
            self._unasked.clear()
            for task in asking.values():
                task.cancel()
            self._interfaces = ()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    if browser is not None:
                        await browser.async_cancel()
                    await zeroconf.async_close()

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Handle a change; called on the loop by zeroconf. Must not wait or raise."""
        node = name.removesuffix("." + SERVICE)
        if state_change is ServiceStateChange.Removed:
            self._unasked.pop(name, None)
            if node in self._seen:
                self._seen[node] = ()
            self._foreign.pop(node, None)
            self._unlike.pop(node, None)
            return
        if name not in self._asking and len(self._asking) + len(self._unasked) < _MAX_UNASKED:
            # Zeroconf reports an instance once: those of a flood of forged ones must not displace a node.
            self._unasked[name] = zeroconf
            self._ask_next()

    def _ask_next(self) -> None:
        while self._unasked and len(self._asking) < _MAX_INSTANCES:
            name = next(iter(self._unasked))
            zeroconf = self._unasked.pop(name)
            work = self._ask(zeroconf, name, name.removesuffix("." + SERVICE))
            task = self._asking[name] = asyncio.get_running_loop().create_task(work)
            task.add_done_callback(partial(self._asked, name))

    def _asked(self, name: str, task: asyncio.Task[None]) -> None:
        if self._asking.get(name) is task:
            del self._asking[name]
            self._ask_next()

    async def _ask(self, zeroconf: Zeroconf, name: str, node: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(zeroconf, _ASK_MILLISECONDS):
                return
            properties = info.decoded_properties
            if not info.port:
                return
            version = IPVersion.All if self._ipv6 else IPVersion.V4Only
            addresses = tuple((ip, info.port) for ip in info.parsed_scoped_addresses(version))[:8]
            if properties.get("v") != _PROTOCOL:
                if addresses:
                    _note(self._unlike, node, addresses[0][0])
                return
            self._unlike.pop(node, None)
            if properties.get("c") not in self._clusters:
                if node != self._node:
                    _note(self._foreign, node, addresses)
                return
            if node == self._node and properties.get("boot") == f"{self._boot:x}":
                return
            if not addresses:
                return
            self._foreign.pop(node, None)
            if node != self._node:
                _note(self._seen, node, addresses)
            self._found(node, addresses)
        except Exception as error:
            log.debug("the announcement %s is invalid: %s", name, error)


def _note(table: dict[str, T], node: str, value: T) -> None:
    """Note what ``node`` announces. If there are too many, one is forgotten that withdrew, else a random one:
    those that came first may all be forged.
    """
    if node not in table and len(table) >= _MAX_INSTANCES:
        withdrawn = [other for other, addresses in table.items() if not addresses]
        del table[random.choice(withdrawn or list(table))]
    table[node] = value


def _opened(addresses: tuple[str, ...]) -> tuple[AsyncZeroconf, tuple[str, ...]]:
    """Open multicast on ``addresses``. Returns also those used: without IPv6 if that fails here.

    Raises:
        OSError: it fails with IPv4 too.
    """
    ipv4 = tuple(address for address in addresses if ":" not in address)
    if ipv4 != addresses:
        version = IPVersion.All if ipv4 else IPVersion.V6Only
        try:
            return AsyncZeroconf(interfaces=list(addresses), ip_version=version), addresses
        except (OSError, RuntimeError) as error:
            if not ipv4:
                raise
            log.info("mDNS does not work over IPv6 here: %s", error)
    return AsyncZeroconf(interfaces=list(ipv4), ip_version=IPVersion.V4Only), ipv4
