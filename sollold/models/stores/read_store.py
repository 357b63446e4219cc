"""Turns a store's listing into models: each with its header's facts, and paths that llama.cpp understands."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sollold.errors import system_reason
from sollold.models.model import Model
from sollold.models.stores.content_digest import joined
from sollold.models.stores.header_facts import HeaderFacts, HeaderFactsCache, fits, template_capabilities
from sollold.models.stores.scan_result import FoundModel, Scan, unreadable
from sollold.models.stores.store_watcher import Seen
from sollold.models.templates.jinja import RAW

log = logging.getLogger("sollold.models")

_UNFINISHED = (".aria2", ".st")
"""Suffixes of the files that aria2 and axel keep beside a download until it is complete. That has its final
name and size from the beginning."""


class Reader:
    """Reads headers through the cache ``facts``. Blocks; may be called in several threads."""

    def __init__(self, facts: HeaderFactsCache, links: Path) -> None:
        """``links``: folder of the daemon for links to shards that lack proper names."""
        self._facts = facts
        self._links = links
        self._logged: set[tuple[str, str]] = set()

    def seen(self, scan: Callable[[], Scan], on_progress: Callable[[], None]) -> Seen:
        """Run ``scan`` on a store and read the headers of changed files; a `Look` once ``scan`` is bound."""
        found, used, models = scan(), set[str](), list[Model]()
        for listed in found.found:
            on_progress()
            try:
                model = self._model(listed, used)
            except OSError as error:
                reason = f"{error.filename} can't be read or created: {system_reason(error)}."
                model = replace(_without_facts(listed), unusable=reason)
            if model is not None:
                models.append(model)
        return Seen(found, tuple(models), frozenset(used))

    def _model(self, found: FoundModel, used: set[str]) -> Model | None:
        """Return the model that a store listed; None if it is an adapter or a projector."""
        if bad := [path for path in (*found.files, found.projector, *found.adapters) if shown(path) != path]:
            reason = (
                f"The path {shown(bad[0])} is not valid UTF-8, so it can't be sent to other nodes: rename it."
            )
            found = replace(found, files=(), projector="", adapters=(), unusable=reason)
        elif found.source != "ollama" and (reason := _unfinished((*found.files, found.projector))):
            found = unreadable(found, reason)
        if found.unusable or found.format != "gguf":
            return _without_facts(found)
        facts = self._facts.of(found.files, used)
        if facts.kind != "model":
            return None
        if facts.unusable:
            return replace(_without_facts(found), unusable=facts.unusable)
        if fault := self._attachment_fault(found, used):
            return replace(_without_facts(found), unusable=fault)
        projector_facts = self._projector(found, facts, used)
        projector = found.projector if projector_facts is not None else ""
        digests = [facts.digest, *([projector_facts.digest] if projector_facts is not None else [])]
        digests += [self._facts.of((path,), used).digest for path in found.adapters]
        files = self._linked_shards(facts) if len(facts.files) > 1 else facts.files
        capabilities = [*facts.capabilities, *template_capabilities(found.template), *found.capabilities]
        if projector_facts is not None:
            capabilities.append("vision")
        template = found.template
        if not template and not facts.chat_template and "completion" in capabilities:
            template = RAW
            notice = f"{found.name} has no chat template: the user's message alone is its prompt"
            self._log_once(found.name, facts.digest, notice)
        return Model(
            name=found.name,
            digest=joined(digests),
            source=found.source,
            files=files,
            size=facts.size + sum(_size(path) for path in (projector, *found.adapters) if path),
            modified=found.modified or _modified(files),
            projector=projector,
            adapters=found.adapters,
            architecture=facts.architecture,
            layers=facts.layers,
            width=max(facts.widths, default=0),
            listed_size=found.size if found.source == "ollama" else 0,
            parent=found.parent,
            parameters=facts.parameters,
            quantization=facts.quantization,
            context_train=facts.context_train,
            vocabulary=facts.vocabulary,
            capabilities=tuple(dict.fromkeys(capabilities)),
            template=template,
            system=found.system,
            messages=found.messages,
            params=found.params,
            license=found.license,
            only_ollama=facts.only_ollama,
            manifest=found.manifest,
            named=found.named,
            version=found.version,
        )

    def _attachment_fault(self, found: FoundModel, used: set[str]) -> str:
        """Return why an adapter, or a projector named by a card or a manifest, can't be used."""
        named = found.source in ("own", "ollama") and found.projector
        for path in (*found.adapters, *((found.projector,) if named else ())):
            if reason := self._facts.of((path,), used).unusable:
                return f"{path} can't be used: {reason}"
        return ""

    def _projector(self, found: FoundModel, facts: HeaderFacts, used: set[str]) -> HeaderFacts | None:
        """Return the facts of the model's projector; None if it has none that fits."""
        if not found.projector:
            return None
        projector = self._facts.of((found.projector,), used)
        if projector.unusable or projector.kind == "model":
            return None
        if not fits(facts, projector):
            notice = f"{found.projector} does not fit {found.name}, which runs without it"
            self._log_once(found.name, found.projector, notice)
            return None
        return projector

    def _log_once(self, name: str, subject: str, message: str) -> None:
        """Log a message once per name and subject."""
        if (name, subject) not in self._logged:
            self._logged.add((name, subject))
            log.info("%s", message)

    def _linked_shards(self, facts: HeaderFacts) -> tuple[str, ...]:
        """Return shard paths that llama.cpp recognizes: links to the files if their own names don't fit.

        llama.cpp finds the other shards by the first one's name, so each needs the suffix and its number.
        """
        count = len(facts.files)
        if all(path.endswith(f"-{k:05}-of-{count:05}.gguf") for k, path in enumerate(facts.files, 1)):
            return facts.files
        folder = self._links / facts.digest[:32]
        links = [folder / f"model-{k:05}-of-{count:05}.gguf" for k in range(1, count + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        for link, path in zip(links, facts.files, strict=True):
            if not link.is_symlink() or str(link.readlink()) != path:
                new = link.with_suffix(".new")
                new.unlink(missing_ok=True)
                new.symlink_to(path)
                new.replace(link)
        return tuple(map(str, links))


def shown(path: str) -> str:
    """Return a path, or text containing one, in displayable form: bytes that are not UTF-8 are replaced."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _unfinished(paths: tuple[str, ...]) -> str:
    """Return why a file is not complete yet, as a sentence; empty if nothing shows that."""
    states = (path + suffix for path in paths if path for suffix in _UNFINISHED)
    if state := next((state for state in states if os.path.exists(state)), ""):  # noqa: PTH110 (may raise)
        return f"Its download is not complete: {state} is there. Complete it with the program that began it."
    return ""


def _without_facts(found: FoundModel) -> Model:
    reason = ""
    if found.format == "safetensors":
        reason = "Its weights are safetensors, which llama.cpp does not read; only Ollama can run it."
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
        messages=found.messages,
        params=found.params,
        license=found.license,
        unusable=found.unusable,
        only_ollama=reason,
        manifest=found.manifest,
        named=found.named,
        version=found.version,
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
