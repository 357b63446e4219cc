"""Real daemons for tests: each on a machine of its own (a network namespace), or on a loopback address.

    with Cluster(3, folder, llama, memory="400 MB") as cluster:
        cluster.together()
        status, headers, body = cluster[1].ask("POST", "/api/chat", {...})

Everything a cluster starts ends with it, children of killed daemons too.
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
"""In the environment of a daemon and of all that it starts: its node's folder."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def until(condition: Callable[[], Any], what: str, timeout: float = 60, step: float = 0.05) -> Any:
    """Wait for a condition and return its value.

    Raises:
        AssertionError: it did not come true in time.
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
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """An NDJSON body."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]

    @property
    def events(self) -> list[Any]:
        """An SSE body's data, without ``[DONE]``."""
        found = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(data) for data in found if data.strip() != b"[DONE]"]


class _Connection(http.client.HTTPConnection):
    """A connection whose socket is made in the node's network."""

    def __init__(self, node: Node, timeout: float) -> None:
        super().__init__(node.address, node.http, timeout=timeout)
        self._node = node

    def connect(self) -> None:
        with self._node.network():
            self.sock = socket.create_connection((self.host, self.port), timeout=self.timeout)


class Node:
    """One daemon and the machine it runs on."""

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
        """What the interpreter runs."""

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http}"

    def network(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is in this node's network within the block."""
        return self.machine.inside() if self.machine else contextlib.nullcontext()

    def start(self) -> None:
        """Start the daemon; does not wait."""
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
            # Together at once: how clusters are founded is tested by itself.
            "cluster.door": "open",
            "models.folders": self.models,
            "models.huggingface": "off",
            "ollama.enabled": "off",
            "llama.build": "off",
            "llama.server": self.cluster.llama.server,
            "llama.rpc_server": self.cluster.llama.worker,
            # Engines wait busily for each other: more threads than cores would make all of them slow.
            "llama.threads": 1,
            # Whether it pays is known from speeds, which here are those of a busy machine.
            "placement.speculation": "off",
        }
        if not self.machine:
            seeds = [f"{node.address}:{node.peer}" for node in self.cluster.nodes if node is not self]
            values |= {"cluster.mdns": "off", "cluster.seeds": ",".join(seeds)}
        values |= self.cluster.settings | self.settings
        words = [sys.executable, *self.program, "run", "--config", os.devnull]
        words += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        with (self.folder / "log").open("ab") as log:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options |= {"start_new_session": True, "preexec_fn": _end_with_the_test}
            # Inherited by its engines, by which they are known when they outlive it.
            options["env"] = {**os.environ, MARK: str(self.folder)}
            if self.machine:
                self.process = self.machine.popen(words, **options)
            else:
                self.process = subprocess.Popen(words, **options)

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM and wait: a graceful end."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9 of the daemon alone; its children are left to themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def limit_disk(self, size: int) -> bool:
        """Give the cache folder a disk of its own, of ``size`` bytes; False when that can't be had here."""
        cache = self.folder / "cache"
        cache.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(cache)]
        self.small_disk = subprocess.run(words, capture_output=True).returncode == 0
        return self.small_disk

    def tensors(self) -> list[Path]:
        """The tensors that this node's workers have kept."""
        folder = self.folder / "cache" / "tensors" / "whole"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def log(self) -> str:
        """All the daemon logged so far."""
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
        """An exchange whose body is read as it comes."""
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
        """A whole exchange."""
        with self.open(method, path, body, timeout=timeout, headers=headers) as response:
            return Reply(response.status, dict(response.headers.items()), response.read())

    def state(self) -> dict[str, Any]:
        """``/api/cluster``; empty while the daemon does not answer."""
        try:
            reply = self.ask("GET", "/api/cluster", timeout=10)
        except OSError:
            return {}
        return reply.json if reply.status == 200 else {}

    def sees(self) -> list[str]:
        """Names of the nodes that this one holds alive."""
        return sorted(node["name"] for node in self.state().get("nodes", []))


class Cluster:
    """Some nodes on one LAN. A context manager; nodes are started by it unless ``start`` is False."""

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
        """End everything."""
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
        """Wait until every running node sees every other with its llama.cpp, and all agree on a leader."""
        running = [node for node in self.nodes if node.process and node.process.poll() is None]

        def agreed() -> bool:
            states = [node.state() for node in running]
            return (
                all(
                    len([one for one in state.get("nodes", []) if one["build"]]) == len(running)
                    and state["leader"]
                    for state in states
                )
                and len({(state["leader"], state["term"]) for state in states}) == 1
            )

        until(agreed, f"{len(running)} nodes see each other", timeout)

    def deployments(self) -> list[dict[str, Any]]:
        """What runs, as the first running node sees it."""
        node = next(node for node in self.nodes if node.process and node.process.poll() is None)
        return list(node.state().get("deployments", []))


def _end_with_the_test() -> None:
    """In the daemon to be: die when the test's process does, however that dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_range(count: int) -> int:
    """The first of ``count`` ports in a row that are free on every loopback address used here.

    Below those of outgoing connections, and begun anywhere: another test run on this machine would take the
    ports of a daemon that is killed and started again.
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
    """Kill what a killed daemon left: processes whose command line or folder names this cluster's."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            program = words.split(b"\0", 1)[0]
            if str(folder).encode() in words and b"llama" in program + b"rpc":
                os.kill(int(entry.name), signal.SIGKILL)
