"""Adds second names and files to this node's models, and deletes models: only in the daemon's own folder."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from sollold.cluster.net.rpc_server import RpcServer
from sollold.engines.ollama.api import OllamaError
from sollold.errors import system_reason, system_words
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.names import canonical
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.folders import CARD, read_card
from sollold.models.stores.patient_read import PATIENCE, read_patiently
from sollold.models.transfer.fetched_folder import merge_foreign, remove_fetched
from sollold.models.transfer.partial_file import OLD, PARTS, Item, slug
from sollold.models.transfer.peer_source import items_of, paths_of
from sollold.models.transfer.verify import adapters_in


class OwnError(Exception):
    """The operation is impossible; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NameOverrides:
    """The fields of `Model` that a second name overrides; None: unchanged."""

    system: str | None = None
    params: str | None = None
    license: str | None = None
    template: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    def over(self, model: Model) -> Model:
        """Return ``model`` with these overrides."""
        return replace(
            model,
            system=model.system if self.system is None else self.system,
            params=model.params if self.params is None else self.params,
            license=model.license if self.license is None else self.license,
            template=model.template if self.template is None else self.template,
            messages=model.messages if self.messages is None else self.messages,
        )


@dataclass(frozen=True, slots=True)
class NameRequest:
    """Asks a node to give one of its models the second name ``destination``, or to delete ``source``.

    ``digest``: the content to delete, since nodes may have different content under one name; empty: any.
    ``told``: overrides for the second name. ``replace``: replace a model of that name in our own folder.
    """

    source: str
    destination: str = ""
    digest: str = ""
    told: NameOverrides = NameOverrides()
    replace: bool = False


@dataclass(frozen=True, slots=True)
class NameChanged:
    """``ok``: whether it was done; if not, ``reason`` says why, or is empty if there was nothing to do."""

    ok: bool
    reason: str = ""


_NO_OVERRIDES = NameOverrides()
_LINKS = "file-"
"""Prefix of folders, within the daemon's own, with links to a file named by a request."""
_SHARD = re.compile(r"(.+-)\d{5}(-of-\d{5}\.gguf)")


