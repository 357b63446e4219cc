"""Watches the cluster and this node while the daemon runs, and fills the event log and the history."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from math import floor

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.control.activity import Activity, FinishedRequest, Histogram
from sollold.control.events import ClusterWatcher, Event, EventKind, EventLog, LoadTime, OfflineNode
from sollold.control.history import FIRST_TOKEN, NONE, History, HistoryRequest, NodeHistory
from sollold.control.load_crashes import LoadCrashes
from sollold.engines.commands import Done
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.machine.gpus import GpuLoad
from sollold.retry import LogAndRetry
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.events")

LOAD_BUCKETS = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
_SETTLE_SECONDS = 0.2
"""Seconds within which changes of the records are handled together: a busy endpoint changes often."""
_GPU_SECONDS = 2
_GPU_WAIT = 0.5
_REST_SECONDS = 15.0
"""Maximum seconds without sampling while nothing changes."""
_SUSPEND_SECONDS = 10.0
"""Seconds by which a sample must be late for the machine to count as having slept."""
_CALL_SECONDS = 3.0
_MAX_MODELS = 500


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """Peer method ``forget``: remove a node from the list of missing nodes."""

    node: str


@dataclass(slots=True)
class LoadStats:
    """Loads of one model by this node."""

    ok: int
    failed: int
    seconds: Histogram


class Monitor:
    """Keeps this node's event log, its history and the list of missing nodes.

    Args:
        stopped: tells whether a missing node announced its departure; ``evicted``: whether it was evicted.
        gpus: reads the load of the GPUs; it may block and runs in a thread. None if it can't be read.
    """

    def __init__(
        self,
        view: View,
        calls: RpcClient,
        activity: Activity,
        stopped: Callable[[str], bool],
        gpus: Callable[[], list[GpuLoad]] | None = None,
        evicted: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._view = view
        self._calls = calls
        self.activity = activity
        self._gpus = gpus
        # After a restart, a follower sends the last id it has seen. Ids based on the start time are unique
        # among this node's logs. JavaScript's numbers hold microseconds for two more centuries.
        self.events = EventLog(start=time.time_ns() // 1000)
        self.history = History()
        self.loads: dict[str, LoadStats] = {}
        self.gpu_loads: list[GpuLoad] = []
        self._reading: asyncio.Future[list[GpuLoad]] | None = None
        self._gpu_attempt = LogAndRetry("reading the load of the GPUs", log)
        self._watcher = ClusterWatcher(self.events, view.me.node, stopped, self._load_ended, evicted)
        self.load_crashes = LoadCrashes()
        self._pending: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._unsubscribe: Callable[[], None] = lambda: None
        self._sampling: asyncio.Task[None] | None = None
        self._previous = (0, 0, 0, 0, 0.0, 0)
        self._last: dict[tuple[str, str], float] = {}
        """Values of the last sample."""
        self._due = 0.0
        """Time of the next sample, on the loop's clock."""
        self._resting = False
        """Whether this node is idle: samples equal the last one and are added only when needed."""
        self._sampled = view.me
        """This node's record at the last sample."""
        self._rest_over = asyncio.Event()
        self.closed = False
        activity.on_resumed = self._resumed
        activity.on_begin = self._end_rest

    def register(self, server: RpcServer) -> None:
        """Register the peer methods ``history`` and ``forget``."""
        server.method("history", HistoryRequest, self._on_history)
        server.method("forget", ForgetRequest, self._on_forget)

    async def start(self) -> None:
        """Start watching and sampling."""
        self._observe()
        self._unsubscribe = self._view.subscribe(self._view_changed)
        self._sampling = asyncio.create_task(self._sample(), name="history")

    async def close(self) -> None:
        """Stop watching, and end all waits for events."""
        self.closed = True
        self._unsubscribe()
        if self._pending is not None:
            self._pending.cancel()
        await cancel_and_wait(self._sampling, self._reading)
        self._wake()

    def offline(self) -> tuple[OfflineNode, ...]:
        """Return the missing nodes."""
        return self._watcher.offline()

    async def next_events(self, seen: int, timeout: float) -> list[Event]:
        """Return the events after ``seen``, waiting up to ``timeout`` seconds for one."""
        found = self.events.after(seen)
        if found:
            return found
        changed = self._changed
        try:
            async with asyncio.timeout(timeout):
                await changed.wait()
        except TimeoutError:
            return []
        return self.events.after(seen)

    async def histories(self, request: HistoryRequest) -> list[NodeHistory]:
        """Return the history of each live node, leaving out those that do not respond in time."""
        answers = await asyncio.gather(*(self._ask(record, request) for record in self._view.live()))
        return [answer for answer in answers if answer is not None]

    async def forget(self, node: str) -> None:
        """Remove a missing node (id or name) from the list, here and on the other nodes.

        Raises:
            Refusal: NOT_FOUND when no such node is missing.
        """
        found = next((n for n in self.offline() if node in (n.record.node, n.record.name)), None)
        if found is None:
            names = ", ".join(sorted(n.record.name for n in self.offline()))
            hint = f"offline are {names}" if names else "no node is offline"
            raise Refusal(Fault.NOT_FOUND, f"there is no offline node {node[:100]!r}; {hint}")
        request = ForgetRequest(found.record.node)
        await asyncio.gather(*(self._send_forget(record.node, request) for record in self._view.live()))

    async def _send_forget(self, node: str, request: ForgetRequest) -> None:
        try:
            await self._calls.call(node, "forget", request, Done, timeout=_CALL_SECONDS)
        except PeerError as error:
            log.debug("%s did not record the removal of a node: %s", name_of(self._view, node), error)

    async def _ask(self, record: Record, request: HistoryRequest) -> NodeHistory | None:
        try:
            return await self._calls.call(record.node, "history", request, NodeHistory, timeout=_CALL_SECONDS)
        except PeerError as error:
            log.debug("no history from %s: %s", record.name, error)
            return None

    async def _on_history(self, caller: str, request: HistoryRequest) -> NodeHistory:
        self._catch_up()
        me = self._view.me
        return self.history.read(me.node, me.name, request)

    async def _on_forget(self, caller: str, request: ForgetRequest) -> Done:
        if self._watcher.remove(request.node, time.time()):
            self._wake()
        return Done(True)

    def _view_changed(self) -> None:
        if self._view.me is not self._sampled:
            self._end_rest()
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._observe)

    def _observe(self) -> None:
        self._pending = None
        newest = self.events.newest
        live = self._view.live()
        self._watcher.observe(live, self._view.leader(), time.time(), time.monotonic())
        self.load_crashes.observe(live)
        if self.events.newest != newest:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _resumed(self, done: FinishedRequest) -> None:
        times = "" if done.resumed == 1 else f" ({done.resumed} times)"
        message = f"an answer of {done.model} was interrupted and resumed on {done.node}{times}"
        self.events.add(time.time(), EventKind.REQUEST_RESUMED, message, name=done.node, model=done.model)
        self._wake()

    def _load_ended(self, load: LoadTime) -> None:
        if load.model not in self.loads and len(self.loads) >= _MAX_MODELS:
            return
        stats = self.loads.setdefault(load.model, LoadStats(0, 0, Histogram(LOAD_BUCKETS)))
        if load.ok:
            stats.ok += 1
            stats.seconds.observe(load.seconds)
        else:
            stats.failed += 1

    async def _sample(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = LogAndRetry("sampling for the history", log)
        count = 0
        self._due = floor(loop.time()) + 1.0
        while True:
            self._skip_sleep(loop.time() - _SUSPEND_SECONDS)
            await asyncio.sleep(max(0.0, self._due - loop.time()))
            if count % _GPU_SECONDS == 0:
                await self._read_gpus()
            count += 1
            idle = False
            with attempt:
                idle = self._gpus is None and self._is_idle()
                self._last = self._values()
            self.history.add(self._last)
            self._due += 1
            if idle:
                await self._rest()

    async def _read_gpus(self) -> None:
        """Read the load of the GPUs; while a driver does not answer there is none."""
        if self._gpus is None:
            return
        if self._reading is not None and not self._reading.done():
            self.gpu_loads = []
            return
        self._reading = asyncio.ensure_future(asyncio.to_thread(self._gpus))
        self._reading.add_done_callback(self._gpus_read)
        await asyncio.wait({self._reading}, timeout=_GPU_WAIT)

    def _gpus_read(self, reading: asyncio.Future[list[GpuLoad]]) -> None:
        if reading.cancelled():
            return
        with self._gpu_attempt:
            self.gpu_loads = reading.result()

    def _is_idle(self) -> bool:
        """Return whether all samples will be equal until a request arrives or this node's record changes."""
        busy = self.activity.active() or any(endpoint.waiting for endpoint in self._view.me.endpoints)
        return not busy and self._previous == self._totals()

    async def _rest(self) -> None:
        self._rest_over.clear()
        self._resting = True
        await sleep_until_set(self._rest_over, _REST_SECONDS)
        self._catch_up()
        self._resting = False

    def _end_rest(self) -> None:
        """Resume sampling because of activity, after adding the samples due until now."""
        if self._resting:
            self._catch_up()
            self._rest_over.set()

    def _catch_up(self) -> None:
        """Add the samples that have become due while resting."""
        if self._resting:
            now = asyncio.get_running_loop().time()
            self._skip_sleep(now - _REST_SECONDS - _SUSPEND_SECONDS)
            while self._due <= now:
                self.history.add(self._last)
                self._due += 1

    def _skip_sleep(self, oldest: float) -> None:
        """Skip samples due before ``oldest``: the machine was asleep then."""
        if self._due < oldest:
            self._due = floor(asyncio.get_running_loop().time())

    def _totals(self) -> tuple[int, int, int, int, float, int]:
        """Return the counters, which only increase."""
        activity = self.activity
        return (
            activity.tokens,
            activity.prompt_tokens,
            activity.finished,
            activity.failed,
            activity.first_token_sum,
            activity.first_token_count,
        )

    def _values(self) -> dict[tuple[str, str], float]:
        """Return the values of the second that has just passed."""
        activity, me = self.activity, self._view.me
        self._sampled = me
        previous, totals = self._previous, self._totals()
        self._previous = totals
        first_tokens = totals[5] - previous[5]
        values = {
            ("", "tokens_per_second"): float(totals[0] - previous[0]),
            ("", "prompt_tokens_per_second"): float(totals[1] - previous[1]),
            ("", "requests_per_second"): float(totals[2] - previous[2]),
            ("", "failed_per_second"): float(totals[3] - previous[3]),
            ("", "active"): float(activity.active()),
            ("", "waiting"): float(sum(endpoint.waiting for endpoint in me.endpoints)),
            ("", FIRST_TOKEN): (totals[4] - previous[4]) / first_tokens if first_tokens else NONE,
        }
        for device in me.devices:
            values[device.id, "used_bytes"] = float(device.total - device.free)
            values[device.id, "granted_bytes"] = float(device.granted)
        for gpu in self.gpu_loads:
            values[gpu.device, "utilization"] = gpu.utilization
            values[gpu.device, "temperature_celsius"] = gpu.temperature
            values[gpu.device, "power_watts"] = gpu.power
        return values
