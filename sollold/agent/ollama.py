"""The Ollama on this machine: found by its API, or started; its models as endpoints, its memory given back.

It fulfils `sollold.serving.engines.Engines` for the endpoints ``ollama:<model>``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from sollold.agent.commands import Done
from sollold.agent.journal import Journal
from sollold.agent.ollama_api import Loaded, OllamaApi, OllamaError, Tag, address, is_here
from sollold.agent.ollama_process import OwnOllama
from sollold.cluster.record import Backend, Endpoint, Placed, State
from sollold.cluster.view import View
from sollold.config import OllamaSettings
from sollold.machine.device import Kind, one_a_memory
from sollold.models.catalogue import Catalogue
from sollold.models.model import Model
from sollold.models.names import canonical, parse
from sollold.models.ollama_service import ollama_service
from sollold.turns import Turns

log = logging.getLogger("sollold.agent")

PREFIX = "ollama:"
_POLL = 3.0
_TAGS_EVERY = 5
"""Polls after which the list of models is asked for again."""
_ABSENT = (5.0, 60.0)
"""Seconds between two looks for an Ollama that is not there: at first, at most."""
_STEADY = 60.0
"""Seconds after which an Ollama that was started here and ends is started anew at once."""
_HANGS = 3
"""Silences in a row after which Ollama counts as gone, and a managed one is started anew."""
_MARGIN = 1.1
"""Bytes a model takes in memory, for each byte of its file, at the least."""
_RECENT = 5.0
"""Seconds for which a model counts as used after others than us have used it."""
_LET_GO = 15.0
_TIMES = 10.0
"""Seconds after which it is told anew how long models stay, when nothing else has changed."""
_FOR_EVER = 10 * 365 * 86400.0
"""Seconds beyond which a model stays for ever: Ollama writes a moment some centuries away."""
_COUNTS = 0.25
"""Seconds within which several counts of requests become one change of the record."""


@dataclass(slots=True)
class _Use:
    """Our own requests at one model."""

    inside: int = 0
    active: int = 0
    waiting: int = 0
    speed: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _Held:
    """A model that Ollama has in memory; ``touched``: when its expiry was last put off."""

    loaded: Loaded
    touched: float


class LocalOllama:
    """Watches this machine's Ollama. `start` it once; `endpoints` never waits; `close` ends it."""

    def __init__(
        self,
        settings: OllamaSettings,
        view: View,
        catalogue: Catalogue,
        journal: Journal,
        log_dir: Path,
        *,
        own_port: int = 0,
        stores: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        service: Mapping[str, str] | None = None,
        poll: float = _POLL,
    ) -> None:
        """``own_port``: where this daemon itself speaks Ollama's API.

        ``stores``: the settings' roots of stores; an Ollama that is started here uses the first. ``service``:
        the environment of Ollama's systemd unit; None: looked for.
        """
        self._settings = settings
        self._view = view
        self._catalogue = catalogue
        self._own_port = own_port
        self._environ = os.environ if environ is None else environ
        self._poll = poll
        self._service = ollama_service()[1] if service is None else service
        self._url = address(settings.url, self._environ, self._service)
        self._session: aiohttp.ClientSession | None = None
        self._api: OllamaApi | None = None
        self._own: OwnOllama | None = None
        if settings.manage:
            store = stores[0] if stores else ""
            self._own = OwnOllama(settings.binary, self._url, journal, log_dir, self._environ, store)
            self._url = self._own.url
        self._task: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()
        self._uses: dict[str, _Use] = {}
        self._tags: dict[str, Tag] = {}
        self._held: dict[str, _Held] = {}
        self._looked = False
        self._timer: asyncio.TimerHandle | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._told = float("-inf")
        self.version = ""
        """Of the Ollama that answers; empty when none does."""
        self._mistaken = ""

    async def start(self) -> None:
        """Begin to look. Nothing is done when the settings turn Ollama off."""
        if self._settings.enabled:
            self._session = aiohttp.ClientSession()
            self._task = asyncio.create_task(self._run(), name="ollama")

    async def close(self) -> None:
        """End the watch, and the Ollama that was started here."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._timer is not None:
            self._timer.cancel()
        if self._own is not None:
            await self._own.stop()
        if self._session is not None:
            await self._session.close()

    @property
    def trouble(self) -> str:
        """Why there is none although there should be one, as a sentence."""
        return self._mistaken or (self._own.trouble if self._own is not None and not self.version else "")

    @property
    def url_of_api(self) -> str:
        """Where it listens; empty when none answers."""
        return self._url if self.version else ""

    def has(self, name: str) -> bool:
        """Whether it has a model of just this name, but for case; one too big for this machine counts."""
        try:
            key = parse(name).key
        except ValueError:
            return False
        return any(parse(known).key == key for known in self._tags)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The models that Ollama could answer for, loaded or not. They are in the node's record too."""
        return self._endpoints

    # Engines

    def url(self, endpoint: str) -> str | None:
        """As in `Engines`."""
        return self._url if any(one.id == endpoint for one in self._endpoints) else None

    @contextlib.contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """As in `Engines`. Ollama itself keeps to the caller's keep_alive, which is in the request."""
        use = self._uses.setdefault(endpoint, _Use())
        use.inside += 1
        try:
            yield
        finally:
            use.inside -= 1
            use.last = asyncio.get_running_loop().time()
            self._soon.set()

    def fail(self, endpoint: str, reason: str) -> None:
        """As in `Engines`: one that we started is started anew."""
        log.warning("Ollama hangs at %s: %s", endpoint, reason)
        if self._own is not None:
            self._own.kill()

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """As in `Engines`."""
        use = self._uses.setdefault(endpoint, _Use())
        use.active, use.waiting, use.speed = active, waiting, speed or use.speed
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_COUNTS, self._publish)

    # Memory

    async def unload(self, endpoint: str, *, force: bool = False) -> Done:
        """Let go of one model's memory; refused while it is in use, unless ``force``."""
        name = endpoint.removeprefix(PREFIX)
        held = self._held.get(name)
        if held is None or self._api is None:
            return Done(True)
        if not force and not self._settings.evict:
            return Done(False, f"{name} stays in Ollama: ollama.evict is off on this node")
        if not force and self._in_use(name):
            return Done(False, f"{name} is answering a request in Ollama")
        try:
            await self._api.unload(held.loaded.name)
            return await self._gone(name)
        except OllamaError as error:
            return Done(False, f"Ollama did not unload {name}: {error}")

    async def _gone(self, name: str) -> Done:
        """Wait until Ollama no longer lists the model: its runner ends a moment after the answer."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _LET_GO
        while self._api is not None and loop.time() < until:
            loaded = await self._api.ps()
            if loaded is not None:
                self._hold(loaded)
                self._publish()
                if name not in self._held:
                    return Done(True)
            await asyncio.sleep(0.2)
        return Done(False, f"Ollama still holds {name} after {_LET_GO:.0f} seconds")

    def held(self) -> dict[str, int]:
        """Device → bytes of the models that it has loaded."""
        held: dict[str, int] = {}
        for endpoint in self._endpoints:
            for placed in endpoint.placed:
                held[placed.device] = held.get(placed.device, 0) + placed.bytes
        return held

    def _in_use(self, name: str) -> bool:
        use = self._uses.get(PREFIX + name)
        if use and (use.inside or use.active or use.waiting):
            return True
        held = self._held.get(name)
        return held is not None and asyncio.get_running_loop().time() - held.touched < _RECENT

    def _last(self, name: str) -> float:
        use, held = self._uses.get(PREFIX + name), self._held.get(name)
        return max(use.last if use else 0.0, held.touched if held else 0.0)

    # The watch

    async def _run(self) -> None:
        turns = Turns("the watch over Ollama", log)
        wait = _ABSENT[0]
        while True:
            again, steady = False, False
            with turns:
                again, steady = await self._turn()
            if steady:
                wait = _ABSENT[0]
            if not again:
                await asyncio.sleep(wait)
                wait = min(wait * 2, _ABSENT[1])

    async def _turn(self) -> tuple[bool, bool]:
        """Follow Ollama while it is there. Whether to look again at once, and whether it was there long."""
        loop = asyncio.get_running_loop()
        if await self._connect():
            since = loop.time()
            await self._follow()
            self._lose()
            # One that ends again and again is not started anew without a pause.
            steady = self._own is None or loop.time() - since > _STEADY
            return self._own is not None and steady, steady
        if self._own is not None and not self._mistaken:
            return await self._own.start(self._answers), False
        return False, False

    async def _answers(self) -> bool:
        assert self._session is not None
        with contextlib.suppress(OllamaError):
            await OllamaApi(self._session, self._url).version()
            return True
        return False

    async def _connect(self) -> bool:
        assert self._session is not None
        if self._is_own_address():
            self._mistaken = f"{self._url} is this daemon itself; set ollama.url to where Ollama listens."
            return False
        api = OllamaApi(self._session, self._url)
        try:
            version = await api.version()
        except OllamaError:
            return False
        if await api.is_ours():
            self._mistaken = (
                f"{self._url} is a sollold, not an Ollama; set ollama.url to where Ollama listens."
            )
            return False
        if not self._settings.url and not await asyncio.to_thread(is_here, self._url):
            # Its memory is not this machine's to count, nor are its models this machine's to unload.
            mistaken = (
                f"OLLAMA_HOST names {self._url}, which is another machine; run sollold there, "
                "or set ollama.url if that Ollama is on this machine after all."
            )
            if mistaken != self._mistaken:
                log.warning("%s", mistaken)
            self._mistaken = mistaken
            return False
        self._api, self.version, self._mistaken = api, version, ""
        log.info("Ollama %s answers at %s", version, self._url)
        return True

    def _is_own_address(self) -> bool:
        parts = urlsplit(self._url)
        return bool(self._own_port) and parts.port == self._own_port and parts.hostname in _LOOPBACK

    async def _follow(self) -> None:
        """Keep tags and loaded models current until Ollama is gone."""
        assert self._api is not None
        silences, turn = 0, 0
        while silences < _HANGS:
            self._soon.clear()
            try:
                if silences:
                    await self._api.version()
                if turn % _TAGS_EVERY == 0:
                    self._know(await self._api.tags())
                loaded = await self._api.ps()
                if loaded is None:
                    await self._api.version()  # Busy with a load is not hung: this one always answers.
                else:
                    self._hold(loaded)
                silences, turn = 0, turn + 1
                self._publish()
            except OllamaError as error:
                silences += 1
                log.debug("Ollama: %s", error)
            if self._own is not None and self._own.ended:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), self._poll)
                await asyncio.sleep(min(0.3, self._poll))  # What has just been used shows a moment later.
        if self._own is not None and self._own.started:
            log.warning("Ollama has not answered %d times; it is started anew", _HANGS)
            await self._own.stop()

    def _lose(self) -> None:
        log.warning("Ollama at %s answers no more", self._url)
        self._api, self.version = None, ""
        self._tags, self._held, self._looked = {}, {}, False
        self._catalogue.offer(())
        self._publish()

    def _know(self, tags: list[Tag]) -> None:
        self._tags = {}
        for tag in tags:
            with contextlib.suppress(ValueError):
                name = canonical(tag.name)
                if not tag.remote_host and not parse(name).cloud:
                    self._tags[name] = tag
        self._catalogue.offer(tuple(_model(name, tag) for name, tag in self._tags.items()))

    def _hold(self, loaded: list[Loaded]) -> None:
        now = asyncio.get_running_loop().time()
        new = now if self._looked else 0.0
        self._looked = True
        held: dict[str, _Held] = {}
        for one in loaded:
            with contextlib.suppress(ValueError):
                name = canonical(one.name)
                before = self._held.get(name)
                same = before is not None and before.loaded.expires_at == one.expires_at
                held[name] = _Held(one, before.touched if before and same else now if before else new)
        self._held = held

    def _publish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        endpoints = tuple(
            endpoint for name, tag in sorted(self._tags.items()) if (endpoint := self._endpoint(name, tag))
        )
        self._uses = {
            id: use for id, use in self._uses.items() if use.inside or any(one.id == id for one in endpoints)
        }
        # That time passes is news only now and then.
        now = asyncio.get_running_loop().time()
        same = [_timeless(one) for one in endpoints] == [_timeless(one) for one in self._endpoints]
        if endpoints != self._endpoints and not (same and now - self._told < _TIMES):
            self._endpoints, self._told = endpoints, now
            others = (one for one in self._view.me.endpoints if one.backend is not Backend.OLLAMA)
            self._view.update_me(endpoints=(*endpoints, *others))

    def _endpoint(self, name: str, tag: Tag) -> Endpoint | None:
        """None for a model that this machine could not hold, unless nothing but Ollama can run it."""
        held = self._held.get(name)
        model = self._catalogue.get(name)
        only_here = model is not None and bool(model.only_ollama)
        if held is None and not only_here and tag.size * _MARGIN > self._room():
            return None
        use = self._uses.get(PREFIX + name) or _Use()
        can = (model.capabilities if model else ()) or tuple(tag.capabilities or ())
        return Endpoint(
            id=PREFIX + name,
            model=name,
            digest=model.digest if model else tag.digest,
            backend=Backend.OLLAMA,
            state=State.READY,
            context=held.loaded.context_length if held else 0,
            slots=self._slots(),
            active=use.active,
            waiting=use.waiting,
            speed=use.speed,
            loaded=held is not None,
            bytes=held.loaded.size if held else 0,
            layers=model.layers if model else 0,
            placed=self._placed(held.loaded, model) if held else (),
            expires=_left(held.loaded.expires_at, time.time()) if held else 0.0,
            embedding="embedding" in can and "completion" not in can,
        )

    def _slots(self) -> int:
        """Requests at a time: as the Ollama that answers was told, by us or by its own unit."""
        ours = self._environ.get("OLLAMA_NUM_PARALLEL", "")
        if self._own is not None and self._own.started:
            return _number(ours)
        return _number(self._service.get("OLLAMA_NUM_PARALLEL", "") or ours)

    def _room(self) -> int:
        """Bytes that Ollama could have if everything idle made room: all that is not granted."""
        devices = self._view.me.devices
        if not devices:
            return 1 << 62
        own = [device for device in devices if device.kind is not Kind.PLAIN]
        total = sum(device.total for device in one_a_memory(own, lambda device: device.total))
        return total - sum(device.granted for device in own)

    def _placed(self, loaded: Loaded, model: Model | None) -> tuple[Placed, ...]:
        """Ollama says how much is on GPUs, not on which: the one with the least free memory is taken."""
        me = self._view.me
        last = (model.layers if model else 0) + 1
        gpus = sorted((d for d in me.devices if d.kind is Kind.GPU), key=lambda d: (d.free, d.id))
        on_gpu = min(max(0, loaded.size_vram), loaded.size) if gpus else 0
        placed = []
        if on_gpu:
            placed.append(Placed(me.node, gpus[0].id, 0, last, on_gpu))
        if loaded.size > on_gpu:
            placed.append(Placed(me.node, "CPU", 0, last if not on_gpu else 0, loaded.size - on_gpu))
        return tuple(placed)


_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COUNT = re.compile(r"([\d.]+)\s*([KMBT]?)", re.IGNORECASE)
_POWERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _model(name: str, tag: Tag) -> Model:
    """What the API tells of a model whose files can't be read here."""
    details = tag.details
    return Model(
        name=name,
        digest=tag.digest,
        source="ollama",
        files=(),
        size=tag.size,
        modified=_seconds(tag.modified_at),
        architecture=(details.family if details else "") or "",
        parameters=_parameters((details.parameter_size if details else "") or ""),
        quantization=(details.quantization_level if details else "") or "",
        capabilities=tuple(tag.capabilities or ("completion",)),
        manifest=tag.digest,
        only_ollama="Its files can't be read by its node's daemon, so only the Ollama there runs it.",
    )


def _parameters(text: str) -> int:
    match = _COUNT.fullmatch(text.strip())
    try:
        return round(float(match[1]) * _POWERS[match[2].upper()]) if match else 0
    except ValueError:
        return 0


def _seconds(text: str) -> float:
    # Go writes nanoseconds; Python reads microseconds at most.
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()
    except ValueError:
        return 0.0


def _left(expires_at: str, now: float) -> float:
    """Seconds until then; negative when that is no time that anybody waits for."""
    left = _seconds(expires_at) - now
    return -1.0 if left > _FOR_EVER else round(max(0.0, left), 1)


def _timeless(endpoint: Endpoint) -> Endpoint:
    """Without what only the passing of time changes."""
    return replace(endpoint, expires=0.0)


def _number(text: str) -> int:
    return min(int(text), 64) if text.isascii() and text.isdigit() and int(text) else 1