class OwnModels:
    """Copies and deletes models on this node.

    Registers the peer methods ``copy`` and ``delete`` (`NameRequest` → `NameChanged`) with ``server``.
    """

    def __init__(self, catalogue: Catalogue, server: RpcServer) -> None:
        self._catalogue = catalogue
        self.delete_from_ollama: Callable[[str], Awaitable[bool]] | None = None
        """Deletes a model of the local Ollama if the daemon may; raises `OllamaError` if Ollama refuses."""
        self.copy_in_ollama: Callable[[str, str], Awaitable[None]] | None = None
        """Gives a model of the local Ollama a second name; raises `OllamaError` if Ollama refuses."""
        server.method("copy", NameRequest, self._answer_copy)
        server.method("delete", NameRequest, self._answer_delete)

    async def copy(
        self, model: Model, destination: str, told: NameOverrides = _NO_OVERRIDES, *, replace: bool = False
    ) -> None:
        """Give a model on this node a second name, in our own folder; the files are linked, not copied.

        A model of Ollama without readable files gets the name in Ollama. A name that already has
        this content and these settings is left unchanged, so that scripts can be repeated.

        Args:
            told: overrides for the second name.
            replace: whether to replace a model of that name in our own folder.

        Raises:
            OwnError: the name is invalid or taken, the files can't be linked, or Ollama refused.
        """
        try:
            name = canonical(destination)
        except ValueError as error:
            raise OwnError(str(error)) from None
        async with self._catalogue.changing:
            await self._copy(model, name, told, replace=replace)

    async def _copy(self, model: Model, name: str, told: NameOverrides, *, replace: bool) -> None:
        existing = self._catalogue.get(name)
        if existing is not None and told == _NO_OVERRIDES and _is_same(existing, model):
            return
        old = self._own_folder(existing) if existing is not None and replace else None
        if existing is not None and old is None:
            raise OwnError(f"a model {name} already exists; delete it first or choose another name")
        if not model.files:
            await self._copy_in_ollama(model, name, told)
            return
        try:
            items = await read_patiently(partial(items_of, model), model.files[0], PATIENCE)
        except (OSError, LookupError) as error:
            raise OwnError(f"{model.name} can't be read: {system_words(error)}") from None
        try:
            await asyncio.to_thread(_link, self._catalogue.own, told.over(model), items, name, old)
        except OSError as error:
            raise OwnError(f"{self._catalogue.own} can't be written: {system_reason(error)}") from None
        await self._catalogue.refresh()

    async def _copy_in_ollama(self, model: Model, name: str, overrides: NameOverrides) -> None:
        if model.source != "ollama" or self.copy_in_ollama is None or overrides != _NO_OVERRIDES:
            raise OwnError(f"the files of {model.name} can't be read by this node")
        try:
            await self.copy_in_ollama(model.name, name)
        except OllamaError as error:
            raise OwnError(str(error)) from None
        await self._catalogue.refresh()

    async def add_file(self, path: str) -> str:
        """List the model in a GGUF file of this machine and return its name; the file is linked, not copied.

        Raises:
            OwnError: this node can't read the file, or it holds no model.
        """
        try:
            real = await read_patiently(lambda: _readable(path), path, PATIENCE)
        except LookupError as error:
            raise OwnError(str(error)) from None
        # Asked first without the lock: a request may name a file that is listed already.
        if name := await self._model_in(real):
            return name
        async with self._catalogue.changing:
            return await self._model_in(real) or await self._add(path, real)

    async def _add(self, path: str, real: str) -> str:
        try:
            await asyncio.to_thread(_link_file, self._catalogue.own, real)
        except OSError as error:
            raise OwnError(f"{self._catalogue.own} can't be written: {system_reason(error)}") from None
        await self._catalogue.refresh()
        if name := await self._model_in(real):
            return name
        raise OwnError(f"{path} holds no model that can be listed")

    async def _model_in(self, real: str) -> str:
        """Return the listed model with this file; empty when there is none, or a folder does not respond."""
        models = sorted(self._catalogue.models, key=lambda model: bool(model.unusable))

        def look() -> str:
            for model in models:
                if any(os.path.realpath(file) == real for file in model.files):
                    return model.name
            return ""

        with contextlib.suppress(LookupError):
            return await read_patiently(look, real)
        return ""

    async def delete(self, name: str, digest: str = "") -> bool:
        """Delete a model that was fetched or named here; False if it is the user's own, or has other content.

        Raises:
            OwnError: it can't be deleted.
        """
        async with self._catalogue.changing:
            return await self._delete(name, digest)

    async def _delete(self, name: str, digest: str) -> bool:
        model = self._catalogue.get(name)
        if model is not None and digest and model.digest != digest:
            return False
        if model is not None and model.source == "ollama" and self.delete_from_ollama is not None:
            try:
                done = await self.delete_from_ollama(model.name)
            except OllamaError as error:
                raise OwnError(str(error)) from None
            await self._catalogue.refresh()
            return done
        folder = self._own_folder(model) if model is not None else None
        if folder is None:
            return False
        try:
            await asyncio.to_thread(remove_fetched, folder)
        except OSError as error:
            raise OwnError(f"{folder} can't be removed: {system_reason(error)}") from None
        await self._catalogue.refresh()
        return True

    def _own_folder(self, model: Model) -> Path | None:
        """Return the folder of a model that was fetched or named here; None if it is the user's own."""
        if not model.files:
            return None
        folder = Path(model.files[0]).parent
        owned = folder.name.startswith(_LINKS) or (model.source == "own" and read_card(folder) is not None)
        return folder if folder.parent == self._catalogue.own and owned else None

    async def _answer_copy(self, caller: str, request: NameRequest) -> NameChanged:
        model = self._catalogue.get(request.source)
        if model is None:
            return NameChanged(False, f"{request.source} is no longer on this node")
        try:
            await self.copy(model, request.destination, request.told, replace=request.replace)
        except OwnError as error:
            return NameChanged(False, str(error))
        return NameChanged(True)

    async def _answer_delete(self, caller: str, request: NameRequest) -> NameChanged:
        try:
            return NameChanged(await self.delete(request.source, request.digest))
        except OwnError as error:
            return NameChanged(False, str(error))


