"""Which models of the library may draft for another."""

from __future__ import annotations

import asyncio
import logging

from sollold.cluster.gossip.record import MTP, NGRAM
from sollold.models.gguf.vocabulary import alike
from sollold.models.library import Library
from sollold.models.model import Model
from sollold.placement.request import AUTO, OFF
from sollold.placement.speculation import Drafter

log = logging.getLogger("sollold.leader")

MOST = 4
"""Models that are looked at."""
SHAPES_SECONDS = 1.0
"""For their headers, of which most are known: a node that has just died must not hold up a recovery."""
SMALLER = 4
"""A draft model has at most this fraction of the model's weights."""


async def drafters(library: Library, me: str, wanted: str, model: Model) -> tuple[Drafter, ...]:
    """The models that may draft for ``model``.

    Args:
        me: this node's id, whose own files are read first.
        wanted: as the setting ``placement.speculation``; for a name, that model alone.
    """
    if wanted in (OFF, NGRAM, MTP) or not model.vocabulary:
        return ()
    if wanted == AUTO:
        found = [one for one in library.with_vocabulary(model.vocabulary) if _is_smaller(one[0][1], model)]
        # The largest are right most often; how long they take is weighed later.
        found.sort(key=lambda holders: (-holders[0][1].parameters, holders[0][1].name))
    else:
        holders = library.find(wanted)
        found = [holders] if holders and _may_draft(holders[0][1], model) else []
    made: dict[str, Drafter] = {}
    try:
        async with asyncio.timeout(SHAPES_SECONDS):
            for holders in found:
                one = holders[0][1]
                if one.digest in made or len(made) >= MOST:
                    continue
                node, there = min(holders, key=lambda pair: (pair[0] != me, pair[0]))
                try:
                    shape = await library.shape(node, there)
                except LookupError as error:
                    log.info("%s", error)
                    continue
                nodes = frozenset(node for node, _ in holders)
                made[one.digest] = Drafter(one.name, one.digest, shape, nodes)
    except TimeoutError:
        log.info("not all headers of models that may draft for %s could be read in time", model.name)
    return tuple(made.values())


def _may_draft(one: Model, model: Model) -> bool:
    able = one.files and not (one.unusable or one.only_ollama or one.projector or one.adapters)
    return bool(able) and one.digest != model.digest and alike(one.vocabulary, model.vocabulary)


def _is_smaller(one: Model, model: Model) -> bool:
    generates = "completion" in one.capabilities
    return _may_draft(one, model) and generates and 0 < one.parameters * SMALLER <= model.parameters
