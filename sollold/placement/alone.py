"""A model on one machine: on a GPU, on several, with the first layers on the processor, or there wholly."""

from __future__ import annotations

from collections.abc import Sequence

from sollold.machine.device import Kind
from sollold.placement import speed
from sollold.placement.draft import Draft
from sollold.placement.experts import experts_on_host
from sollold.placement.fleet import Machine
from sollold.placement.rung import Alternative, Rung
from sollold.units import bytes_text

TOLD = 40
"""Machines of which it is told why the model does not fit them."""


def on_one_machine(rung: Rung) -> Draft | None:
    """The fastest placement on one machine."""
    best: Draft | None = None
    for head in rung.heads():
        if len(rung.lost) >= TOLD and sum(spot.room for spot in rung.spots[head.node]) < rung.needed:
            continue
        found = _alone_on(rung, head)
        if found is None:
            continue
        if best is None or found.seconds < best.seconds:
            best, found = found, best
        if found is not None:
            rung.lose(found, f"slower than {best.head.name} alone")
    return best


def _alone_on(rung: Rung, head: Machine) -> Draft | None:
    spots = rung.spots[head.node]
    gpus = [spot for spot in spots if spot.kind is Kind.GPU]
    cpu = next((spot for spot in spots if spot.kind is Kind.CPU), None)
    links = {head.node: speed.LOOPBACK}
    made = [rung.draft(head, 0, [(spot, 0, rung.total)], links) for spot in gpus]
    fitting = [one for one in made if not one.short]
    if not fitting and gpus and head.room > rung.needed:
        bins = [(spot, rung.bin(spot, head, links)) for spot in gpus]
        several = rung.search(head, bins, links) if len(gpus) > 1 else None
        if several is None and cpu is not None:
            several = rung.search(head, [*bins, (cpu, rung.host_bin(cpu, head))], links)
        if several is not None:
            fitting.append(several)
        if several is None or several.on_host:
            kept = (experts_on_host(rung, head, spot) for spot in gpus if cpu is not None)
            fitting += [one for one in kept if one is not None]
    if cpu is not None and not fitting:
        made.append(rung.draft(head, rung.total, [], links))
        fitting += [made[-1]] if not made[-1].short else []
    if fitting:
        return min(fitting, key=lambda one: one.seconds)
    _cannot(rung, head, made)
    return None


def _cannot(rung: Rung, head: Machine, made: Sequence[Draft]) -> None:
    if len(rung.lost) >= TOLD:
        return
    worst = max((one for draft in made for one in draft.short), key=lambda s: s.needed, default=None)
    if worst is None:
        reason = "it offers no device"
    else:
        reason = f"needs {bytes_text(worst.needed)} on {worst.device}, {bytes_text(worst.room)} are there"
    rung.lost.append(Alternative(f"{head.name} alone", 0.0, reason))
