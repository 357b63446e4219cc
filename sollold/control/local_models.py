"""Second names for models, files that a request names, and taking models away: only in our own folder."""

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
from pathlib import Path

import msgspec

from sollold.cluster.net.rpc_server import Peers
from sollold.engines.ollama.api import OllamaError
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.names import canonical
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.folders import CARD, read_card
from sollold.models.stores.patient_read import PATIENCE, read_patiently
from sollold.models.transfer.partial_file import OLD, PARTS, slug
from sollold.models.transfer.peer_source import items_of, paths_of
from sollold.models.transfer.verify import adapters_in


class OwnError(Exception):
    """It can't be done; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NameOverrides:
    """What a second name says otherwise than the first, as in `Model`; None: it says the same."""

    system: str | None = None
    params: str | None = None
    license: str | None = None
    template: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    def over(self, model: Model) -> Model:
        """``model`` as it is told of under the second name."""
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
    """Asks a node to name a model of its own also ``destination``, or to delete ``source``.

    ``digest``: the content that is meant, since one name may stand for several; empty: whichever it is.
    ``replace``: a model that has got the name in our own folder gives way.
    """

    source: str
    destination: str = ""
    digest: str = ""
    told: NameOverrides = NameOverrides()
    replace: bool = False


@dataclass(frozen=True, slots=True)
class NameChanged:
    """Whether it was done; ``reason`` when it could not be, empty when there was nothing to do."""

    ok: bool
    reason: str = ""


_AS_IT_IS = NameOverrides()
_LINKED = "file-"
"""Begins the names of folders in our own that hold links to a file which a request named."""
_SHARD = re.compile(r"(.+-)\d{5}(-of-\d{5}\.gguf)")


class OwnModels:
    """This node's side of copying and deleting. Registers the peer methods ``copy`` and ``delete``
    (`NameRequest` → `NameChanged`) with ``server``.
    """

    def __init__(self, catalogue: Catalogue, server: Peers) -> None:
        self._catalogue = catalogue
        self.delete_from_ollama: Callable[[str], Awaitable[bool]] | None = None
        """Deletes a model of the Ollama here if the daemon may; raises `OllamaError` when that refuses."""
        self.copy_in_ollama: Callable[[str, str], Awaitable[None]] | None = None
        """Gives a model of the Ollama here a second name; raises `OllamaError` when that refuses."""
        server.method("copy", NameRequest, self._answer_copy)
        server.method("delete", NameRequest, self._answer_delete)

    async def copy(
        self, model: Model, destination: str, told: NameOverrides = _AS_IT_IS, *, replace: bool = False
    ) -> None:
        """Give content on this node a second name, in our own folder; the files are linked, not copied.

        An Ollama's without readable files gets it there. ``told``: what is said of it under that name;
        ``replace``: what has that name in our own folder gives way. A name that stands for just that already
        stays as it is, so that a script may be run again.

        Raises:
            OwnError: the name is no name, or taken; or the files can't be linked, or the Ollama refused.
        """
        try:
            name = canonical(destination)
        except ValueError as error:
            raise OwnError(str(error)) from None
        before = self._catalogue.get(name)
        if before is not None and told == _AS_IT_IS and _stands_for(before, model):
            return
        old = self._own_folder(before) if before is not None and replace else None
        if before is not None and old is None:
            raise OwnError(f"a model {name} already exists; delete it first or choose another name")
        if not model.files:
            await self._copy_in_ollama(model, name, told)
            return
        try:
            await asyncio.to_thread(_link, self._catalogue.own, told.over(model), name, old)
        except OSError as error:
            raise OwnError(f"{self._catalogue.own} can't be written: {error.strerror}") from None
        await self._catalogue.refresh()

    async def _copy_in_ollama(self, model: Model, name: str, told: NameOverrides) -> None:
        if model.source != "ollama" or self.copy_in_ollama is None or told != _AS_IT_IS:
            raise OwnError(f"the files of {model.name} can't be read by this node")
        try:
            await self.copy_in_ollama(model.name, name)
        except OllamaError as error:
            raise OwnError(str(error)) from None
        await self._catalogue.refresh()

    async def add_file(self, path: str) -> str:
        """The name of the model in a GGUF file of this machine. From then on it is listed like others; the
        file is linked, not copied.

        Raises:
            OwnError: this node can't read it, or it holds no model.
        """
        try:
            real = await read_patiently(lambda: _readable(path), path, PATIENCE)
        except LookupError as error:
            raise OwnError(str(error)) from None
        if name := await self._model_in(real):
            return name
        try:
            await asyncio.to_thread(_link_file, self._catalogue.own, real)
        except OSError as error:
            raise OwnError(f"{self._catalogue.own} can't be written: {error.strerror}") from None
        await self._catalogue.refresh()
        if name := await self._model_in(real):
            return name
        raise OwnError(f"{path} holds no model that can be listed")

    async def _model_in(self, real: str) -> str:
        """The listed model whose weights are in this file; empty: none, or a folder does not answer."""
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
        """Remove a model that was fetched or named here; False when it is the user's own, or other content.

        Raises:
            OwnError: it can't be removed.
        """
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
            await asyncio.to_thread(shutil.rmtree, folder)
        except OSError as error:
            raise OwnError(f"{folder} can't be removed: {error.strerror}") from None
        await self._catalogue.refresh()
        return True

    def _own_folder(self, model: Model) -> Path | None:
        """Where a model that was fetched or named here lies; None: it is the user's own."""
        if not model.files:
            return None
        folder = Path(model.files[0]).parent
        ours = folder.name.startswith(_LINKED) or (model.source == "own" and read_card(folder) is not None)
        return folder if folder.parent == self._catalogue.own and ours else None

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
    """The real path of a GGUF file.

    Raises:
        OwnError: it is none, or can't be read.
    """
    if not Path(path).is_absolute():
        raise OwnError(f"{path}: name the file by its whole path")
    try:
        real = Path(path).resolve(strict=True)
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(real.stat().st_mode):
            raise OwnError(f"{path} is not a file")
        with real.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise OwnError(f"the daemon can't read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise OwnError(f"{path} is not a GGUF file")
    return str(real)


def _link_file(own: Path, real: str) -> None:
    """A folder of links to a file, and to the other shards where it is one of several."""
    target = Path(real)
    folder = own / f"{_LINKED}{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    shard = _SHARD.fullmatch(target.name)
    siblings = [target]
    if shard is not None:
        alike = re.compile(re.escape(shard[1]) + r"\d{5}" + re.escape(shard[2]))
        siblings = [one for one in target.parent.iterdir() if alike.fullmatch(one.name)]
    for one in siblings:
        link = folder / one.name
        if not link.is_symlink():
            link.symlink_to(one)


def _hard_linked(link: Path, target: Path) -> bool:
    """Whether it could be made: the kernel refuses it for another user's file, which we never delete.

    Raises:
        OSError: it was refused for another reason.
    """
    try:
        link.hardlink_to(target)
    except PermissionError:
        if target.stat().st_uid == os.geteuid():
            raise
        return False
    return True


def _stands_for(name: Model, model: Model) -> bool:
    """Whether ``name`` has the content of ``model`` and says of it what ``model`` does."""
    said = NameOverrides(model.system, model.params, model.license, model.template, model.messages)
    return name.digest == model.digest and said.over(name) == name


def _link(own: Path, model: Model, name: str, old: Path | None) -> None:
    """``old``: the folder that gives way, perhaps the very one that is linked to. Nothing half-made is left.

    Raises:
        OSError: it can't be made, as on a full disk.
    """
    items = items_of(model)
    folder = own / slug(name, model.digest)
    making = own / f".{folder.name}.new"
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        inside = own.resolve()
        for item, path in zip(items, paths_of(model), strict=True):
            target = Path(path).resolve()
            # Of two names of what we fetched either may be deleted first.
            if not (target.is_relative_to(inside) and _hard_linked(making / item.name, target)):
                (making / item.name).symlink_to(target)
        card = replace(model, name=name, source="own", files=(), projector="", adapters=adapters_in(items))
        (making / CARD).write_bytes(msgspec.json.encode(card))
        _put(own, making, folder, old)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _put(own: Path, making: Path, folder: Path, old: Path | None) -> None:
    """Rename what was made into its place; ``old`` gives way, and is back where that fails."""
    if old is None:
        making.rename(folder)
        return
    # Named so that what is killed in between can be put back, unless the new one is there
    # (`sollold.models.transfer.cleanup`).
    aside = own / PARTS / f"{folder.name}{OLD}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        making.rename(folder)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
