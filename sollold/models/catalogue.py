"""The models on this machine, from every store, kept current by looking at the folders' stamps."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.config import ModelSettings
from sollold.models import folders, gguf, huggingface, ollama_store
from sollold.models.attachments import with_adapters, with_projector
from sollold.models.card import Card, Cards, template_capabilities
from sollold.models.found import Found, Problem, Scan
from sollold.models.gguf import GgufError
from sollold.models.identity import joined
from sollold.models.leftovers import sweep
from sollold.models.model import Model
from sollold.models.names import LONGEST, parse
from sollold.models.probe import Refused, format_fault
from sollold.models.shape import Shape, shape_of

log = logging.getLogger("sollold.models")

DEMO = "demo"
_LOOK = 5.0
"""Seconds between two looks at the stamps: a thousand of them take about two milliseconds."""
_RETRY = 60.0
"""Seconds after which what could not be read is tried again though no stamp changed (``chmod``, say)."""
_FIRST = 5.0
"""Seconds for which a start waits for the first look: hundreds of headers never seen take longer."""
_SHAPES = 8


def own_folder(settings: ModelSettings, state_dir: Path) -> Path:
    """Where fetched models go."""
    return Path(settings.download_dir).expanduser() if settings.download_dir else state_dir / "models"


class Catalogue:
    """What this node has. `start` it once; reading never waits; `close` ends the watch."""

    def __init__(
        self,
        settings: ModelSettings,
        state_dir: Path,
        *,
        demo: Callable[[Path], object] | None = None,
        environ: Mapping[str, str] | None = None,
        home: Path | None = None,
        interval: float = _LOOK,
    ) -> None:
        """``demo`` writes the demo model to a path, whole or not at all; called if there is no model."""
        self.own = own_folder(settings, state_dir)
        self._settings = settings
        self._links = state_dir / "links"
        self._cards = Cards(state_dir / "headers.json")
        self._refused = Refused(state_dir / "refused.json")
        self._build = ""
        self._demo = demo
        self._environ = os.environ if environ is None else environ
        self._home = Path.home() if home is None else home
        self._interval = interval
        self._scan = Scan()
        self._problems: tuple[Problem, ...] = ()
        self._local: tuple[Model, ...] = ()
        self._offered: tuple[Model, ...] = ()
        self._models: tuple[Model, ...] = ()
        self._digest = ""
        self._callbacks: list[Callable[[], None]] = []
        self._shapes: dict[str, Shape] = {}
        self._task: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._said = ""
        """What kept us from looking the last time; it is logged once."""

    async def start(self) -> None:
        """Look at all stores, then watch them. Returns after the first look, or while a long one goes on."""
        await asyncio.to_thread(sweep, self.own, time.time())
        await asyncio.to_thread(self._cards.load)
        await asyncio.to_thread(self._refused.load)
        first = asyncio.Event()
        self._task = asyncio.create_task(self._watch(first), name="catalogue")
        waiting = asyncio.ensure_future(first.wait())
        try:
            await asyncio.wait({waiting, self._task}, timeout=_FIRST, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    async def close(self) -> None:
        """End the watch."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def models(self) -> tuple[Model, ...]:
        """All models by name; no two of one name."""
        return self._models

    @property
    def digest(self) -> str:
        """Changes whenever `models` does."""
        return self._digest

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps models from being seen."""
        return self._problems

    def get(self, name: str) -> Model | None:
        """The model of this canonical name."""
        return next((model for model in self._models if model.name == name), None)

    def with_digest(self, digest: str) -> Model | None:
        """A model of this content that has files here."""
        return next((model for model in self._models if model.digest == digest and model.files), None)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the answer ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    def offer(self, models: tuple[Model, ...]) -> None:
        """Models that the local Ollama names by its API; those also found on disk are left out."""
        if models != self._offered:
            self._offered = models
            self._publish()

    async def refresh(self) -> None:
        """Look at all stores now; headers are read only of files that changed."""
        async with self._looking:
            scan, models = await asyncio.to_thread(self._look)
            self._scan = scan
            self._problems = tuple(Problem(shown(one.what), shown(one.mend)) for one in scan.problems)
            self._local = models
            self._publish()

    async def use(self, settings: ModelSettings) -> None:
        """Other folders and stores from now on. The folder for what is fetched stays."""
        self._settings = settings
        try:
            await self.refresh()
        except OSError as error:
            log.warning("the stores can't be looked at just now: %s", error)

    def use_build(self, build: str) -> None:
        """This llama.cpp loads models from now on: what an earlier one refused may be tried again."""
        self._build = build
        self._publish()

    async def load_failed(self, digest: str, log_text: str) -> None:
        """A load of this content failed: if the log says that llama.cpp can't read the file, remember it."""
        line = format_fault(log_text)
        if line and self._build:
            log.warning("llama.cpp %s can't read the model %s: %s", self._build, digest[:12], line)
            await asyncio.to_thread(self._refused.remember, digest, self._build, line)
            self._publish()

    async def shape(self, name: str) -> Shape:
        """The shape of a model here, for the footprint.

        Raises:
            LookupError: no such model, or its files can't be read; the message says why.
        """
        model = self.get(name)
        if model is None:
            raise LookupError(f"model {name!r} is not on this node any more")
        if model.unusable or not model.files:
            raise LookupError(model.unusable or f"the files of {name!r} can't be read by this node")
        shape = self._shapes.get(model.digest)
        if shape is None:
            try:
                shape = await asyncio.to_thread(_shape, model)
            except GgufError as error:
                raise LookupError(str(error)) from None
            while len(self._shapes) >= _SHAPES:
                del self._shapes[next(iter(self._shapes))]
            self._shapes[model.digest] = shape
        return shape

    async def metadata(self, name: str) -> dict[str, object]:
        """The header's key-value pairs without long arrays; empty when there is none to read."""
        model = self.get(name)
        if model is None or not model.files or model.unusable:
            return {}
        try:
            return await asyncio.to_thread(_metadata, model.files)
        except GgufError:
            return {}

    async def _write_demo(self, write: Callable[[Path], object]) -> None:
        path = self.own / f"{DEMO}.gguf"

        def put() -> None:
            self.own.mkdir(parents=True, exist_ok=True)
            write(path)

        try:
            await asyncio.to_thread(put)
        except OSError as error:
            log.warning("there is no model, and no demo model can be written to %s: %s", path, error)
            return
        log.info("no model found; wrote a demo model to %s", path)
        await self.refresh()

    async def _watch(self, first: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        tried = loop.time()
        await self._try(self._look_first)
        first.set()
        while True:
            await asyncio.sleep(self._interval)
            again = self._problems or self._some_unread()
            if again and loop.time() - tried >= _RETRY:
                tried = loop.time()
                await self._try(self.refresh)
            elif await self._try(self._look_if_changed):
                tried = loop.time()

    async def _look_first(self) -> None:
        await self.refresh()
        if self._demo is not None and not any(not model.unusable for model in self._models):
            await self._write_demo(self._demo)

    async def _look_if_changed(self) -> bool:
        if not await asyncio.to_thread(self._scan.changed):
            return False
        await self.refresh()
        return True

    async def _try(self, look: Callable[[], Awaitable[object]]) -> bool:
        """Whether it came to something. Whatever is wrong with a store: the watch goes on."""
        try:
            done = await look() is not False
        except Exception as error:
            if str(error) != self._said:
                self._said = str(error)
                unforeseen = not isinstance(error, OSError)
                log.warning("the stores can't be looked at just now: %s", error, exc_info=unforeseen)
            return False
        self._said = ""
        return done

    def _some_unread(self) -> bool:
        return any("can't be read" in model.unusable for model in self._local)

    def _publish(self) -> None:
        have = {model.name.lower() for model in self._local}
        offered = [model for model in self._offered if model.name.lower() not in have]
        local = [self._as_probed(model) for model in self._local]
        models = tuple(sorted([*local, *offered], key=lambda model: model.name.lower()))
        if models == self._models and self._digest:
            return
        self._models = models
        self._digest = hashlib.sha256(msgspec.msgpack.encode(models)).hexdigest()[:16]
        for callback in tuple(self._callbacks):
            callback()

    def _as_probed(self, model: Model) -> Model:
        """With what loading it has taught."""
        line = "" if model.only_ollama else self._refused.reason(model.digest, self._build)
        if not line:
            return model
        reason = (
            f"llama.cpp {self._build} refused this file ({line}); only an Ollama can run it. "
            "Fetch another conversion of the model from hf.co to spread it."
        )
        return replace(model, only_ollama=reason)

    def _look(self) -> tuple[Scan, tuple[Model, ...]]:
        """In a thread: all stores, then the headers of what changed."""
        total = Scan()
        for root in ollama_store.roots(self._settings.ollama_stores, environ=self._environ, home=self._home):
            total.add(ollama_store.scan(root))
        total.add(folders.scan_own(self.own, DEMO))
        for path in self._settings.folders:
            total.add(folders.scan_folder(Path(path).expanduser()))
        if self._settings.huggingface:
            for cache in huggingface.caches(self._environ, self._home):
                total.add(huggingface.scan(cache))
            total.add(folders.scan_llama_cache(folders.llama_cache(self._environ, self._home)))
        models = self._models_of(total.found)
        self._cards.keep()
        return total, models

    def _models_of(self, found: list[Found]) -> tuple[Model, ...]:
        models: dict[str, Model] = {}
        for one in found:
            try:
                model = self._model(one)
            except OSError as error:
                reason = f"{error.filename} can't be read or made: {error.strerror}."
                model = replace(_without_card(one), unusable=reason)
            if model is None:
                continue
            other = models.get(model.name.lower())
            if other is not None and other.digest != model.digest:
                model = replace(model, name=apart(model.name, model.digest))
            models.setdefault(model.name.lower(), model)
        return tuple(sorted(models.values(), key=lambda model: model.name.lower()))

    def _model(self, found: Found) -> Model | None:
        """The model of what a store listed; None for what is no model (an adapter, a projector)."""
        if odd := [path for path in (*found.files, found.projector, *found.adapters) if not _tellable(path)]:
            reason = f"The path {shown(odd[0])} is not UTF-8, so no other node can be told it: rename it."
            found = replace(found, files=(), projector="", adapters=(), unusable=reason)
        if found.unusable or found.format != "gguf":
            return _without_card(found)
        card = self._cards.card(found.files)
        if card.kind != "model":
            return None
        if card.unusable:
            return replace(_without_card(found), unusable=card.unusable)
        projector, vision = found.projector, False
        digests = [card.digest]
        if projector:
            other = self._cards.card((projector,))
            if other.unusable or other.kind == "model":
                projector = ""
            else:
                digests.append(other.digest)
                vision = True
        digests += [self._cards.card((path,)).digest for path in found.adapters]
        files = self._proper(card) if len(card.files) > 1 else card.files
        can = [*card.capabilities, *template_capabilities(found.template), *found.capabilities]
        if vision:
            can.append("vision")
        return Model(
            name=found.name,
            digest=joined(digests),
            source=found.source,
            files=files,
            size=card.size + sum(_size(path) for path in (projector, *found.adapters) if path),
            modified=found.modified or _modified(files),
            projector=projector,
            adapters=found.adapters,
            architecture=card.architecture,
            layers=card.layers,
            parameters=card.parameters,
            quantization=card.quantization,
            context_train=card.context_train,
            capabilities=tuple(dict.fromkeys(can)),
            template=found.template,
            system=found.system,
            params=found.params,
            license=found.license,
            only_ollama=card.only_ollama,
            manifest=found.manifest,
        )

    def _proper(self, card: Card) -> tuple[str, ...]:
        """Shards under names that llama.cpp knows as such: links in our own folder if they have none.

        llama.cpp finds the other shards by the first one's name, so each needs the ending and its number.
        """
        count = len(card.files)
        if all(path.endswith(f"-{k:05}-of-{count:05}.gguf") for k, path in enumerate(card.files, 1)):
            return card.files
        folder = self._links / card.digest[:32]
        links = [folder / f"model-{k:05}-of-{count:05}.gguf" for k in range(1, count + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        for link, path in zip(links, card.files, strict=True):
            if not link.is_symlink() or str(link.readlink()) != path:
                new = link.with_suffix(".new")
                new.unlink(missing_ok=True)
                new.symlink_to(path)
                new.replace(link)
        return tuple(map(str, links))


def apart(name: str, digest: str) -> str:
    """A name for a model whose own name belongs to other content: the digest's beginning in the tag."""
    parsed = parse(name)
    ending = f"-{digest[:8]}"
    tag = parsed.tag[: max(1, LONGEST - len(name) + len(parsed.tag) - len(ending))]
    return str(replace(parsed, tag=f"{tag}{ending}"))


def shown(path: str) -> str:
    """A path, or a text with one, as it can be told anywhere: what is not UTF-8 in it is replaced."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _tellable(path: str) -> bool:
    return shown(path) == path


def _without_card(found: Found) -> Model:
    only = ""
    if found.format == "safetensors":
        only = "Its weights are safetensors, which llama.cpp does not read; only Ollama can run it."
    return Model(
        name=found.name,
        digest=found.manifest or hashlib.sha256("\n".join((found.name, *found.files)).encode()).hexdigest(),
        source=found.source,
        files=found.files,
        size=found.size or sum(_size(path) for path in found.files),
        modified=found.modified or _modified(found.files),
        architecture=found.architecture,
        quantization=found.quantization,
        context_train=found.context_train,
        capabilities=found.capabilities,
        template=found.template,
        system=found.system,
        params=found.params,
        license=found.license,
        unusable=found.unusable,
        only_ollama=only,
        manifest=found.manifest,
    )


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _modified(files: tuple[str, ...]) -> float:
    try:
        return max((Path(path).stat().st_mtime for path in files), default=0.0)
    except OSError:
        return 0.0


def _shape(model: Model) -> Shape:
    """Of the model with what is loaded beside it."""
    shape = shape_of(gguf.read_files(model.files))
    if model.projector:
        shape = with_projector(shape, gguf.read(model.projector))
    return with_adapters(shape, [gguf.read(adapter) for adapter in model.adapters])


def _metadata(files: tuple[str, ...]) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for key, value in gguf.read_files(files).metadata.items():
        if not isinstance(value, gguf.Array):
            pairs[key] = value
        elif value.values is not None and len(value.values) <= 64:
            pairs[key] = list(value.values)
    return pairs