def _readable(path: str) -> str:
    """Return the real path of a GGUF file.

    Raises:
        OwnError: it is not a GGUF file, or can't be read.
    """
    if not Path(path).is_absolute():
        raise OwnError(f"{path}: give the file's absolute path")
    try:
        real = Path(path).resolve(strict=True)
        # Opening a named pipe would block until its other end is opened.
        if not stat.S_ISREG(real.stat().st_mode):
            raise OwnError(f"{path} is not a file")
        with real.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise OwnError(f"the daemon can't read {path}: {system_reason(error)}") from None
    if magic != b"GGUF":
        raise OwnError(f"{path} is not a GGUF file")
    return str(real)


def _link_file(own: Path, real: str) -> None:
    """Make a folder of links to a file, and to the other shards if it is one of several."""
    target = Path(real)
    folder = own / f"{_LINKS}{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    shard = _SHARD.fullmatch(target.name)
    siblings = [target]
    if shard is not None:
        pattern = re.compile(re.escape(shard[1]) + r"\d{5}" + re.escape(shard[2]))
        siblings = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    for path in siblings:
        link = folder / path.name
        if not link.is_symlink():
            link.symlink_to(path)


def _hard_linked(link: Path, target: Path) -> bool:
    """Make a hard link; return False if the kernel refuses it since the file is another user's.

    We never delete such a file, so a symbolic link will do.

    Raises:
        OSError: it failed for another reason.
    """
    try:
        link.hardlink_to(target)
    except PermissionError:
        if target.stat().st_uid == os.geteuid():
            raise
        return False
    return True


def _is_same(name: Model, model: Model) -> bool:
    """Return whether ``name`` already has the content and the settings of ``model``."""
    settings = NameOverrides(model.system, model.params, model.license, model.template, model.messages)
    return name.digest == model.digest and settings.over(name) == name


def _link(own: Path, model: Model, items: tuple[Item, ...], name: str, old: Path | None) -> None:
    """Make the folder of a second name; on failure, nothing of it is left.

    ``items``: the model's files; ``old``: the folder it replaces, perhaps the very one that it links to.

    Raises:
        OSError: the folder can't be made, as on a full disk.
    """
    folder = own / slug(name, model.digest)
    making = own / f".{folder.name}.new"
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        inside = own.resolve()
        for item, path in zip(items, paths_of(model), strict=True):
            target = Path(path).resolve()
            # If we fetched the files, either of the two names may be deleted first, so link them hard.
            if not (target.is_relative_to(inside) and _hard_linked(making / item.name, target)):
                (making / item.name).symlink_to(target)
        card = replace(
            model,
            name=name,
            source="own",
            files=tuple(item.name for item in items),
            projector="",
            adapters=adapters_in(items),
            named=True,
        )
        (making / CARD).write_bytes(msgspec.json.encode(card))
        _move_into_place(own, making, folder, old)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _move_into_place(own: Path, making: Path, folder: Path, old: Path | None) -> None:
    """Rename the new folder into place, replacing ``old``, which is restored on failure."""
    if old is None:
        making.rename(folder)
        return
    # The name lets `sollold.models.transfer.cleanup` restore it after a crash if the new folder is missing.
    backup = own / PARTS / f"{folder.name}{OLD}"
    backup.parent.mkdir(exist_ok=True)
    merge_foreign(backup, making)
    old.rename(backup)
    try:
        making.rename(folder)
    except OSError:
        backup.rename(old)
        raise
    merge_foreign(backup, folder)
