"""Finds the models of the library that may draft for another."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from sollold.cluster.gossip.record import MTP, NGRAM
from sollold.leader.wish import PlacementWish
from sollold.models.gguf.vocabulary import compatible
from sollold.models.library import Library
from sollold.models.model import Model
from sollold.placement.request import AUTO, OFF, names_drafter, normalised_speculation
from sollold.placement.speculation import Drafter

log = logging.getLogger("sollold.leader")

MOST = 4
"""Maximum number of candidate models."""
SHAPES_SECONDS = 1.0
"""Timeout for reading their headers, in seconds: most are known, and a dead node must not delay recovery."""
SMALLER = 4
"""AUTO considers only draft models with at least this many times fewer weights than the model."""


async def drafters(library: Library, me: str, wanted: str, model: Model) -> tuple[tuple[Drafter, ...], str]:
    """Return the models that may draft for ``model``.

    Args:
        me: this node's id; its own files are preferred.
        wanted: a value as in the setting ``placement.speculation``; a name selects that model alone.

    Returns:
        The models, and why the named one is not among them, as a clause.
    """
    if wanted in (OFF, NGRAM, MTP):
        return (), ""
    if wanted == AUTO and not model.vocabulary:
        return (), ""
    refused = ""
    if wanted == AUTO:
        found = [
            copies for copies in library.with_vocabulary(model.vocabulary) if _is_smaller(copies[0][1], model)
        ]
        # The largest are right most often; their cost is considered later.
        found.sort(key=lambda holders: (-holders[0][1].parameters, holders[0][1].name))
    else:
        holders = library.find(wanted)
        refused = _why_not(holders[0][1], model) if holders else library.resolve(wanted).message
        found = [] if refused else [holders]
    chosen: dict[str, Drafter] = {}
    try:
        async with asyncio.timeout(SHAPES_SECONDS):
            for holders in found:
                candidate = holders[0][1]
                if candidate.digest in chosen or len(chosen) >= MOST:
                    continue
                node, copy = min(holders, key=lambda pair: (pair[0] != me, pair[0]))
                try:
                    shape = await library.shape(node, copy)
                except LookupError as error:
                    log.info("%s", error)
                    refused = refused or str(error)
                    continue
                nodes = frozenset(node for node, _ in holders)
                chosen[candidate.digest] = Drafter(candidate.name, candidate.digest, shape, nodes)
    except TimeoutError:
        log.info("not all headers of models that may draft for %s could be read in time", model.name)
        refused = refused or "its header could not be read in time"
    return tuple(chosen.values()), "" if chosen or wanted == AUTO else refused


def with_drafter_named(library: Library, wish: PlacementWish) -> PlacementWish:
    """Replace the caller's name of the draft model by its canonical name, if it is a known model."""
    if not names_drafter(wish.speculation):
        return wish
    entry = library.get(wish.speculation)
    return wish if entry is None else replace(wish, speculation=entry.model.name)


def missing_drafter(library: Library, setting: str) -> str:
    """Return what is wrong with the model that ``placement.speculation`` names; empty if nothing is."""
    wanted = normalised_speculation(setting)
    if not names_drafter(wanted):
        return ""
    why = library.resolve(wanted).message
    return f"placement.speculation drafts nothing: {why}" if why else ""


def _why_not(drafter: Model, model: Model) -> str:
    """Return why a model can't draft for another, as a clause; empty when it can."""
    if drafter.digest == model.digest:
        return f"{drafter.name} is the model itself"
    if why := drafter.unusable or drafter.only_ollama or ("" if drafter.files else "it has no file"):
        return f"{drafter.name} can't be run here: {why.rstrip('.')}"
    if drafter.only_embeds:
        return f"{drafter.name} only makes embeddings"
    if drafter.adapters:
        return f"{drafter.name} has adapters, and such models can't draft"
    if not compatible(drafter.vocabulary, model.vocabulary):
        return f"{drafter.name} has a different vocabulary from {model.name}"
    return ""


def _is_smaller(drafter: Model, model: Model) -> bool:
    generates = "completion" in drafter.capabilities
    return not _why_not(drafter, model) and generates and 0 < drafter.parameters * SMALLER <= model.parameters
