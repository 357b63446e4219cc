"""Real daemons for tests, each in its own network namespace or on its own loopback address.

    with Cluster(3, folder, llama, memory="400 MB") as cluster:
        cluster.together()
        reply = cluster[1].ask("POST", "/api/chat", {...})

All processes of a cluster end with it, also children of killed daemons.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sollold.engines.install.find import Llama
from tests import netns

HTTP, PEER = 11435, 11436
MARK = "TESTED_NODE"
"""Environment variable with the node's folder, set for each daemon and inherited by its children."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def until(condition: Callable[[], Any], what: str, timeout: float = 60, step: float = 0.05) -> Any:
    """Poll a condition until its value is true, and return that value.

    Args:
        condition: called every ``step`` seconds.
        what: what is awaited, for the error message.
        timeout: seconds.
        step: seconds.

    Raises:
        AssertionError: the condition was still false after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what}")
        time.sleep(step)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """The decoded objects of an NDJSON body."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]

    @property
    def events(self) -> list[Any]:
        """The decoded data of an SSE body's events, without ``[DONE]``."""
        found = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(data) for data in found if data.strip() != b"[DONE]"]


class _Connection(http.client.HTTPConnection):
    """A connection with a socket created in the node's network namespace."""

    def __init__(self, node: Node, timeout: float) -> None:
        super().__init__(node.address, node.http, timeout=timeout)
        self._node = node

    def connect(self) -> None:
        with self._node.network():
            self.sock = socket.create_connection((self.host, self.port), timeout=self.timeout)


