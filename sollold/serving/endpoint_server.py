"""At the endpoint's node: requests from all nodes come in, one line an endpoint, answers go out.

The node that was asked and the endpoint's node are often the same. Then `EndpointServer.visit` is called
straight; otherwise the peer route carries it in the frames of `sollold.serving.wire`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial

import aiohttp
import msgspec
from aiohttp import web

from sollold.cluster.peer import PeerServer
from sollold.cluster.peer_server import caller as proved_caller
from sollold.cluster.record import Backend, Endpoint, State
from sollold.cluster.view import View
from sollold.config import ServingSettings
from sollold.serving.engines import Engines
from sollold.serving.far_callers import FarCallers
from sollold.serving.gate import Gate
from sollold.serving.held import Held
from sollold.serving.stall import Stillness
from sollold.serving.visit import Failure, Visit
from sollold.serving.wire import PATH, Break, Broken, Turn

log = logging.getLogger("sollold.serving")

BEAT = 1.0
"""Seconds between two looks at what is under way."""
_REPORT = 0.25
"""Seconds over which changes of the counts are gathered before they go into the record."""
_HELD = 300.0
"""Seconds for which a caller that takes nothing keeps its place in the engine."""
_ASK_ENGINE = 5.0
_PATHS = (
    "/v1/",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/completion",
    "/infill",
    "/embedding",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)
_FULL_RETRY = 5.0
_PLAIN = re.compile(r"(/[A-Za-z0-9_-]+)+")
_TELLING = 16
"""Tokens from which on an answer's speed is one: the first few come quicker or slower than the others."""
_UNSEEN = 1200.0
"""Seconds of silence granted, at the least, to an Ollama that loads, or whose answer is not streamed: it
shows no work."""


