"""The Ollama on this machine: found by its API or started by us, then polled; its models become endpoints.

Implements `sollold.serving.engines.Engines` for the endpoints ``ollama:<model>``.
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
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.engines")

_POLL_SECONDS = 3.0
_TAGS_INTERVAL = 5
"""Number of polls between requests for the list of models."""
_RETRY_SECONDS = (5.0, 60.0)
"""Seconds between attempts to find Ollama: initial and maximum."""
_STEADY_SECONDS = 60.0
"""Uptime in seconds after which an Ollama that we started is restarted immediately when it exits."""
_MAX_HANGS = 3
"""Consecutive failed polls after which Ollama counts as gone; a managed one is then restarted."""
_UNLOAD_SECONDS = 15.0


class LocalOllama:
    """Watches this machine's Ollama. Call `start` once and finally `close`; `endpoints` never blocks."""

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
        poll: float = _POLL_SECONDS,
    ) -> None:
        """``own_port``: port on which this daemon itself serves Ollama's API.

        ``stores``: store roots from the settings; an Ollama that we start uses the first. ``service``: the
        environment of Ollama's systemd unit; None: read it.
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
        """Version of the running Ollama; empty if none answers."""
        self._wrong_address = ""

    async def start(self) -> None:
        """Start watching, unless the settings disable Ollama."""
        if self._settings.enabled:
            self._session = aiohttp.ClientSession()
            self._task = asyncio.create_task(self._run(), name="ollama")

    async def close(self) -> None:
        """Stop watching, and stop the Ollama that we started."""
        await cancel_and_wait(self._task)
        self._models.close()
        if self._own is not None:
            await self._own.stop()
        if self._session is not None:
            await self._session.close()

    @property
    def trouble(self) -> str:
        """Why there is no Ollama although there should be one, as a sentence."""
        return self._wrong_address or (
            self._own.trouble if self._own is not None and not self.version else ""
        )

    @property
    def url_of_api(self) -> str:
        """Base URL of Ollama; empty if none answers."""
        return self._url if self.version else ""

    def has(self, name: str) -> bool:
        """Return whether Ollama has a model of exactly this name (ignoring case), even if too big to run."""
        return self._models.has(name)

    def loaded_bytes(self) -> dict[str, int]:
        """Return device → bytes of the loaded models."""
        return self._models.loaded_bytes()

    async def refresh(self) -> None:
        """Fetch the list of models now, after one was created, pulled or deleted."""
        api = self._api
        if api is not None:
            with contextlib.suppress(OllamaError):
                await self._models.read_tags(api)
                if self._api is None:
                    # It is gone since it gave the list.
                    self._models.clear()
                self._models.publish()

    async def copy(self, name: str, second: str) -> None:
        """Copy a model to a second name, which `delete` may delete again.

        Raises:
            OllamaError: it refused, or no Ollama answers.
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
        """Return the models that Ollama can serve, loaded or not. They are in the node's record too."""
        return self._models.endpoints

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """Return the endpoint with this id."""
        return next((e for e in self.endpoints() if e.id == endpoint), None)

    # Engines

    def address(self, endpoint: str) -> EngineAddress | None:
        """Return where requests for an endpoint go; None if it is not one of this Ollama's."""
        return EngineAddress(self._url) if self.endpoint(endpoint) is not None else None

    @contextlib.contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """Count a request at an endpoint. Ollama itself applies the request's keep_alive."""
        use = self._models.loaded.own_use(endpoint)
        use.inside += 1
        try:
            yield
        finally:
            use.inside -= 1
            use.last = asyncio.get_running_loop().time()
            self._poll_now.set()

    def fail(self, endpoint: str, reason: str) -> None:
        """Handle an endpoint without progress: an Ollama that we started is killed, to be restarted."""
        log.warning("Ollama does not respond at %s: %s", endpoint, reason)
        if self._own is not None:
            self._own.kill()

    def work(self, endpoint: str) -> None:
        """Return None: the runners' activity is unknown."""

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Publish an endpoint's load: requests in it, waiting ones, tokens per second."""
        use = self._models.loaded.own_use(endpoint)
        use.active, use.waiting, use.speed = active, waiting, speed or use.speed
        self._models.publish_soon()

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """Do nothing: Ollama does not draft."""

    # Memory

    async def unload(self, endpoint: str, *, force: bool = False) -> Done:
        """Unload one model; refused while it is in use, unless ``force``."""
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
            return await self._wait_until_unloaded(name)
        except OllamaError as error:
            return Done(False, f"Ollama did not unload {name}: {error}")

    async def _wait_until_unloaded(self, name: str) -> Done:
        """Wait until Ollama no longer lists the model: its runner exits a moment after the response."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _UNLOAD_SECONDS
        while self._api is not None and loop.time() < deadline:
            loaded = await self._api.ps()
            if loaded is not None:
                self._models.use_loaded(loaded)
                self._models.publish()
                if self._models.loaded.get(name) is None:
                    return Done(True)
            await asyncio.sleep(0.2)
        return Done(False, f"Ollama still holds {name} after {_UNLOAD_SECONDS:.0f} seconds")

    # The watch

    async def _run(self) -> None:
        attempt = LogAndRetry("polling Ollama", log)
        wait = _RETRY_SECONDS[0]
        if self._own is not None:
            with attempt:
                await self._own.kill_leftovers()
        while True:
            retry, steady = False, False
            with attempt:
                retry, steady = await self._watch_once()
            if steady:
                wait = _RETRY_SECONDS[0]
            if not retry:
                await asyncio.sleep(wait)
                wait = min(wait * 2, _RETRY_SECONDS[1])

    async def _watch_once(self) -> tuple[bool, bool]:
        """Follow Ollama while it answers. Returns (retry at once, whether it had been up for long)."""
        loop = asyncio.get_running_loop()
        if await self._connect():
            start = loop.time()
            await self._follow()
            self._mark_gone()
            if self._own is not None and self._own.ended:
                # Else another Ollama that answers at its address would be taken for it, and left at once.
                await self._own.stop()
            # One that keeps exiting is restarted only after a pause.
            steady = self._own is None or loop.time() - start > _STEADY_SECONDS
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
        """Keep the lists of models and loaded models current until Ollama is gone."""
        assert self._api is not None
        failures, polls = 0, 0
        while failures < _MAX_HANGS:
            self._poll_now.clear()
            try:
                if failures:
                    await self._api.version()
                if polls % _TAGS_INTERVAL == 0:
                    await self._models.read_tags(self._api)
                loaded = await self._api.ps()
                if loaded is None:
                    await self._api.version()  # Busy with a load, not hung, if this answers.
                else:
                    self._models.use_loaded(loaded)
                    await self._models.measure_runners()
                failures, polls = 0, polls + 1
                self._models.publish()
            except OllamaError as error:
                failures += 1
                log.debug("Ollama: %s", error)
            if self._own is not None and self._own.ended:
                return
            await sleep_until_set(self._poll_now, self._poll)
            if self._poll_now.is_set():
                await asyncio.sleep(min(0.3, self._poll))  # A use shows in /api/ps a moment later.
        if self._own is not None and self._own.started:
            log.warning("Ollama has not answered %d times; restarting it", _MAX_HANGS)
            await self._own.stop()

    def _mark_gone(self) -> None:
        log.warning("Ollama at %s stopped answering", self._url)
        self._api, self.version = None, ""
        self._models.clear()

    def _slots(self) -> int:
        """Return the parallel requests configured for the running Ollama, by us or by its own unit."""
        own = self._environ.get("OLLAMA_NUM_PARALLEL", "")
        if self._own is not None and self._own.started:
            return _parse_slots(own)
        return _parse_slots(self._service.get("OLLAMA_NUM_PARALLEL", "") or own)


def _parse_slots(text: str) -> int:
    return min(int(text), 64) if text.isascii() and text.isdigit() and int(text) else 1
