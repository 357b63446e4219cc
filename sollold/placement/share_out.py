"""Layers shared out by a policy that is not after speed, or by counts that the user fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sollold.machine.device import Kind
from sollold.placement.draft import Draft, Hold
from sollold.placement.fleet import Link, Machine, Spot, links_between
from sollold.placement.proportion import Room, by_count, by_room
from sollold.placement.rung import Alternative, Rung
from sollold.placement.wish import MOST_DEVICES, Policy
from sollold.units import bytes_text


def proportional(rung: Rung, head: Machine, links: Mapping[str, Link]) -> Draft | None:
    """The split by the policies ``memory_aware``, ``even`` and ``spread``.

    Over GPUs and the machines without any; where that is too little, processors beside a GPU take part too.
    """
    for beside in (False, True):
        line = _within_workers(rung, _line(rung, head, links, beside=beside), head)
        made = _shared_out(rung, head, links, line)
        if made is not None:
            return made
    return None


def _line(rung: Rung, head: Machine, links: Mapping[str, Link], *, beside: bool) -> list[tuple[Spot, Room]]:
    """The devices that may take part, the roomiest first; ``beside``: after them processors that have a GPU
    beside them, where they do not share its memory."""
    line: list[tuple[Spot, Room]] = []
    last: set[Spot] = set()
    buffers = rung.buffers(piped=True)
    for spots in rung.spots.values():
        gpus = {spot.memory for spot in spots if spot.kind is Kind.GPU}
        for spot in spots:
            if spot.kind is Kind.CPU and gpus and (not beside or spot.memory in gpus):
                continue
            if spot.kind is Kind.CPU and gpus:
                last.add(spot)
            one = rung.bin(spot, head, links)
            room = one.room - buffers.begins
            if one.loading is not None:
                room = min(room, one.loading - max(rung.footprint.largest))
            if room > 0:
                line.append((spot, Room(room, max(min(room, one.room - buffers.ends), 0))))
    line.sort(key=lambda pair: (pair[0] in last, -pair[1].middle, pair[0].node, pair[0].device))
    return line


def _shared_out(
    rung: Rung, head: Machine, links: Mapping[str, Link], line: list[tuple[Spot, Room]]
) -> Draft | None:
    counts = range(1, len(line) + 1)
    if rung.wish.policy is Policy.SPREAD:
        counts = range(len(line), 0, -1)
    for count in counts:
        # The head's own devices end the line, so that the logits need no network.
        chosen = sorted(line[:count], key=lambda pair: pair[0].machine == head.node)
        rooms = [room for _, room in chosen]
        share_out = by_count if rung.wish.policy is Policy.EVEN else by_room
        runs = share_out(rung.memory, rooms)
        if runs is None:
            continue
        holds = [
            (spot, first, last) for (spot, _), (first, last) in zip(chosen, runs, strict=True) if last > first
        ]
        made = rung.draft(head, 0, holds, links)
        if not made.short and not (rung.wish.always and made.alone):
            return made
    return None


def _within_workers(rung: Rung, line: list[tuple[Spot, Room]], head: Machine) -> list[tuple[Spot, Room]]:
    kept: list[tuple[Spot, Room]] = []
    workers: set[str] = set()
    for spot, room in line:
        if len(kept) == MOST_DEVICES:
            break
        if spot.machine != head.node:
            if spot.machine not in workers and len(workers) >= rung.wish.workers:
                continue
            workers.add(spot.machine)
        kept.append((spot, room))
    return kept


def miscounted(counts: Sequence[tuple[str, int]], layers: int) -> str:
    """Why counts that the user fixed are not those of a model with so many layers; empty: they are."""
    given = sum(count for _, count in counts)
    if given in (layers, layers + 1) and all(count >= 0 for _, count in counts):
        return ""
    return f"they sum to {given}; the model has {layers} layers and the output: {layers + 1}"


def fixed(rung: Rung) -> Draft | None:
    """The counts that the user fixed, each machine's shared out over its devices."""
    counts = list(rung.wish.fixed)
    if wrong := miscounted(counts, rung.footprint.layers):
        rung.lost.append(Alternative("the fixed counts", 0.0, wrong))
        return None
    if sum(count for _, count in counts) == rung.footprint.layers:
        counts[-1] = (counts[-1][0], counts[-1][1] + 1)
    for head in sorted(
        rung.heads(), key=lambda one: all(node not in (one.node, one.name) for node, _ in counts)
    ):
        made = _fixed_on(rung, head, counts)
        if made is None:
            continue
        if not made.short:
            return made
        worst = made.short[0]
        rung.lost.append(
            Alternative(
                f"the fixed counts with {head.name} as the head",
                0.0,
                f"{rung.fleet.name(worst.node)} {worst.device} would need {bytes_text(worst.needed)}, "
                f"{bytes_text(worst.room)} are there",
            )
        )
    return None


def _fixed_on(rung: Rung, head: Machine, counts: list[tuple[str, int]]) -> Draft | None:
    links = links_between(rung.fleet.machines, head)
    on_host, at = 0, 0
    holds: list[Hold] = []
    for node, count in counts:
        machine = next((one for one in rung.fleet.machines if node in (one.node, one.name)), None)
        spots = rung.spots[machine.node] if machine is not None else ()
        gpus = [spot for spot in spots if spot.kind is Kind.GPU]
        spots = tuple(gpus) or tuple(spot for spot in spots if spot.kind is Kind.CPU)
        if not spots:
            rung.lost.append(Alternative("the fixed counts", 0.0, f"{node} is not there"))
            return None
        if machine is head and not gpus and at == 0:
            on_host = at = count
            continue
        memory = rung.memory[at : at + count]
        rooms = [Room(max(spot.room, 1), max(spot.room, 1)) for spot in spots]
        runs = by_room(memory, rooms) or [(0, count)]
        holds += [(s, at + a, at + b) for s, (a, b) in zip(spots, runs, strict=False) if b > a]
        at += count
    return rung.draft(head, on_host, holds, links)
