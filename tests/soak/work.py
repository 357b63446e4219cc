"""The load of a soak test: answers in all dialects, loads, killed engines, a node that comes and goes."""

from __future__ import annotations

import random
import time
from collections import Counter

from tests.chaos.callers import DIALECTS, Caller
from tests.chaos.faults import Faults, engines
from tests.daemons import Cluster, Node, until

MODEL, SMALL = "count", "small"
_UNLOADED = 90.0


class Work:
    """The load. Call `begin` and `rest` in turn from the main thread, and `step` repeatedly in between.

    Attributes:
        guest: a node that comes and goes; the others stay.
        done: number of actions by kind. ``wrong``: descriptions of inexact answers.
    """

    def __init__(self, cluster: Cluster, guest: Node, seed: int) -> None:
        self.cluster = cluster
        self.guest = guest
        self.residents = [node for node in cluster if node is not guest]
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._seed = seed
        self._random = random.Random(seed)
        self._faults = Faults(cluster, seed, short=True)
        self._callers: list[Caller] = []

    def begin(self) -> None:
        """Start the callers."""
        for index, dialect in enumerate(DIALECTS):
            words = (40, 120) if dialect.streamed else (20, 60)
            self._seed += 1
            node = self.residents[index % len(self.residents)]
            self._callers.append(Caller(node, dialect, MODEL, words, self._seed))
        for caller in self._callers:
            caller.start()

    def step(self) -> None:
        """Do one random action and sleep 1 to 5 s."""
        kinds = (
            self._small_model,
            self._small_model,
            self._kill_engine,
            self._toggle_guest,
            self._close_early,
        )
        self._random.choice(kinds)()
        time.sleep(self._random.uniform(1, 5))

    def rest(self) -> None:
        """Stop the callers and the guest, and wait until nothing is loaded."""
        for caller in self._callers:
            caller.stop()
        for caller in self._callers:
            caller.join(300)
            if caller.is_alive():
                self.wrong.append(f"{caller.name} is still waiting")
            for stream in caller.streams:
                self.done["answers"] += not stream.error
                self.done["answers with an error"] += bool(stream.error)
                if why := stream.what_is_wrong():
                    self.wrong.append(f"{caller.name}: {why}")
        self._callers.clear()
        if self.guest.process is not None and self.guest.process.poll() is None:
            self.guest.stop()
        until(self._unloaded, "every model is unloaded", _UNLOADED, 0.5)
        until(lambda: not any(map(engines, self.residents)), "every engine has ended", _UNLOADED, 0.5)

    def _unloaded(self) -> bool:
        deployments = [listed for listed in self.cluster.deployments() if listed["state"] != "failed"]
        for deployment in deployments:
            self.residents[0].ask("POST", "/api/cluster/unload", {"model": deployment["id"], "force": True})
        return not deployments

    def _small_model(self) -> None:
        node = self._random.choice(self.residents)
        body = {"model": SMALL, "prompt": "count", "stream": False, "keep_alive": 1}
        reply = node.ask("POST", "/api/generate", body | {"options": {"num_predict": 5}}, timeout=200)
        self.done["loads of a small model" if reply.status == 200 else "refused loads"] += 1

    def _kill_engine(self) -> None:
        fault = self._random.choice((self._faults.kill_worker, self._faults.kill_server))()
        self.done["deaths of engines"] += fault is not None

    def _close_early(self) -> None:
        """Close a connection in the middle of an answer."""
        node = self._random.choice(self.residents)
        body = DIALECTS[0].body(MODEL, 100)
        try:
            with node.open("POST", DIALECTS[0].path, body, timeout=60) as response:
                response.readline()
        except OSError:
            pass
        self.done["callers that hung up"] += 1

    def _toggle_guest(self) -> None:
        """Start the guest, or end it by a stop or by SIGKILL."""
        running = self.guest.process is not None and self.guest.process.poll() is None
        if not running:
            self.guest.start()
            self.done["joins"] += 1
        elif self._random.random() < 0.5:
            self.guest.stop()
            self.done["leaves"] += 1
        else:
            self.guest.kill()
            self.done["deaths of a node"] += 1
