"""A LAN of simulated machines: network namespaces with their own addresses, connected by a bridge.

The bridge has its own namespace, so the host's network is unchanged. mDNS multicast works between the
machines. Needs root and ``ip`` (iproute2); call `available` first.

    with Lan(3) as lan:
        child = lan[0].popen(["sollold", "run"])
        lan[1].cut()          # disconnect
        lan[1].restore()

On exit all processes in the namespaces are killed and the namespaces deleted, also after an error.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_FILTERS = "faults"
"""The name of the table of packet filters in a machine."""


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@cache
def available() -> str:
    """Why network namespaces can't be created here; empty if they can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "network namespaces are of Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need the command ip (iproute2)"
    name = f"sltry{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"network namespaces can't be made here: {error}"
    finally:
        _ip("netns", "delete", name, check=False)
    return ""


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Switch the calling *thread* to ``namespace`` within the block; sockets created there stay in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    original = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    target = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(target, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter the namespace {namespace}")
        try:
            yield
        finally:
            if libc.setns(original, _CLONE_NEWNET):
                os._exit(70)  # later tests would use the wrong network
    finally:
        os.close(target)
        os.close(original)


class Machine:
    """One namespace with a veth pair to the bridge.

    Attributes:
        namespace: its name for ``ip netns``.
        address: its IPv4 address.
        address6: its IPv6 address.
        port: the name of its port on the bridge.
    """

    def __init__(self, lan: Lan, index: int) -> None:
        self._lan = lan
        self.namespace = f"{lan.name}n{index}"
        self.port = f"p{index}"
        self.address = f"{lan.network}.{index + 1}"
        self.address6 = f"{lan.network6}::{index + 1:x}"
        self._children: list[subprocess.Popen[Any]] = []

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        """A command line that runs ``arguments`` in this machine."""
        # nsenter keeps the mount namespace, so /sys still shows the host, which is sufficient here.
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *map(str, arguments)]

    def popen(self, arguments: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in this machine; it has the command's own pid and is killed with the LAN."""
        options.setdefault("start_new_session", True)
        child = subprocess.Popen(self.command(arguments), **options)
        self._children.append(child)
        return child

    def run(
        self, arguments: Sequence[str | Path], *, timeout: float = 60, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this machine and wait for it."""
        options.setdefault("capture_output", True)
        options.setdefault("text", True)
        return subprocess.run(self.command(arguments), timeout=timeout, check=check, **options)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Switch the calling thread to this machine's network within the block."""
        return inside(self.namespace)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function(*arguments)`` in this machine's network, in the calling thread."""
        with self.inside():
            return function(*arguments)

    def get(self, port: int, path: str, *, timeout: float = 10, address: str = "127.0.0.1") -> bytes:
        """The body of ``http://{address}:{port}{path}``, requested from this machine.

        Raises:
            OSError: the status is not 200.
        """
        with self.inside():
            connection = socket.create_connection((address, port), timeout=timeout)
        with connection, connection.makefile("rwb") as stream:
            stream.write(f"GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            stream.flush()
            head, _, body = stream.read().partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0] + b" ":
            raise OSError(f"GET {path}: {head.splitlines()[:1]} {body[:200]!r}")
        return body

    def cut(self) -> None:
        """Disconnect the machine at the bridge: its own interface stays up."""
        _ip("-n", self._lan.bridge, "link", "set", self.port, "down")

    def restore(self) -> None:
        """Undo `cut`."""
        _ip("-n", self._lan.bridge, "link", "set", self.port, "up")

    def lose(self, percent: int) -> bool:
        """Drop this share of the packets that arrive. As `deafen`."""
        return self._drop(f"numgen random mod 100 < {percent}")

    def deafen(self, sender: Machine) -> bool:
        """Drop all packets that arrive from another machine. `receive_all` undoes it.

        Returns False if that is not possible here, since it needs ``nft`` (nftables).
        """
        (card,) = json.loads(_ip("-n", sender.namespace, "-json", "link", "show", "eth0"))
        return self._drop(f"ether saddr {card['address']}")

    def _drop(self, match: str) -> bool:
        rules = f"""
            add table netdev {_FILTERS}
            add chain netdev {_FILTERS} arriving {{ type filter hook ingress device eth0 priority 0; }}
            add rule netdev {_FILTERS} arriving {match} drop
        """
        return self.run(["nft", "-f", "-"], check=False, input=rules).returncode == 0

    def receive_all(self) -> None:
        """Undo `lose` or `deafen`."""
        self.run(["nft", "delete", "table", "netdev", _FILTERS])

    def link(self, up: bool) -> None:
        """Set the machine's own interface down or up. Going down removes its IPv6 address permanently."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up" if up else "down")

    def add_address(self, address: str) -> None:
        """Add an address such as ``10.1.2.3/24``."""
        _ip("-n", self.namespace, "address", "add", address, "dev", "eth0")

    def remove_address(self, address: str) -> None:
        """Remove an address."""
        _ip("-n", self.namespace, "address", "delete", address, "dev", "eth0")

    def add_bridge(self, name: str, address: str) -> None:
        """Add a bridge without ports, as Docker does (``docker0``, ``172.17.0.1/16``)."""
        _ip("-n", self.namespace, "link", "add", name, "type", "bridge")
        _ip("-n", self.namespace, "address", "add", address, "dev", name)
        _ip("-n", self.namespace, "link", "set", name, "up")

    def add_wire(self, other: Machine, network: str) -> None:
        """Connect ``eth1`` of both machines directly; they get the addresses .1 and .2 of ``network``."""
        _ip("-n", self.namespace, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns",
            other.namespace)  # fmt: skip
        for host, machine in enumerate((self, other), 1):
            _ip("-n", machine.namespace, "address", "add", f"{network}.{host}/24", "dev", "eth1")
            _ip("-n", machine.namespace, "link", "set", "eth1", "up")

    def _make(self) -> None:
        lan = self._lan
        _ip("netns", "add", self.namespace)
        # Both ends are created inside their namespaces, so that they never appear on the host.
        _ip("-n", lan.bridge, "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns",
            self.namespace)  # fmt: skip
        _ip("-n", lan.bridge, "link", "set", self.port, "master", "br0", "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "address", "add", f"{self.address6}/64", "dev", "eth0", "nodad")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip("-n", self.namespace, "route", "add", "default", "via", f"{lan.network}.254")

    def _end(self) -> None:
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()
        _end_namespace(self.namespace)


def _end_namespace(name: str) -> None:
    """Kill all processes in a namespace created here, then delete it."""
    deadline = time.monotonic() + 10
    while pids := _ip("netns", "pids", name, check=False).split():
        for pid in pids:
            if int(pid) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    _ip("netns", "delete", name, check=False)


class Lan:
    """A bridge with ``machines`` machines. A context manager; `open` and `close` also work without it."""

    def __init__(self, machines: int) -> None:
        if not 1 <= machines <= 200:
            raise ValueError("a LAN here has 1 to 200 machines")
        self.name = f"sl{secrets.token_hex(3)}"
        self.bridge = f"{self.name}b"
        self.network = f"10.{77 + secrets.randbelow(100)}.{secrets.randbelow(250)}"
        self.network6 = f"fd5e:{secrets.token_hex(2)}"
        self.machines = [Machine(self, index) for index in range(machines)]

    def __len__(self) -> int:
        return len(self.machines)

    def __getitem__(self, index: int) -> Machine:
        return self.machines[index]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines)

    def open(self) -> Lan:
        """Create the bridge and the machines."""
        atexit.register(self.close)
        try:
            _ip("netns", "add", self.bridge)
            _ip("-n", self.bridge, "link", "set", "lo", "up")
            # No snooping and no spanning tree, so that multicast is forwarded immediately.
            _ip("-n", self.bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            _ip("-n", self.bridge, "address", "add", f"{self.network}.254/24", "dev", "br0")
            _ip("-n", self.bridge, "link", "set", "br0", "up")
            for machine in self.machines:
                machine._make()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Kill all processes and remove the machines and the bridge. May be called more than once."""
        atexit.unregister(self.close)
        for machine in self.machines:
            machine._end()
        _ip("netns", "delete", self.bridge, check=False)

    def partition(self, *groups: Sequence[int]) -> None:
        """Split the LAN into groups of machines that reach only each other. `heal` undoes it.

        Each group gets its own bridge; machines in no group stay on the original bridge.
        """
        for number, group in enumerate(groups, 1):
            bridge = f"br{number}"
            if f"{bridge}:" not in _ip("-n", self.bridge, "-o", "link", "show", "type", "bridge"):
                _ip("-n", self.bridge, "link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
                _ip("-n", self.bridge, "link", "set", bridge, "up")
            for index in group:
                _ip("-n", self.bridge, "link", "set", self.machines[index].port, "master", bridge)

    def heal(self) -> None:
        """End a partition."""
        for machine in self.machines:
            _ip("-n", self.bridge, "link", "set", machine.port, "master", "br0")

    def __enter__(self) -> Lan:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
