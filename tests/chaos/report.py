"""The report of a chaos run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator

from tests.chaos.round import FaultResult, Outcome

LIMITS = {"kill -9 of a worker": 2.0, "a machine vanishes": 8.0}
"""The intended maximum of seconds until the next word, in addition to the time to load the model."""
ENOUGH = 5
"""The number of faults of a kind that makes their median meaningful."""
_GOOD = ("exact", "resumed", "allowed")


def forbidden(outcome: Outcome) -> list[str]:
    """Return descriptions of all problems, including those of single streams."""
    problems = list(outcome.wrong)
    for kind, limit in LIMITS.items():
        waits = waits_of(outcome, kind)
        # Words sent before the fault are processed again, which depends on the model and the machine.
        maximum = limit + outcome.load + outcome.read
        times = sum(result.fault.kind == kind for result in outcome.results)
        if times >= ENOUGH and waits and statistics.median(waits) > maximum:
            problems.append(
                f"{kind}: the median of {statistics.median(waits):.1f} s is above {maximum:.1f} s"
            )
    for stream in outcome.streams:
        verdict = outcome.verdict(stream)
        if verdict not in _GOOD:
            problems.append(
                f"{stream.dialect.name} at {stream.node.name}, {len(stream.words)} words: {verdict}"
            )
    return problems


def waits_of(outcome: Outcome, kind: str) -> list[float]:
    """The seconds until the next word after each fault of one kind."""
    return [wait for result in outcome.results if result.fault.kind == kind for wait in result.waits]


def report(outcome: Outcome) -> Iterator[str]:
    """Yield the lines of the report."""
    kinds: dict[str, list[FaultResult]] = {}
    last: dict[int, FaultResult] = {}
    for result in outcome.results:
        kinds.setdefault(result.fault.kind, []).append(result)
        last.update({id(stream): result for stream in result.active})
    yield ""
    yield f"{len(outcome.results)} faults in {outcome.seconds:.0f} s, {len(outcome.streams)} streams"
    yield _row("fault", "times", "next word: median", "worst", "streams", "exact", "allowed", "forbidden")
    for kind, results in sorted(kinds.items()):
        waits = [wait for result in results for wait in result.waits]
        ends = Counter(
            verdict if (verdict := outcome.verdict(stream)) in _GOOD else "forbidden"
            for result in results
            for stream in result.active
            # The end of a stream is attributed to the last fault during it.
            if last[id(stream)] is result
        )
        median, worst = (f"{statistics.median(waits):.1f} s", f"{max(waits):.1f} s") if waits else ("-", "-")
        exact = ends["exact"] + ends["resumed"]
        counts = (sum(ends.values()), exact, ends["allowed"], ends["forbidden"])
        yield _row(kind, len(results), median, worst, *counts)
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
                f"{kind}: next word expected within {aim:.1f} s ({limit:g} s + {outcome.load:.1f} s to load, "
                f"without the {outcome.read:.1f} s to process the earlier words again); "
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
