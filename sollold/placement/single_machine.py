"""Places a model on one machine: on a GPU, on several, partly on the processor, or wholly on it."""

from __future__ import annotations

from collections.abc import Sequence

from sollold.machine.device import Kind
from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate
from sollold.placement.inventory import Machine
from sollold.placement.moe_offload import experts_on_host
from sollold.placement.search import Alternative, SearchContext
from sollold.units import bytes_text

MAX_REPORTED = 40
"""Maximum number of machines for which to report why the model does not fit."""


def on_one_machine(search: SearchContext) -> Candidate | None:
    """Return the fastest placement on one machine."""
    best: Candidate | None = None
    for head in search.heads():
        if (
            len(search.lost) >= MAX_REPORTED
            and sum(capacity.room for capacity in search.devices[head.node]) < search.needed
        ):
            continue
        found = _alone_on(search, head)
        if found is None:
            continue
        if best is None or found.seconds < best.seconds:
            best, found = found, best
        if found is not None:
            search.lose(found, f"slower than {best.head.name} alone")
    return best


def _alone_on(search: SearchContext, head: Machine) -> Candidate | None:
    capacities = search.devices[head.node]
    gpus = [capacity for capacity in capacities if capacity.kind is Kind.GPU]
    cpu = next((capacity for capacity in capacities if capacity.kind is Kind.CPU), None)
    links = {head.node: cost_model.LOOPBACK}
    trials = [search.evaluate(head, 0, [(capacity, 0, search.total)], links) for capacity in gpus]
    fitting = [candidate for candidate in trials if not candidate.short]
    if not fitting and gpus and head.room > search.needed:
        bins = [(capacity, search.bin(capacity, head, links)) for capacity in gpus]
        split = search.split_over(head, bins, links) if len(gpus) > 1 else None
        if split is None and cpu is not None:
            split = search.split_over(head, [*bins, (cpu, search.host_bin(cpu, head))], links)
        if split is not None:
            fitting.append(split)
        if split is None or split.on_host:
            offloaded = (experts_on_host(search, head, capacity) for capacity in gpus if cpu is not None)
            fitting += [candidate for candidate in offloaded if candidate is not None]
    if cpu is not None and not fitting:
        trials.append(search.evaluate(head, search.total, [], links))
        fitting += [trials[-1]] if not trials[-1].short else []
    if fitting:
        return min(fitting, key=lambda candidate: candidate.seconds)
    _record_failure(search, head, trials)
    return None


def _record_failure(search: SearchContext, head: Machine, trials: Sequence[Candidate]) -> None:
    if len(search.lost) >= MAX_REPORTED:
        return
    closest = min(trials, key=lambda trial: sum(s.needed - s.room for s in trial.short), default=None)
    if closest is None:
        reason = "it offers no device"
    else:
        worst = max(closest.short, key=lambda short: short.needed - short.room)
        reason = f"needs {bytes_text(worst.needed)} on {worst.device}, {bytes_text(worst.room)} available"
    search.lost.append(Alternative(f"{head.name} alone", 0.0, reason))