class Node:
    """One daemon and the machine that it runs on."""

    def __init__(self, cluster: Cluster, index: int, settings: dict[str, Any]) -> None:
        self.cluster = cluster
        self.index = index
        self.name = f"node{index}"
        self.machine = cluster.lan[index] if cluster.lan else None
        self.address = self.machine.address if self.machine else f"127.0.0.{index + 1}"
        self.http, self.peer = (
            (HTTP, PEER) if self.machine else (cluster.port + 2 * index, cluster.port + 2 * index + 1)
        )
        self.folder = cluster.folder / self.name
        self.models = self.folder / "models"
        self.models.mkdir(parents=True)
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.small_disk = False
        self.program: tuple[str, ...] = ("-m", "sollold")
        """The arguments of the Python interpreter, before ``run``."""

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http}"

    def network(self) -> contextlib.AbstractContextManager[None]:
        """Switch the calling thread to this node's network namespace within the block."""
        return self.machine.inside() if self.machine else contextlib.nullcontext()

    def start(self) -> None:
        """Start the daemon. Does not wait until it is ready."""
        host = "0.0.0.0" if self.machine else self.address
        values: dict[str, Any] = {
            "node.name": self.name,
            "node.state_dir": self.folder / "state",
            "node.cache_dir": self.folder / "cache",
            "node.reserve": 0,
            "http.host": host,
            "http.port": self.http,
            "cluster.host": "::" if self.machine else self.address,
            "cluster.port": self.peer,
            # Nodes join without approval; joining has its own tests.
            "cluster.door": "open",
            "models.folders": self.models,
            "models.huggingface": "off",
            "ollama.enabled": "off",
            "llama.build": "off",
            "llama.server": self.cluster.llama.server,
            "llama.rpc_server": self.cluster.llama.worker,
            # Engines spin while they wait for each other: more threads than cores would slow them all down.
            "llama.threads": 1,
            # The benefit is estimated from measured speeds, which on a busy machine are unreliable.
            "placement.speculation": "off",
        }
        if not self.machine:
            seeds = [f"{node.address}:{node.peer}" for node in self.cluster.nodes if node is not self]
            values |= {"cluster.mdns": "off", "cluster.seeds": ",".join(seeds)}
        values |= self.cluster.settings | self.settings
        arguments = [sys.executable, *self.program, "run", "--config", os.devnull]
        arguments += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        with (self.folder / "log").open("ab") as log:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options |= {"start_new_session": True, "preexec_fn": _die_with_parent}
            # Inherited by the engines: it identifies those that outlive the daemon.
            options["env"] = {**os.environ, MARK: str(self.folder)}
            if self.machine:
                self.process = self.machine.popen(arguments, **options)
            else:
                self.process = subprocess.Popen(arguments, **options)

    def stop(self, timeout: float = 60) -> int:
        """Send SIGTERM, wait up to ``timeout`` seconds, and return the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL to the daemon only, not to its children."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def limit_disk(self, size: int) -> bool:
        """Mount a tmpfs of ``size`` bytes on the cache folder. Returns False if that is not possible here."""
        cache = self.folder / "cache"
        cache.mkdir(exist_ok=True)
        arguments = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(cache)]
        self.small_disk = subprocess.run(arguments, capture_output=True).returncode == 0
        return self.small_disk

    def tensors(self) -> list[Path]:
        """The files in the tensor cache of this node's workers."""
        folder = self.folder / "cache" / "tensors" / "whole"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def log(self) -> str:
        """Everything that the daemon has logged so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float = 120,
        headers: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the response, with a body that can be read as it arrives."""
        connection = _Connection(self, timeout)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float = 120,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Send a request and read the complete response."""
        with self.open(method, path, body, timeout=timeout, headers=headers) as response:
            return Reply(response.status, dict(response.headers.items()), response.read())

    def state(self) -> dict[str, Any]:
        """The decoded ``/api/cluster``; empty if the daemon does not answer."""
        try:
            reply = self.ask("GET", "/api/cluster", timeout=10)
        except OSError:
            return {}
        return reply.json if reply.status == 200 else {}

    def sees(self) -> list[str]:
        """The names of the nodes that this node considers alive, sorted."""
        return sorted(node["name"] for node in self.state().get("nodes", []))


class Cluster:
    """Nodes on one LAN. A context manager, which starts the nodes unless ``start`` is False.

    Args:
        count: number of nodes.
        folder: for the nodes' state, caches, models and logs.
        llama: the llama.cpp of all nodes.
        memory: value of ``node.memory_limit``; empty: no limit.
        settings: settings of all nodes.
        each: further settings of each node, by index.
        start: start all nodes on entry.
        loopback: use loopback addresses also where network namespaces are available.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        llama: Llama,
        *,
        memory: str = "",
        settings: dict[str, Any] | None = None,
        each: list[dict[str, Any]] | None = None,
        start: bool = True,
        loopback: bool = False,
    ) -> None:
        self.folder = folder
        self.llama = llama
        self.settings = dict(settings or {})
        if memory:
            self.settings["node.memory_limit"] = memory
        # Client libraries run in the test's own process, which only reaches loopback addresses.
        self.lan = None if loopback or netns.available() else netns.Lan(count)
        if self.lan is None and not loopback:
            print(f"cluster on loopback addresses: {netns.available()}")
        self.port = _free_range(2 * count) if self.lan is None else 0
        self._each = each or [{} for _ in range(count)]
        self._start = start
        self.nodes: list[Node] = []

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __enter__(self) -> Cluster:
        if self.lan:
            self.lan.open()
        for index, settings in enumerate(self._each):
            self.nodes.append(Node(self, index, settings))
        try:
            if self._start:
                for node in self.nodes:
                    node.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            for node in self.nodes:
                print(f"--- {node.name}\n{node.log()[-6000:]}")
        self.close()

    def close(self) -> None:
        """Stop all daemons and their children, and remove the LAN."""
        for node in self.nodes:
            if node.process and node.process.poll() is None:
                node.process.terminate()
        for node in self.nodes:
            if node.process:
                try:
                    node.process.wait(20)
                except subprocess.TimeoutExpired:
                    node.process.kill()
                    node.process.wait(10)
        for node in self.nodes:
            _end_children(node.folder)
            if node.small_disk:
                subprocess.run(["umount", "-l", str(node.folder / "cache")], capture_output=True)
        if self.lan:
            self.lan.close()

    def together(self, timeout: float = 60) -> None:
        """Wait until all running nodes know each other's llama.cpp builds and agree on the leader."""
        running = [node for node in self.nodes if node.process and node.process.poll() is None]

        def agreed() -> bool:
            states = [node.state() for node in running]
            return (
                all(
                    len([node for node in state.get("nodes", []) if node["build"]]) == len(running)
                    and state["leader"]
                    for state in states
                )
                and len({(state["leader"], state["term"]) for state in states}) == 1
            )

        until(agreed, f"{len(running)} nodes see each other", timeout)

    def deployments(self) -> list[dict[str, Any]]:
        """The deployments in the state of the first running node."""
        node = next(node for node in self.nodes if node.process and node.process.poll() is None)
        return list(node.state().get("deployments", []))


def _die_with_parent() -> None:
    """Called in the child before exec: have the kernel kill it when the test's process dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_range(count: int) -> int:
    """The first of ``count`` consecutive ports that are free on all addresses.

    The ports are below the ephemeral range and the search starts at a random port. Otherwise an outgoing
    connection or another test run could take the port of a daemon while it restarts.
    """
    begin = random.randrange(10_000, 28_000)
    for first in range(begin, 32_768 - count, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as link:
                    link.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports")


def _end_children(folder: Path) -> None:
    """Kill the processes that a killed daemon left: those that inherited the node's `MARK`."""
    mark = f"{MARK}={folder}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
