"""Decides whether a machine without the file should fetch it and run the model. Pure."""

from __future__ import annotations

from dataclasses import replace

from sollold.facts import dataclass
from sollold.leader.snapshot import ClusterSnapshot, runs_on_llama
from sollold.placement.evaluate import Candidate
from sollold.placement.inventory import Fleet, Link, links_between
from sollold.placement.planner import CLEAR_GAIN, FootprintOf, PlacementChoice, choose
from sollold.placement.request import PlacementRequest

ANSWERED = 2000
"""Tokens that a model is assumed to generate before it is unloaded: a few answers."""


@dataclass(frozen=True, slots=True)
class PlacementWithoutFile:
    """A placement whose head does not have the file yet."""

    choice: PlacementChoice
    fleet: Fleet
    candidate: Candidate


def place_with_fetch(
    request: PlacementRequest,
    snapshot: ClusterSnapshot,
    build: str,
    footprint_with: FootprintOf,
    size: int,
    now: Candidate | None,
) -> PlacementWithoutFile | None:
    """Return a placement with another head that is better even with the copy; None when there is none.

    Args:
        size: bytes of the model's files.
        now: the placement possible with the files where they are; None if there is none.
    """
    limit = snapshot.settings.models.fetch_seconds
    if limit <= 0 or request.fixed or (now is not None and now.alone and not now.on_host):
        return None
    fleet = snapshot.fleet(build, anywhere=True)
    holding = [node for node, model in snapshot.holders if runs_on_llama(model)]
    variants = [replace(request, distributed=False, always=False)] if not request.always else []
    if now is None:
        variants.append(request)
    for variant in variants:
        choice = choose(variant, fleet, footprint_with, snapshot.correction)
        candidate = choice.candidate
        if candidate is None or candidate.head.node in holding:
            continue
        links = links_between(fleet.machines, candidate.head)
        seconds = size / max(links.get(node, Link()).bandwidth for node in holding)
        if seconds <= limit and (now is None or _pays(candidate, seconds, now)):
            return PlacementWithoutFile(choice, fleet, candidate)
    return None


def _pays(candidate: Candidate, seconds: float, now: Candidate) -> bool:
    """Return whether the gain in loading and answering outweighs the copy.

    A model that one machine can run alone moves only if the other machine is clearly faster.
    """
    if candidate.run.request_context < now.run.request_context:
        return False
    if now.alone and candidate.seconds * CLEAR_GAIN > now.seconds:
        return False
    total = seconds + candidate.load + ANSWERED * candidate.seconds
    return total < now.load + ANSWERED * now.seconds
