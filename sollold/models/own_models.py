"""Second names for models, and taking models away: only in our own folder, only what has a card there."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sollold.cluster.peer import PeerServer
from sollold.models.arrival import adapters_in
from sollold.models.catalogue import Catalogue
from sollold.models.folders import CARD, read_card
from sollold.models.landing import slug
from sollold.models.model import Model
from sollold.models.names import canonical
from sollold.models.transfer import items_of, paths_of


class OwnError(Exception):
    """It can't be done; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a second name says otherwise than the first, as in `Model`; None: it says the same."""

    system: str | None = None
    params: str | None = None
    license: str | None = None

    def over(self, model: Model) -> Model:
        """``model`` as it is told of under the second name."""
        return replace(
            model,
            system=model.system if self.system is None else self.system,
            params=model.params if self.params is None else self.params,
            license=model.license if self.license is None else self.license,
        )


@dataclass(frozen=True, slots=True)
class WhatName:
    """Asks a node to name a model of its own also ``destination``, or to delete ``source``.

    ``digest``: the content that is meant, since one name may stand for several; empty: whichever it is.
    """

    source: str
    destination: str = ""
    digest: str = ""
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Changed:
    """Whether it was done; ``reason`` when it could not be, empty when there was nothing to do."""

    ok: bool
    reason: str = ""


_AS_IT_IS = Told()


class OwnModels:
    """This node's side of copying and deleting. Registers the peer methods ``copy`` and ``delete``
    (`WhatName` → `Changed`) with ``server``.
    """

    def __init__(self, catalogue: Catalogue, server: PeerServer) -> None:
        self._catalogue = catalogue
        server.method("copy", WhatName, self._answer_copy)
        server.method("delete", WhatName, self._answer_delete)

    async def copy(self, model: Model, destination: str, told: Told = _AS_IT_IS) -> None:
        """Give content on this node a second name, in our own folder; the files are linked, not copied.

        ``told``: what is said of it under that name.

        Raises:
            OwnError: the name is no name, or taken; or the files can't be linked.
        """
        try:
            name = canonical(destination)
        except ValueError as error:
            raise OwnError(str(error)) from None
        if self._catalogue.get(name) is not None:
            raise OwnError(f"there is a model {name} already; delete it first or choose another name")
        if not model.files:
            raise OwnError(f"the files of {model.name} can't be read by this node")
        try:
            await asyncio.to_thread(_link, self._catalogue.own, told.over(model), name)
        except OSError as error:
            raise OwnError(f"{self._catalogue.own} can't be written: {error.strerror}") from None
        await self._catalogue.refresh()

    async def delete(self, name: str, digest: str = "") -> bool:
        """Remove a model that was fetched or named here; False when it is the user's own, or other content.

        Raises:
            OwnError: it can't be removed.
        """
        model = self._catalogue.get(name)
        if model is not None and digest and model.digest != digest:
            return False
        if model is None or model.source != "own" or not model.files:
            return False
        folder = Path(model.files[0]).parent
        if folder.parent != self._catalogue.own or read_card(folder) is None:
            return False
        try:
            await asyncio.to_thread(shutil.rmtree, folder)
        except OSError as error:
            raise OwnError(f"{folder} can't be removed: {error.strerror}") from None
        await self._catalogue.refresh()
        return True

    async def _answer_copy(self, caller: str, request: WhatName) -> Changed:
        model = self._catalogue.get(request.source)
        if model is None:
            return Changed(False, f"{request.source} is not on this node any more")
        try:
            await self.copy(model, request.destination, request.told)
        except OwnError as error:
            return Changed(False, str(error))
        return Changed(True)

    async def _answer_delete(self, caller: str, request: WhatName) -> Changed:
        try:
            return Changed(await self.delete(request.source, request.digest))
        except OwnError as error:
            return Changed(False, str(error))


def _link(own: Path, model: Model, name: str) -> None:
    items = items_of(model)
    folder = own / slug(name, model.digest)
    making = own / f".{folder.name}.new"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    inside = own.resolve()
    for item, path in zip(items, paths_of(model), strict=True):
        target = Path(path).resolve()
        if target.is_relative_to(inside):
            # Either name may be deleted first.
            (making / item.name).hardlink_to(target)
        else:
            (making / item.name).symlink_to(target)
    card = replace(model, name=name, source="own", files=(), projector="", adapters=adapters_in(items))
    (making / CARD).write_bytes(msgspec.json.encode(card))
    making.rename(folder)
