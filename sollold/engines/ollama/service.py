"""The Ollama on this machine: found by its API, or started, and polled; its models are endpoints.

It fulfils `sollold.serving.engines.Engines` for the endpoints ``ollama:<model>``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp

from sollold.cluster.gossip.record import OLLAMA_PREFIX, Endpoint
from sollold.cluster.net.view import View
from sollold.engines.address import EngineAddress
from sollold.engines.commands import Done
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.ollama.api import OllamaApi, OllamaError, address
from sollold.engines.ollama.connect import WrongAddress, connect
from sollold.engines.ollama.created_models import CreatedModels
from sollold.engines.ollama.endpoints import OllamaEndpoints
from sollold.engines.ollama.process import OwnOllama
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.ollama_unit import ollama_service
from sollold.retry import LogAndRetry
from sollold.settings.schema import OllamaSettings

log = logging.getLogger("sollold.engines")

_POLL = 3.0
_TAGS_EVERY = 5
"""Polls after which the list of models is asked for again."""
_ABSENT = (5.0, 60.0)
"""Seconds between two looks for an Ollama that is not there: at first, at most."""
_STEADY = 60.0
"""Seconds after which an Ollama that was started here and ends is started anew at once."""
_HANGS = 3
"""Silences in a row after which Ollama counts as gone, and a managed one is started anew."""
_LET_GO = 15.0


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
        self._poll_now = asyncio.Event()
        self._models = OllamaEndpoints(view, catalogue, self._slots)
        self.created = CreatedModels(log_dir.parent / "ollama_models.json")
        self.version = ""
        """Of the Ollama that answers; empty when none does."""
        self._wrong_address = ""

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
        self._models.close()
        if self._own is not None:
            await self._own.stop()
        if self._session is not None:
            await self._session.close()

    @property
    def trouble(self) -> str:
        """Why there is none although there should be one, as a sentence."""
        return self._wrong_address or (
            self._own.trouble if self._own is not None and not self.version else ""
        )

    @property
    def url_of_api(self) -> str:
        """Where it listens; empty when none answers."""
        return self._url if self.version else ""

    def has(self, name: str) -> bool:
        """Whether it has a model of just this name, but for case; one too big for this machine counts."""
        return self._models.has(name)

    def loaded_bytes(self) -> dict[str, int]:
        """Device → bytes of the models that it has loaded."""
        return self._models.loaded_bytes()

    async def refresh(self) -> None:
        """Ask for its models now, since one was created, pulled or deleted."""
        if self._api is not None:
            with contextlib.suppress(OllamaError):
                self._models.use_tags(await self._api.tags())
                self._models.publish()

    async def copy(self, name: str, second: str) -> None:
        """Give a model a second name, which `delete` may take away again.

        Raises:
            OllamaError: it refused, or there is none.
        """
        if self._api is None:
            raise OllamaError("no Ollama answers here")
        await self._api.copy(name, second)
        await asyncio.to_thread(self.created.add, second)
        await self.refresh()

    async def delete(self, name: str) -> bool:
        """Delete a model that was created or pulled through this daemon; False for any other.

        Raises:
            OllamaError: it refused.
        """
        if self._api is None or not await asyncio.to_thread(self.created.__contains__, name):
            return False
        await self._api.delete(name)
        await asyncio.to_thread(self.created.remove, name)
        await self.refresh()
        return True

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The models that Ollama could answer for, loaded or not. They are in the node's record too."""
        return self._models.endpoints

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """One of them, by its id."""
        return next((one for one in self.endpoints() if one.id == endpoint), None)

    # Engines

    def address(self, endpoint: str) -> EngineAddress | None:
        """Where requests for an endpoint go; None when it is not one of this Ollama's."""
        return EngineAddress(self._url) if self.endpoint(endpoint) is not None else None

    @contextlib.contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """Count a request at an endpoint. Ollama itself keeps to the caller's keep_alive."""
        use = self._models.loaded.own_use(endpoint)
        use.inside += 1
        try:
            yield
        finally:
            use.inside -= 1
            use.last = asyncio.get_running_loop().time()
            self._poll_now.set()

    def fail(self, endpoint: str, reason: str) -> None:
        """An endpoint makes no progress: an Ollama that was started here is restarted."""
        log.warning("Ollama does not respond at %s: %s", endpoint, reason)
        if self._own is not None:
            self._own.kill()

    def work(self, endpoint: str) -> None:
        """Nothing is known of what its runners do."""

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Publish an endpoint's load: requests in it, waiting ones, tokens per second."""
        use = self._models.loaded.own_use(endpoint)
        use.active, use.waiting, use.speed = active, waiting, speed or use.speed
        self._models.publish_soon()

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """An Ollama drafts nothing."""

    # Memory

    async def unload(self, endpoint: str, *, force: bool = False) -> Done:
        """Let go of one model's memory; refused while it is in use, unless ``force``."""
        name = endpoint.removeprefix(OLLAMA_PREFIX)
        loaded = self._models.loaded.get(name)
        if loaded is None or self._api is None:
            return Done(True)
        if not force and not self._settings.evict:
            return Done(False, f"{name} is kept in Ollama: ollama.evict is off on this node")
        if not force and self._models.loaded.in_use(name, asyncio.get_running_loop().time()):
            return Done(False, f"{name} is answering a request in Ollama")
        try:
            await self._api.unload(loaded.name)
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
                self._models.use_loaded(loaded)
                self._models.publish()
                if self._models.loaded.get(name) is None:
                    return Done(True)
            await asyncio.sleep(0.2)
        return Done(False, f"Ollama still holds {name} after {_LET_GO:.0f} seconds")

    # The watch

    async def _run(self) -> None:
        attempt = LogAndRetry("polling Ollama", log)
        wait = _ABSENT[0]
        while True:
            again, steady = False, False
            with attempt:
                again, steady = await self._watch_once()
            if steady:
                wait = _ABSENT[0]
            if not again:
                await asyncio.sleep(wait)
                wait = min(wait * 2, _ABSENT[1])

    async def _watch_once(self) -> tuple[bool, bool]:
        """Follow Ollama while it is there. Whether to look again at once, and whether it was there long."""
        loop = asyncio.get_running_loop()
        if await self._connect():
            since = loop.time()
            await self._follow()
            self._forget()
            # One that ends again and again is not started anew without a pause.
            steady = self._own is None or loop.time() - since > _STEADY
            return self._own is not None and steady, steady
        if self._own is not None and not self._wrong_address:
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
        try:
            self._api, self.version = await connect(
                self._session, self._url, own_port=self._own_port, chosen=bool(self._settings.url)
            )
        except WrongAddress as wrong:
            if str(wrong) != self._wrong_address:
                log.warning("%s", wrong)
            self._wrong_address = str(wrong)
            return False
        except OllamaError:
            return False
        self._wrong_address = ""
        log.info("Ollama %s answers at %s", self.version, self._url)
        return True

    async def _follow(self) -> None:
        """Keep tags and loaded models current until Ollama is gone."""
        assert self._api is not None
        silences, polls = 0, 0
        while silences < _HANGS:
            self._poll_now.clear()
            try:
                if silences:
                    await self._api.version()
                if polls % _TAGS_EVERY == 0:
                    self._models.use_tags(await self._api.tags())
                loaded = await self._api.ps()
                if loaded is None:
                    await self._api.version()  # Busy with a load is not hung: this one always answers.
                else:
                    self._models.use_loaded(loaded)
                    await self._models.measure_runners()
                silences, polls = 0, polls + 1
                self._models.publish()
            except OllamaError as error:
                silences += 1
                log.debug("Ollama: %s", error)
            if self._own is not None and self._own.ended:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poll_now.wait(), self._poll)
                await asyncio.sleep(min(0.3, self._poll))  # What has just been used shows a moment later.
        if self._own is not None and self._own.started:
            log.warning("Ollama has not answered %d times; restarting it", _HANGS)
            await self._own.stop()

    def _forget(self) -> None:
        log.warning("Ollama at %s stopped answering", self._url)
        self._api, self.version = None, ""
        self._models.clear()

    def _slots(self) -> int:
        """Requests at a time: as the Ollama that answers was told, by us or by its own unit."""
        ours = self._environ.get("OLLAMA_NUM_PARALLEL", "")
        if self._own is not None and self._own.started:
            return _number(ours)
        return _number(self._service.get("OLLAMA_NUM_PARALLEL", "") or ours)


def _number(text: str) -> int:
    return min(int(text), 64) if text.isascii() and text.isdigit() and int(text) else 1
