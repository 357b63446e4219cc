"""What a chaos run says at its end."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator

from tests.chaos.round import Outcome, Struck

LIMITS = {"kill -9 of a worker": 2.0, "a machine vanishes": 8.0}
"""Seconds until the next word, besides the time to load the model, that are aimed at."""
ENOUGH = 5
"""Faults of a kind from which their median says anything."""
_GOOD = ("exact", "resumed", "allowed")


def forbidden(outcome: Outcome) -> list[str]:
    """Streams that ended as none may, in sentences, and what else must not be."""
    found = list(outcome.wrong)
    for kind, limit in LIMITS.items():
        waits = waits_of(outcome, kind)
        # What was said has to be read again besides: a matter of the model and the machine.
        most = limit + outcome.load + outcome.read
        times = sum(struck.fault.kind == kind for struck in outcome.struck)
        if times >= ENOUGH and waits and statistics.median(waits) > most:
            found.append(f"{kind}: the median of {statistics.median(waits):.1f} s is above {most:.1f} s")
    for stream in outcome.streams:
        verdict = outcome.verdict(stream)
        if verdict not in _GOOD:
            found.append(f"{stream.dialect.name} at {stream.node.name}, {len(stream.words)} words: {verdict}")
    return found


def waits_of(outcome: Outcome, kind: str) -> list[float]:
    """Seconds until the next word after the faults of one kind."""
    return [wait for struck in outcome.struck if struck.fault.kind == kind for wait in struck.waits]


def report(outcome: Outcome) -> Iterator[str]:
    """Lines."""
    kinds: dict[str, list[Struck]] = {}
    last: dict[int, Struck] = {}
    for struck in outcome.struck:
        kinds.setdefault(struck.fault.kind, []).append(struck)
        last.update({id(stream): struck for stream in struck.under_way})
    yield ""
    yield f"{len(outcome.struck)} faults in {outcome.seconds:.0f} s, {len(outcome.streams)} streams"
    yield _row("fault", "times", "next word: median", "worst", "streams", "exact", "allowed", "forbidden")
    for kind, all_of in sorted(kinds.items()):
        waits = [wait for one in all_of for wait in one.waits]
        ends = Counter(
            verdict if (verdict := outcome.verdict(stream)) in _GOOD else "forbidden"
            for one in all_of
            for stream in one.under_way
            # How it ended is put down to the last fault that it met.
            if last[id(stream)] is one
        )
        middle, worst = (f"{statistics.median(waits):.1f} s", f"{max(waits):.1f} s") if waits else ("-", "-")
        exact = ends["exact"] + ends["resumed"]
        counts = (sum(ends.values()), exact, ends["allowed"], ends["forbidden"])
        yield _row(kind, len(all_of), middle, worst, *counts)
    ends = Counter(
        verdict if (verdict := outcome.verdict(stream)) in _GOOD else "forbidden"
        for stream in outcome.streams
    )
    yield ", ".join(f"{ends[name]} {name}" for name in (*_GOOD, "forbidden"))
    for kind, limit in LIMITS.items():
        waits = waits_of(outcome, kind)
        if waits:
            aim = limit + outcome.load
            within = sum(wait <= aim for wait in waits)
            yield (
                f"{kind}: next word aimed at {aim:.1f} s ({limit:g} s + {outcome.load:.1f} s to load, not "
                f"the {outcome.read:.1f} s to read again what was said); "
                f"median {statistics.median(waits):.1f} s, worst {max(waits):.1f} s, "
                f"{within} of {len(waits)} within"
            )
    yield "memory of the daemons, MB: " + ", ".join(f"{a:.0f} -> {b:.0f}" for a, b in outcome.memory)
    errors = Counter(stream.error[:110] for stream in outcome.streams if outcome.verdict(stream) == "allowed")
    yield from (f"  allowed, {count} times: {error}" for error, count in errors.most_common(12))
    for sentence in forbidden(outcome):
        yield f"WRONG: {sentence}"


def _row(kind: str, *cells: object) -> str:
    widths = (5, 17, 8, 8, 6, 8, 10)
    return f"{kind:26} " + " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