class _Door:
    """An endpoint's gate and what is measured there."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.speed = 0.0
        self.visits: set[Visit] = set()
        self.stillness = Stillness()
        self.asking: asyncio.Task[None] | None = None


class EndpointServer:
    """This node's endpoints as they are served. Own it: `start`, `close`."""

    def __init__(
        self,
        view: View,
        engines: Engines,
        settings: ServingSettings,
        peers: PeerServer | None = None,
        who: Callable[[web.Request], str] = proved_caller,
    ) -> None:
        """Registers the peer route; call it before the peer server starts, and `start` on the loop.

        ``who`` tells the node id of whoever asks.
        """
        self._far = FarCallers(self.visit, who)
        self._view = view
        self._engines = engines
        self._settings = settings
        self._held = Held(settings.bodies)
        self._doors: dict[str, _Door] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._beat: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._reports: dict[str, asyncio.TimerHandle] = {}
        self._refusing = ""
        if peers is not None:
            peers.route("POST", PATH, self._far.answer)

    async def start(self) -> None:
        """Begin to serve."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            read_bufsize=256 * 1024,
            trust_env=False,
        )
        self._unsubscribe = self._view.subscribe(self._record_changed)
        self._beat = asyncio.create_task(self._beating(), name="serving beat")

    async def close(self) -> None:
        """End everything under way."""
        self.refuse("this node is stopping")
        self.break_all("this node is stopping")
        self._unsubscribe()
        tasks = [*self._far.tasks(), *self._closing]
        tasks += [door.asking for door in self._doors.values() if door.asking is not None]
        if self._beat is not None:
            self._beat.cancel()
            tasks.append(self._beat)
        if tasks:
            # A broken visit ends its own task by itself; the limit is for a caller that reads nothing.
            _, slow = await asyncio.wait(tasks, timeout=2.0)
            for task in slow:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self._reports.values():
            timer.cancel()
        self._reports.clear()
        if self._session is not None:
            await self._session.close()

    @property
    def under_way(self) -> int:
        """Requests in lines and engines of this node."""
        return sum(len(door.visits) for door in self._doors.values())

    def use(self, settings: ServingSettings) -> None:
        """Other limits from now on; a line that stands keeps its length."""
        self._settings = settings

    def refuse(self, reason: str) -> None:
        """Take no new work; who stands in line is sent elsewhere. An empty ``reason`` takes work again."""
        self._refusing = reason
        if reason:
            for door in self._doors.values():
                door.gate.close()

    def break_all(self, reason: str) -> None:
        """Break off what is under way, so that the nodes asked resume it elsewhere."""
        for door in self._doors.values():
            for visit in tuple(door.visits):
                visit.end(Broken(Break.MOVED, reason))

    def visit(self, turn: Turn) -> Visit:
        """A request for an endpoint of this node, not yet in line.

        Raises:
            Failure: MOVED, when the endpoint takes no work here.
        """
        if self._refusing:
            raise Failure(Broken(Break.MOVED, self._refusing))
        endpoint = self._endpoint(turn.endpoint)
        if endpoint is None or self._session is None:
            raise Failure(Broken(Break.MOVED, f"{turn.endpoint} is not served here"))
        if endpoint.state is not State.READY:
            raise Failure(Broken(Break.MOVED, f"{turn.endpoint} is {endpoint.state}"))
        if endpoint.closing:
            raise Failure(Broken(Break.MOVED, f"a node that {turn.endpoint} needs is draining"))
        if not turn.path.startswith(_PATHS) or not _PLAIN.fullmatch(turn.path):
            raise Failure(Broken(Break.ENGINE, f"{turn.path} is not a request that an endpoint answers"))
        size = len(turn.body)
        if not self._held.take(size):
            message = "the requests that wait on this node hold too much memory already; try again later"
            raise Failure(Broken(Break.FULL, message, _FULL_RETRY))
        door = self._door(endpoint)

        def ended(visit: Visit) -> None:
            door.visits.discard(visit)
            self._held.give_back(size)

        visit = Visit(
            turn,
            door.gate,
            self._engines,
            self._session,
            stall=self._patience(turn, endpoint),
            # An Ollama loads first, in silence, and gives up by itself when that does not go forward.
            begin=_UNSEEN if endpoint.backend is Backend.OLLAMA and not endpoint.loaded else 0.0,
            speed=door.speed or endpoint.speed,
            on_speed=partial(self._measured, endpoint.id, door),
            on_end=ended,
        )
        door.visits.add(visit)
        return visit

    def _patience(self, turn: Turn, endpoint: Endpoint) -> float:
        stall = self._settings.stall
        if stall > 0 and endpoint.backend is Backend.OLLAMA and not turn.stream:
            return max(stall, _UNSEEN)
        return stall

    def _endpoint(self, id: str) -> Endpoint | None:
        return self._engines.endpoint(id)

    def _door(self, endpoint: Endpoint) -> _Door:
        door = self._doors.get(endpoint.id)
        if door is None:
            gate = Gate(endpoint.slots, self._settings.queue, partial(self._counted, endpoint.id))
            door = self._doors[endpoint.id] = _Door(gate)
        return door

    def _record_changed(self) -> None:
        self._far.keep({record.node for record in self._view.live()})
        for id, door in tuple(self._doors.items()):
            endpoint = self._endpoint(id)
            if endpoint is not None and endpoint.state is State.READY:
                if endpoint.closing:
                    door.gate.close()
                else:
                    door.gate.resize(endpoint.slots)
                continue
            # It is being ended. An engine that was told to end may hold its streams open in silence.
            door.gate.close()
            why = endpoint.reason if endpoint is not None else ""
            failed = endpoint is not None and endpoint.state is State.FAILED
            kind = Break.ENGINE if failed else Break.MOVED
            for visit in tuple(door.visits):
                visit.end(Broken(kind, f"the engine was ended{f': {why}' if why else ''}"))
            if endpoint is None and not door.visits:
                del self._doors[id]

    def _counted(self, id: str) -> None:
        door = self._doors.get(id)
        if door is not None and door.gate.active > 1:
            for visit in door.visits:
                if not visit.waits:
                    visit.alone = False
        if id not in self._reports:
            loop = asyncio.get_running_loop()
            self._reports[id] = loop.call_later(_REPORT, self._report, id)

    def _report(self, id: str) -> None:
        self._reports.pop(id, None)
        door = self._doors.get(id)
        if door is not None:
            self._engines.report(id, door.gate.active, door.gate.waiting, door.speed)

    def _measured(self, id: str, door: _Door, visit: Visit, speed: float, tokens: int) -> None:
        """The record tells the speed of one stream alone; of several each is slower than that."""
        if tokens < _TELLING or not (visit.alone or 0 < door.speed < speed):
            return
        door.speed += (0.3 if door.speed else 1.0) * (speed - door.speed)
        self._counted(id)

    # The beat: hang-ups, hung engines.

    async def _beating(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(BEAT)
            now = loop.time()
            await self._far.beat(now)
            for id, door in tuple(self._doors.items()):
                self._look(id, door, now)

    def _look(self, id: str, door: _Door, now: float) -> None:
        working = [visit for visit in door.visits if visit.progress is not None and not visit.turn.aside]
        work = self._engines.work(id) if working else None
        if work is None:
            door.stillness.forget()
        else:
            door.stillness.observe(work.processes, work.bytes, now)
        if not door.visits:
            if self._endpoint(id) is None:
                del self._doors[id]
            return
        still = door.stillness.seconds(now) > self._settings.still
        for visit in working:
            progress = visit.progress
            if progress is None:
                continue
            dead = still and progress.waited(now) > self._settings.still
            if dead or progress.hung(now):
                seconds = progress.silent(now)
                reason = f"the engine made no token for {seconds:.0f} s although its process lives"
                if dead:
                    reason += ", and no process of it did anything"
                log.warning("%s", reason, extra={"deployment": id, "request": visit.turn.id})
                for other in tuple(door.visits):
                    other.end(Broken(Break.ENGINE, reason))
                door.gate.close()
                self._engines.fail(id, reason)
                return
            if progress.held(now) > _HELD:
                self._let_go(visit)
        doubtful = any(visit.progress is not None and visit.progress.doubtful(now) for visit in working)
        if doubtful and (door.asking is None or door.asking.done()):
            door.asking = asyncio.create_task(self._ask_engine(id, door), name=f"slots of {id}")

    def _let_go(self, visit: Visit) -> None:
        """Give the place of one whose caller does not read to others; when it reads on, it is resumed."""
        visit.end(Broken(Break.MOVED, "the caller did not read for a long time"))
        # Whoever should close it waits for its caller, perhaps for ever.
        closing = asyncio.create_task(visit.close(), name=f"letting {visit.turn.id} go")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _ask_engine(self, id: str, door: _Door) -> None:
        """What llama-server says of its slots. Silence is no news: it may be in one long batch."""
        url = self._engines.url(id)
        endpoint = self._endpoint(id)
        if url is None or endpoint is None or endpoint.backend is Backend.OLLAMA or self._session is None:
            return
        try:
            async with asyncio.timeout(_ASK_ENGINE):
                async with self._session.get(url + "/slots") as response:
                    if response.status != 200:
                        return
                    slots = msgspec.json.decode(await response.read(), type=list[_Slot])
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            return
        work = sum(slot.work for slot in slots)
        now = asyncio.get_running_loop().time()
        for visit in tuple(door.visits):
            if visit.progress is not None:
                visit.progress.worked(work, now)


class _Token(msgspec.Struct):
    n_decoded: int = 0


class _Slot(msgspec.Struct):
    """What is read of an entry of llama-server's ``/slots``."""

    id_task: int = 0
    n_prompt_tokens_processed: int = 0
    next_token: list[_Token] = []

    @property
    def work(self) -> int:
        """Grows with every token read or made, and with every new task."""
        made = sum(token.n_decoded for token in self.next_token)
        return self.id_task * 1_000_000_000 + self.n_prompt_tokens_processed + made
