"""Whether another machine should get the file and run the model, rather than those that have it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sollold.leader.world import World, runs_on_llama
from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement.draft import Draft
from sollold.placement.fleet import Fleet, Link, links_between
from sollold.placement.planner import CLEAR_GAIN, Choice, choose
from sollold.placement.wish import Wish

ANSWERED = 2000
"""Tokens that a model is taken to generate before it is unloaded: some answers."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A placement whose head does not have the file yet; ``seconds``: for the copy, at a guess."""

    choice: Choice
    fleet: Fleet
    draft: Draft
    seconds: float


def elsewhere(
    wish: Wish, world: World, build: str, prints: Callable[[Run], Footprint], size: int, now: Draft | None
) -> Elsewhere | None:
    """A head that would be better off with the file, copy included; None when there is none.

    Args:
        size: bytes of the model's files.
        now: the placement that is possible with the files where they are; None: there is none.
    """
    limit = world.settings.models.fetch_seconds
    if limit <= 0 or wish.fixed or wish.head or (now is not None and now.alone and not now.on_host):
        return None
    fleet = world.fleet(build, anywhere=True)
    holding = [node for node, model in world.holders if runs_on_llama(model)]
    ways = [replace(wish, distributed=False, always=False)] if not wish.always else []
    if now is None:
        ways.append(wish)
    for way in ways:
        choice = choose(way, fleet, prints, world.correction)
        draft = choice.draft
        if draft is None or draft.head.node in holding:
            continue
        links = links_between(fleet.machines, draft.head)
        seconds = size / max(links.get(node, Link()).bandwidth for node in holding)
        if seconds <= limit and (now is None or _pays(draft, seconds, now)):
            return Elsewhere(choice, fleet, draft, seconds)
    return None


def _pays(draft: Draft, seconds: float, now: Draft) -> bool:
    """Whether what is gained while it is loaded and answers outweighs the copy.

    What one machine does alone is given to another only for being clearly quicker there.
    """
    if draft.run.context // draft.run.slots < now.run.context // now.run.slots:
        return False
    if now.alone and draft.seconds * CLEAR_GAIN > now.seconds:
        return False
    there = seconds + draft.load + ANSWERED * draft.seconds
    return there < now.load + ANSWERED * now.seconds
