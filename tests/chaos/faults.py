"""Faults injected into a running cluster; most end by themselves after some seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import MARK, Cluster, Node

SMALL_DISK = 1400 << 20
"""Bytes of a node's cache disk: slightly more than the minimum that the cache leaves free."""

STOP_SECONDS = 30.0
"""The time within which a daemon must stop; its drain limit is 3 s here."""


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was injected.

    Attributes:
        target: the affected node, or what was affected.
        hurt: nodes whose own callers may get an error or lose their connection.
        time: when it was injected, on the monotonic clock.
        undo: to be called when the other nodes have recovered; if None, the fault ended by itself.
    """

    kind: str
    target: str
    hurt: frozenset[str]
    time: float
    undo: Callable[[], None] | None = None


def engines(node: Node, program: str = "") -> list[int]:
    """Return the pids of this node's engines: ``llama-server``, ``rpc-server`` or, by default, both."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name = (entry / "cmdline").read_bytes().split(b"\0")[0]
            if not name.endswith((b"llama-server", b"rpc-server")) or program.encode() not in name:
                continue
            is_child = f"{MARK}={node.folder}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if is_child or f"{node.folder}/".encode() in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
    return pids


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Faults:
    """Chooses and injects faults at random, from one seed."""

    def __init__(self, cluster: Cluster, seed: int, *, short: bool = False, needs_all: bool = False) -> None:
        """``short``: no slow faults; ``needs_all``: only faults of whole nodes that come back."""
        self._cluster = cluster
        self._random = random.Random(seed)
        self._longest = 3.0 if short else 6.0
        self._kinds: list[Callable[[], Done | None]] = [
            self.kill_worker,
            self.kill_server,
            self.kill_daemon,
            self.truncate_cache,
            self.cut_cable,
            self.kill_leader_in_a_plan,
            self.machine_vanishes,
            self.stop_worker,
            self.restart_daemon,
            self.partition,
        ]
        if needs_all:
            self._kinds = [self.kill_daemon, self.restart_daemon, self.cut_cable, self.partition]
            if not short:
                self._kinds.append(self.flap_port)
        elif not short:
            self._kinds += [
                self.stop_server,
                self.stop_daemon,
                self.fill_cache,
                self.flap_port,
                self.lose_packets,
                self.deafen,
                self.replace_model,
            ]
        self.wrong: list[str] = []
        self._left: list[Callable[[], Done | None]] = []

    def inject_next(self) -> Done:
        """Inject the next fault. Each round uses all kinds in random order."""
        while True:
            if not self._left:
                self._left = self._random.sample(self._kinds, len(self._kinds))
            if (done := self._left.pop()()) is not None:
                return done

    def _node(self) -> Node:
        return self._random.choice(self._cluster.nodes)

    def _pause(self, least: float, most: float) -> None:
        time.sleep(self._random.uniform(least, min(most, self._longest)))

    def _engine(self, program: str) -> tuple[Node, int] | None:
        candidates = [(node, pid) for node in self._cluster for pid in engines(node, program)]
        return self._random.choice(candidates) if candidates else None

    def _signal_engine(self, program: str, number: signal.Signals, kind: str) -> Done | None:
        if (engine := self._engine(program)) is None:
            return None
        began = time.monotonic()
        _signal(engine[1], number)
        return Done(kind, engine[0].name, frozenset(), began)

    def kill_worker(self) -> Done | None:
        return self._signal_engine("rpc-server", signal.SIGKILL, "kill -9 of a worker")

    def kill_server(self) -> Done | None:
        return self._signal_engine("llama-server", signal.SIGKILL, "kill -9 of llama-server")

    def stop_worker(self) -> Done | None:
        """Suspend a worker for good; the daemon must detect it."""
        return self._signal_engine("rpc-server", signal.SIGSTOP, "SIGSTOP of a worker")

    def stop_server(self) -> Done | None:
        return self._signal_engine("llama-server", signal.SIGSTOP, "SIGSTOP of llama-server")

    def kill_daemon(self) -> Done:
        node, began = self._node(), time.monotonic()
        node.kill()
        self._pause(0.2, 3)
        node.start()
        return Done("kill -9 of a daemon", node.name, frozenset((node.name,)), began)

    def stop_daemon(self) -> Done:
        node, began = self._node(), time.monotonic()
        assert node.process is not None
        _signal(node.process.pid, signal.SIGSTOP)
        self._pause(1, 12)
        _signal(node.process.pid, signal.SIGCONT)
        return Done("SIGSTOP of a daemon", node.name, frozenset((node.name,)), began)

    def restart_daemon(self) -> Done:
        """Restart a daemon, as an upgrade does."""
        node, began = self._node(), time.monotonic()
        try:
            node.stop(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{node.name} did not stop within {STOP_SECONDS:.0f} s")
            node.kill()
        node.start()
        return Done("a daemon is restarted", node.name, frozenset((node.name,)), began)

    def cut_cable(self) -> Done | None:
        node, began = self._node(), time.monotonic()
        if node.machine is None:
            return None
        node.machine.cut()
        self._pause(1, 12)
        node.machine.restore()
        return Done("a cable is cut", node.name, frozenset((node.name,)), began)

    def flap_port(self) -> Done | None:
        """Disconnect and reconnect a machine several times, as a switch with a bad port does."""
        node, began = self._node(), time.monotonic()
        if node.machine is None:
            return None
        for _ in range(self._random.randint(2, 5)):
            node.machine.cut()
            self._pause(0.2, 2)
            node.machine.restore()
            self._pause(0.2, 2)
        return Done("a port flaps", node.name, frozenset((node.name,)), began)

    def lose_packets(self) -> Done | None:
        """Lose some of the packets that a machine gets, as with a bad cable. TCP repeats them."""
        node, began = self._node(), time.monotonic()
        if node.machine is None or not node.machine.lose(self._random.choice((5, 15, 30))):
            return None
        self._pause(3, 12)
        node.machine.receive_all()
        return Done("packets are lost", node.name, frozenset((node.name,)), began)

    def deafen(self) -> Done | None:
        """Let one machine not hear another until the third has recovered, and have the model placed again."""
        (deaf, sender), began = self._random.sample(self._cluster.nodes, 2), time.monotonic()
        if deaf.machine is None or sender.machine is None or not deaf.machine.deafen(sender.machine):
            return None
        self._pause(1, 12)
        self.kill_server()
        hurt = frozenset((deaf.name, sender.name))
        return Done(
            "one does not hear another", f"{deaf.name} {sender.name}", hurt, began, deaf.machine.receive_all
        )

    def replace_model(self) -> Done | None:
        """Replace the model's file by an equal one, then kill llama-server, so that it is loaded again."""
        file = (self._cluster[0].models / "count.gguf").resolve()
        copy = file.with_suffix(".new")
        shutil.copyfile(file, copy)
        copy.replace(file)
        killed = self.kill_server()
        return killed and dataclasses.replace(killed, kind="the model is replaced")

    def machine_vanishes(self) -> Done | None:
        """Cut a node off and kill it, so that no connection is closed; it returns after the recovery."""
        holders = [node for node in self._cluster if engines(node)]
        node, began = self._random.choice(holders or self._cluster.nodes), time.monotonic()
        if node.machine is None:
            return None
        node.machine.cut()
        node.kill()
        machine = node.machine

        def undo() -> None:
            machine.restore()
            node.start()

        return Done("a machine vanishes", node.name, frozenset((node.name,)), began, undo)

    def partition(self) -> Done | None:
        lan, began = self._cluster.lan, time.monotonic()
        if lan is None:
            return None
        alone = self._random.randrange(len(self._cluster))
        lan.partition([alone])
        self._pause(3, 12)
        lan.heal()
        name = self._cluster[alone].name
        return Done("a partition", f"{name} alone", frozenset((name,)), began)

    def truncate_cache(self) -> Done | None:
        """Truncate the files of the tensor caches and kill a worker, so that the next load finds them."""
        files = [file for node in self._cluster for file in node.tensors()]
        if not files or not any(engines(node, "rpc-server") for node in self._cluster):
            return None
        for file in files:
            with contextlib.suppress(OSError):
                os.truncate(file, self._random.randrange(file.stat().st_size))
        killed = self.kill_worker()
        began = killed.time if killed else time.monotonic()
        return Done("cache files cut short", f"{len(files)} files", frozenset(), began)

    def fill_cache(self) -> Done | None:
        """Empty a tensor cache and fill its disk, before or while the model is loaded again."""
        node = self._node()
        if not node.small_disk:
            return None
        early = self._random.random() < 0.5
        folder = node.folder / "cache"
        shutil.rmtree(folder / "tensors" / "whole", ignore_errors=True)
        if early:
            _fill(folder / "filler")
        began = time.monotonic()
        self.kill_worker()
        if not early:
            self._pause(0.1, 1)
            _fill(folder / "filler")
        self._pause(2, 6)
        (folder / "filler").unlink(missing_ok=True)
        return Done("the cache's disk is full", node.name, frozenset(), began)

    def kill_leader_in_a_plan(self) -> Done | None:
        """Kill llama-server, and then the leader that would place the model again."""
        leader = next(
            (state["leader"] for node in self._cluster if (state := node.state()).get("leader")), ""
        )
        node = next((node for node in self._cluster if node.state().get("me") == leader), None)
        if node is None:
            return None
        began = time.monotonic()
        self.kill_server()
        self._pause(0, 1.0)
        node.kill()
        self._pause(0.2, 2)
        node.start()
        return Done("the leader dies in a plan", node.name, frozenset((node.name,)), began)


def _fill(file: Path) -> None:
    """Fill the disk of ``file``."""
    with file.open("wb") as out, contextlib.suppress(OSError):
        size = shutil.disk_usage(file.parent).free
        while size >= 4096:
            try:
                os.posix_fallocate(out.fileno(), out.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
