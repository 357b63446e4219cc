"""Faults done to a running cluster, each undone by itself after a while."""

from __future__ import annotations

import contextlib
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
"""Bytes of a node's cache disk: somewhat more than what the cache wants free at the least."""

STOP_SECONDS = 30.0
"""A daemon that is told to stop must be gone by then: the limit of draining here is 3 s."""


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was done.

    Attributes:
        hurt: nodes whose own callers may get an error, or lose their connection.
        at: when it struck, on the monotonic clock.
        undo: to be called when the others have recovered; the others are undone by themselves.
    """

    kind: str
    what: str
    hurt: frozenset[str]
    at: float
    undo: Callable[[], None] | None = None


def engines(node: Node, program: str = "") -> list[int]:
    """Pids of this node's engines: ``llama-server`` or ``rpc-server``; without a name all."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name = (entry / "cmdline").read_bytes().split(b"\0")[0]
            if not name.endswith((b"llama-server", b"rpc-server")) or program.encode() not in name:
                continue
            started_here = f"{MARK}={node.folder}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if started_here or f"{node.folder}/".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Faults:
    """Chooses and does faults; everything from one seed."""

    def __init__(self, cluster: Cluster, seed: int, *, short: bool = False, needs_all: bool = False) -> None:
        """``short``: without those that take their time; ``needs_all``: whole nodes go and come back."""
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
        elif not short:
            self._kinds += [self.stop_server, self.stop_daemon, self.fill_cache]
        self.wrong: list[str] = []
        self._left: list[Callable[[], Done | None]] = []

    def strike(self) -> Done:
        """Do the next fault; all kinds come in turn, in an order that changes."""
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
        there = [(node, pid) for node in self._cluster for pid in engines(node, program)]
        return self._random.choice(there) if there else None

    def _to_engine(self, program: str, number: signal.Signals, kind: str) -> Done | None:
        if (found := self._engine(program)) is None:
            return None
        at = time.monotonic()
        _signal(found[1], number)
        return Done(kind, found[0].name, frozenset(), at)

    def kill_worker(self) -> Done | None:
        return self._to_engine("rpc-server", signal.SIGKILL, "kill -9 of a worker")

    def kill_server(self) -> Done | None:
        return self._to_engine("llama-server", signal.SIGKILL, "kill -9 of llama-server")

    def stop_worker(self) -> Done | None:
        """A worker hangs: nobody wakes it, the daemon has to find out."""
        return self._to_engine("rpc-server", signal.SIGSTOP, "SIGSTOP of a worker")

    def stop_server(self) -> Done | None:
        return self._to_engine("llama-server", signal.SIGSTOP, "SIGSTOP of llama-server")

    def kill_daemon(self) -> Done:
        node, at = self._node(), time.monotonic()
        node.kill()
        self._pause(0.2, 3)
        node.start()
        return Done("kill -9 of a daemon", node.name, frozenset((node.name,)), at)

    def stop_daemon(self) -> Done:
        node, at = self._node(), time.monotonic()
        assert node.process is not None
        _signal(node.process.pid, signal.SIGSTOP)
        self._pause(1, 12)
        _signal(node.process.pid, signal.SIGCONT)
        return Done("SIGSTOP of a daemon", node.name, frozenset((node.name,)), at)

    def restart_daemon(self) -> Done:
        """As for an upgrade."""
        node, at = self._node(), time.monotonic()
        try:
            node.stop(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{node.name} did not stop within {STOP_SECONDS:.0f} s")
            node.kill()
        node.start()
        return Done("a daemon is restarted", node.name, frozenset((node.name,)), at)

    def cut_cable(self) -> Done | None:
        node, at = self._node(), time.monotonic()
        if node.machine is None:
            return None
        node.machine.cut()
        self._pause(1, 12)
        node.machine.restore()
        return Done("a cable is cut", node.name, frozenset((node.name,)), at)

    def machine_vanishes(self) -> Done | None:
        """Cut off and dead at once, so that nothing tells its end; it comes back when the rest goes on."""
        holders = [node for node in self._cluster if engines(node)]
        node, at = self._random.choice(holders or self._cluster.nodes), time.monotonic()
        if node.machine is None:
            return None
        node.machine.cut()
        node.kill()
        machine = node.machine

        def undo() -> None:
            machine.restore()
            node.start()

        return Done("a machine vanishes", node.name, frozenset((node.name,)), at, undo)

    def partition(self) -> Done | None:
        lan, at = self._cluster.lan, time.monotonic()
        if lan is None:
            return None
        alone = self._random.randrange(len(self._cluster))
        lan.partition([alone])
        self._pause(3, 12)
        lan.heal()
        name = self._cluster[alone].name
        return Done("a partition", f"{name} alone", frozenset((name,)), at)

    def truncate_cache(self) -> Done | None:
        """Files of the workers' cache are cut short, then a worker dies: the next load meets them."""
        files = [file for node in self._cluster for file in node.tensors()]
        if not files or not any(engines(node, "rpc-server") for node in self._cluster):
            return None
        for file in files:
            with contextlib.suppress(OSError):
                os.truncate(file, self._random.randrange(file.stat().st_size))
        killed = self.kill_worker()
        at = killed.at if killed else time.monotonic()
        return Done("cache files cut short", f"{len(files)} files", frozenset(), at)

    def fill_cache(self) -> Done | None:
        """A cache is emptied and its disk is full, before the model loads anew or while it does."""
        node = self._node()
        if not node.small_disk:
            return None
        early = self._random.random() < 0.5
        folder = node.folder / "cache"
        shutil.rmtree(folder / "tensors" / "whole", ignore_errors=True)
        if early:
            _fill(folder / "filler")
        at = time.monotonic()
        self.kill_worker()
        if not early:
            self._pause(0.1, 1)
            _fill(folder / "filler")
        self._pause(2, 6)
        (folder / "filler").unlink(missing_ok=True)
        return Done("the cache's disk is full", node.name, frozenset(), at)

    def kill_leader_in_a_plan(self) -> Done | None:
        """The engine dies, and so does the leader that would place it anew."""
        leader = next(
            (state["leader"] for node in self._cluster if (state := node.state()).get("leader")), ""
        )
        node = next((one for one in self._cluster if one.state().get("me") == leader), None)
        if node is None:
            return None
        at = time.monotonic()
        self.kill_server()
        self._pause(0, 1.0)
        node.kill()
        self._pause(0.2, 2)
        node.start()
        return Done("the leader dies in a plan", node.name, frozenset((node.name,)), at)


def _fill(file: Path) -> None:
    """Take every byte that is left on the disk."""
    with file.open("wb") as out, contextlib.suppress(OSError):
        size = shutil.disk_usage(file.parent).free
        while size >= 4096:
            try:
                os.posix_fallocate(out.fileno(), out.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
