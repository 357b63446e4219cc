"""The models on this machine, from every store, kept current by checking the stamps of files and folders."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.models.footprint.shape import Shape
from sollold.models.gguf.header import GgufError, Header
from sollold.models.model import Model
from sollold.models.stores import folders
from sollold.models.stores.find_stores import find_stores
from sollold.models.stores.header_facts import HeaderFactsCache
from sollold.models.stores.header_reader import HeaderReader
from sollold.models.stores.llama_support import RefusedModels, format_fault
from sollold.models.stores.name_owners import NameOwners
from sollold.models.stores.patient_read import no_answer
from sollold.models.stores.read_store import Reader, shown
from sollold.models.stores.scan_result import Problem, Scan
from sollold.models.stores.store_watcher import Store, unchanged
from sollold.settings.location import expanded, home_folder
from sollold.settings.schema import ModelSettings
from sollold.subscribers import Subscribers
from sollold.tasks import cancel_and_wait
from sollold.turns import next_turn

log = logging.getLogger("sollold.models")

DEMO = "demo"
_CHECK_SECONDS = 5.0
"""Seconds between two checks of the stamps: a thousand of them take about two milliseconds."""
_RETRY_SECONDS = 60.0
"""Seconds after which failed reads are retried even if no stamp has changed (after ``chmod``, say)."""
_FIRST_SCAN_SECONDS = 5.0
"""Seconds that a start waits for the first scan; reading hundreds of new headers takes longer."""
_SCAN_SECONDS = 10.0
"""Timeout for waiting for a scan, in seconds; slower results are used when they arrive."""


def own_folder(settings: ModelSettings, state_dir: Path) -> Path:
    """Return the folder for pulled models."""
    return expanded(settings.download_dir) if settings.download_dir else state_dir / "models"


class Catalogue:
    """The models of this node. Call `start` once; reading never blocks; `close` stops the watch."""

    def __init__(
        self,
        settings: ModelSettings,
        state_dir: Path,
        *,
        demo: Callable[[Path], object] | None = None,
        sweep: Callable[[Path, float], None] | None = None,
        environ: Mapping[str, str] | None = None,
        home: Path | None = None,
        interval: float = _CHECK_SECONDS,
    ) -> None:
        """Create a catalogue that has not started.

        ``demo`` writes the demo model to a path, completely or not at all; called if there is no model.
        ``sweep`` removes what interrupted pulls left in the folder for pulled models (arguments: the folder,
        the time in seconds since the epoch); called once, before the first scan.
        """
        self.own = own_folder(settings, state_dir)
        self.changing = asyncio.Lock()
        """Held while a model in `own` is added, replaced or removed: callers may want the same name."""
        self._settings = settings
        self._header_facts = HeaderFactsCache(state_dir / "headers.json")
        self._reader = Reader(self._header_facts, state_dir / "links")
        self._refused = RefusedModels(state_dir / "refused.json")
        self._owners = NameOwners(state_dir / "model_names.json")
        self._owners_changed = False
        self._build = ""
        self._demo = demo
        self._environ = os.environ if environ is None else environ
        self._home = home_folder() if home is None else home
        self._interval = interval
        self._stores: dict[str, Store] = {}
        self._state: tuple[tuple[str, bool], ...] = ()
        self._sweep = sweep
        self._problems: tuple[Problem, ...] = ()
        self._local: tuple[Model, ...] = ()
        self._offered: tuple[Model, ...] = ()
        self._models: tuple[Model, ...] = ()
        self._digest = ""
        self._subscribers = Subscribers("the models of this node")
        self._headers = HeaderReader(self._merge)
        self._task: asyncio.Task[None] | None = None
        self._scan_lock = asyncio.Lock()
        self._last_error = ""
        """The last error of a scan; it is logged once."""

    async def start(self) -> None:
        """Scan all stores, then watch them. Returns after the first scan, or earlier if that takes long."""
        await asyncio.to_thread(self._header_facts.load)
        await asyncio.to_thread(self._refused.load)
        await asyncio.to_thread(self._owners.read)
        first = asyncio.Event()
        self._task = asyncio.create_task(self._watch(first), name="catalogue")
        waiting = asyncio.ensure_future(first.wait())
        try:
            await asyncio.wait(
                {waiting, self._task}, timeout=_FIRST_SCAN_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            waiting.cancel()

    async def close(self) -> None:
        """Stop watching."""
        await cancel_and_wait(self._task)

    @property
    def models(self) -> tuple[Model, ...]:
        """All models, sorted by name; names are unique."""
        return self._models

    @property
    def unread(self) -> tuple[str, ...]:
        """Stores being scanned for the first time, whose models are not known yet."""
        return tuple(store.place for store in self._stores.values() if store.unread)

    @property
    def digest(self) -> str:
        """Digest of `models`; changes whenever they do."""
        return self._digest

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Problems with stores and names, including reads that get no response."""
        silent = [Path(store.place) for store in self._stores.values() if store.silent]
        unread = [path for path in sorted(self._headers.silent) if not any(map(path.is_relative_to, silent))]
        effect = ", so its models can't be used"
        problems = [*self._problems, *(Problem(shown(no_answer(path, effect))) for path in unread)]
        if self._last_error:
            problems.insert(0, Problem(f"the folders with models can't be read now: {self._last_error}"))
        return tuple(problems)

    def get(self, name: str) -> Model | None:
        """Return the model with this canonical name, ignoring case."""
        key = name.lower()
        return next((model for model in self._models if model.name.lower() == key), None)

    def with_digest(self, digest: str) -> Model | None:
        """Return a model with this content digest that has files here."""
        return next((model for model in self._models if model.digest == digest and model.files), None)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change. Returns a function that unsubscribes."""
        return self._subscribers.add(callback)

    def offer(self, models: tuple[Model, ...]) -> None:
        """Set the models that the local Ollama lists in its API; those also found on disk are left out."""
        if models != self._offered:
            self._offered = models
            self._publish()

    async def refresh(self) -> None:
        """Scan all stores now; only headers of changed files are read.

        A store that does not respond, or takes long, is not waited for.
        """
        async with self._scan_lock:
            # A scan under way may have begun before the change that the caller wants to see.
            await self._wait([store for store in self._stores.values() if not store.silent])
            await self._scan(force=True)

    async def use_settings(self, settings: ModelSettings) -> None:
        """Use other folders and stores from now on. The folder for pulled models stays."""
        self._settings = settings
        try:
            await self.refresh()
        except OSError as error:
            log.warning("the stores can't be read right now: %s", error)

    def use_build(self, build: str) -> None:
        """Set the llama.cpp build that loads models from now on.

        Models that only another build has refused may be tried again."""
        self._build = build
        self._publish()

    async def load_failed(self, digest: str, log_text: str) -> None:
        """Handle a failed load of this content.

        If the log shows that llama.cpp can't read the file, that is remembered."""
        line = format_fault(log_text)
        if line and self._build:
            log.warning("llama.cpp %s can't read the model %s: %s", self._build, digest[:12], line)
            await asyncio.to_thread(self._refused.remember, digest, self._build, line)
            self._publish()

    async def shape(self, name: str) -> Shape:
        """Return the shape of a model on this node, for the footprint.

        Raises:
            LookupError: there is no such model, or its files can't be read; the message says why.
        """
        model = self.get(name)
        if model is None:
            raise LookupError(f"model {name!r} is no longer on this node")
        if model.unusable or not model.files:
            raise LookupError(model.unusable or f"the files of {name!r} can't be read by this node")
        try:
            return await self._headers.shape(model)
        except GgufError as error:
            raise LookupError(str(error)) from None

    async def header(self, model: Model) -> Header:
        """Return the header of a model's files on this node.

        Raises:
            GgufError: they can't be read.
            LookupError: reading them timed out; until it ends, models in their folder are unusable.
        """
        return await self._headers.header(model)

    async def metadata(self, name: str, *, whole: bool = False) -> dict[str, object]:
        """Return the header's key-value pairs, including the projector's (``clip.…``).

        Empty when no header can be read. ``whole``: include the values of long arrays.
        """
        model = self.get(name)
        if model is None or not model.files or model.unusable:
            return {}
        try:
            return await self._headers.metadata(model, whole=whole)
        except (GgufError, LookupError, OSError):
            return {}

    async def _write_demo(self, write: Callable[[Path], object]) -> None:
        path = self.own / f"{DEMO}.gguf"

        def create() -> None:
            self.own.mkdir(parents=True, exist_ok=True)
            write(path)

        try:
            await asyncio.to_thread(create)
        except OSError as error:
            log.warning("there is no model, and no demo model can be written to %s: %s", path, error)
            return
        log.info("no model found; wrote a demo model to %s", path)
        await self.refresh()

    async def _watch(self, first: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        tried = loop.time()
        await self._try(self._first_scan)
        first.set()
        while True:
            await next_turn(self._interval)
            retry = self._problems or any("can't be read" in model.unusable for model in self._local)
            if retry and loop.time() - tried >= _RETRY_SECONDS:
                tried = loop.time()
                await self._try(self.refresh)
            elif await self._try(self._scan_if_changed):
                tried = loop.time()

    async def _first_scan(self) -> None:
        await self.refresh()
        complete = all(store.seen is not None for store in self._stores.values())
        if self._demo is not None and complete and not any(not model.unusable for model in self._models):
            await self._write_demo(self._demo)

    async def _scan_if_changed(self) -> bool:
        async with self._scan_lock:
            return await self._scan(force=False)

    async def _try(self, scan: Callable[[], Awaitable[object]]) -> bool:
        """Run a scan; return False if it failed or found nothing new.

        The watch continues after any error of a store.
        """
        try:
            found = await scan() is not False
        except Exception as error:
            if str(error) != self._last_error:
                self._last_error = str(error)
                unforeseen = not isinstance(error, OSError)
                log.warning("the folders with models can't be read now: %s", error, exc_info=unforeseen)
            return False
        self._last_error = ""
        return found

    def _publish(self) -> None:
        names = {model.name.lower() for model in self._local}
        offered = [model for model in self._offered if model.name.lower() not in names]
        local = [self._as_probed(model) for model in self._local]
        models = tuple(sorted([*local, *offered], key=lambda model: model.name.lower()))
        if models == self._models and self._digest:
            return
        self._models = models
        self._digest = hashlib.sha256(msgspec.msgpack.encode(models)).hexdigest()[:16]
        self._subscribers.notify()

    def _as_probed(self, model: Model) -> Model:
        """Return the model, marked if this llama.cpp build has refused to load it."""
        line = "" if model.only_ollama else self._refused.reason(model.digest, self._build)
        if not line:
            return model
        reason = (
            f"llama.cpp {self._build} refused this file ({line}); only an Ollama can run it. "
            "Fetch another conversion of the model from hf.co to spread it."
        )
        return replace(model, only_ollama=reason)

    async def _scan(self, *, force: bool) -> bool:
        """Scan each store in its own thread and use the available results; return whether there were any.

        ``force``: scan even stores that have not changed.
        """
        places = await asyncio.to_thread(
            find_stores, self._settings, self.own, self._scan_own, self._environ, self._home
        )
        self._stores = {
            key: self._stores.get(key) or Store(place, functools.partial(self._reader.seen, scan))
            for key, (place, scan) in places.items()
        }
        stores = self._stores.values()
        changed = [store.place for store in stores if store.take_result()]
        idle = frozenset() if force else await unchanged(stores)
        await self._wait([store for store in stores if store not in idle and store.begin(force=force)])
        changed += [store.place for store in stores if store.take_result()]
        for store in stores:
            if store.place in changed and (fault := store.fault) is not None:
                unforeseen = None if isinstance(fault, OSError) else fault
                log.warning("%s can't be read right now: %s", store.place, fault, exc_info=unforeseen)
        state = tuple((key, store.silent) for key, store in self._stores.items())
        if changed or state != self._state:
            self._state = state
            self._merge()
        if self._owners_changed:
            self._owners_changed = False
            await asyncio.to_thread(self._owners.write)
        if changed:
            seen = [store.seen for store in stores]
            used = None if None in seen else frozenset[str]().union(*(scan.headers for scan in seen if scan))
            await asyncio.to_thread(self._header_facts.keep, used)
        return bool(changed)

    def _scan_own(self) -> Scan:
        if self._sweep is not None:
            self._sweep(self.own, time.time())
            self._sweep = None
        return folders.scan_own(self.own, DEMO)

    def _merge(self) -> None:
        """Merge the models of all stores into one list."""
        stores = self._stores.values()
        silent = self._headers.silent
        found = (_mark_unreadable(model, silent) for store in stores for model in store.models)
        models, conflicts, changed = self._owners.assign(
            found,
            time.time(),
            settled=all(store.seen is not None for store in stores),
            reading=any(store.unread for store in stores),
        )
        problems = [problem for store in stores for problem in store.problems]
        self._problems = tuple(Problem(shown(p.what), shown(p.fix)) for p in (*problems, *conflicts))
        self._local = tuple(sorted(models, key=lambda model: model.name.lower()))
        self._owners_changed = self._owners_changed or changed
        self._publish()

    async def _wait(self, stores: list[Store]) -> None:
        if jobs := [store.job for store in stores if store.job is not None]:
            await asyncio.wait(jobs, timeout=_SCAN_SECONDS)


def _mark_unreadable(model: Model, silent: frozenset[Path]) -> Model:
    """Mark a model as unusable if reads in its folder, one of ``silent``, do not end."""
    if model.unusable or not silent or not model.files:
        return model
    folder = Path(model.files[0]).parent
    return replace(model, unusable=shown(no_answer(folder))) if folder in silent else model
