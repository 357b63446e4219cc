"""Chooses which idle deployments to evict for a plan: none if it gains little, else the fewest. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.facts import dataclass
from sollold.leader.existing import Located, missing_options
from sollold.leader.messages import Ensure
from sollold.leader.pinned import redundant_pins
from sollold.leader.snapshot import Bytes, ClusterSnapshot, in_use, is_loading
from sollold.placement.explain import Busy
from sollold.placement.planner import PlacementChoice

IDLE_LONG = 60.0
"""Seconds of idleness after which a deployment may be evicted for a faster plan."""
FASTER = 1.5
"""Minimum speed-up of that plan."""
SPARED = 16
"""Maximum number of victims that are tested for whether the plan works without evicting them."""

Attempt = Callable[[list[Located], Bytes | None], PlacementChoice]
"""Maps (deployments to evict, bytes that others are releasing) to the best placement with that memory."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """The best placement, and the deployments to evict for it.

    ``wait``: whether it uses memory that ended deployments are still releasing.
    """

    choice: PlacementChoice
    victims: list[Located]
    wait: bool = False


def best_eviction(
    attempt: Attempt, idle: list[Located], snapshot: ClusterSnapshot, aim: int, *, evict: bool
) -> Eviction:
    """Return the best placement in free memory, or in that of idle deployments where that is worth it.

    Args:
        attempt: places the model with the memory of some deployments.
        idle: deployments that may be evicted, the cheapest to lose first.
        snapshot: the cluster.
        aim: target context in tokens.
        evict: whether deployments may be evicted.
    """
    free = attempt([], None)
    chosen, victims = free, list[Located]()
    if idle and evict and _worth_asking(free, aim, idle):
        long = [pair for pair in idle if pair[1].idle >= IDLE_LONG]
        allowed = idle if free.candidate is None else long
        roomy = attempt(allowed, None) if allowed else free
        if roomy.candidate is not None and (free.candidate is None or _better(roomy, free, aim)):
            chosen, victims = _fewest(roomy, allowed, aim, attempt)
    if chosen.candidate is None and (coming := snapshot.ending()):
        return Eviction(attempt(idle, coming), idle, wait=True)
    if coming := snapshot.ending(lately=True):
        # A deployment that has just failed still holds its memory: wait rather than keep a worse plan.
        roomy = attempt(victims, coming)
        if _worth_waiting(roomy, chosen, aim):
            return Eviction(roomy, victims, wait=True)
    return Eviction(chosen, victims)


def evictable(snapshot: ClusterSnapshot, excluded: set[str]) -> tuple[list[Located], list[Busy]]:
    """Return the deployments that may be evicted, the cheapest to lose first, and those that may not."""
    idle: list[Located] = []
    busy: list[Busy] = []
    spare = redundant_pins(snapshot.records)
    for record, endpoint in snapshot.endpoints():
        ollama = endpoint.backend is Backend.OLLAMA
        if endpoint.id in excluded or endpoint.state is State.FAILED or (ollama and not endpoint.loaded):
            continue
        reason = _why_kept(endpoint, snapshot, pinned=endpoint.pinned and endpoint.id not in spare)
        if not reason:
            idle.append((record, endpoint))
            continue
        busy.append(Busy(endpoint.model, snapshot.held(record, endpoint), reason))
    # First those that are ending anyway, then the longest idle, in steps of a minute; among equals the
    # smallest, which reload fastest.
    idle.sort(
        key=lambda pair: (
            pair[1].state is not State.DRAINING,
            -int(pair[1].idle // 60),
            pair[1].bytes,
            pair[1].id,
        )
    )
    return idle, busy


def beside_what(snapshot: ClusterSnapshot) -> str:
    """Say where a larger deployment of the model does not fit: beside those that must stay, or anywhere."""
    digest = snapshot.holders[0][1].digest
    _, busy = evictable(snapshot, {e.id for _, e in snapshot.endpoints() if e.digest == digest})
    kept = sorted({f"{entry.model} ({entry.reason})" for entry in busy if any(entry.bytes.values())})
    return f"beside {' and '.join(kept[:3])}" if kept else "anywhere"


def _why_kept(endpoint: Endpoint, snapshot: ClusterSnapshot, *, pinned: bool) -> str:
    if in_use(endpoint):
        count = endpoint.active + endpoint.waiting
        return f"it has {count} request{'s' if count != 1 else ''}"
    if pinned:
        return "it is kept loaded by its keep_alive"
    if is_loading(endpoint):
        return "it is being loaded"
    if endpoint.id in snapshot.unwilling:
        return "it has just been used"
    if endpoint.backend is Backend.OLLAMA and not snapshot.settings.ollama.evict:
        return "the settings leave Ollama's models alone"
    return ""


def _worth_asking(free: PlacementChoice, aim: int, idle: list[Located]) -> bool:
    """Return whether more room could improve the placement."""
    if free.candidate is None:
        return True
    if not any(endpoint.idle >= IDLE_LONG for _, endpoint in idle):
        return False
    return _context(free) < aim or not free.candidate.alone or free.candidate.on_host


def _better(roomy: PlacementChoice, free: PlacementChoice, aim: int) -> bool:
    """Return whether the placement with more room is clearly better than the one in free memory."""
    if roomy.candidate is None or free.candidate is None:
        return roomy.candidate is not None
    if _context(free) < aim and _context(roomy) > _context(free):
        return True
    return roomy.candidate.seconds * FASTER <= free.candidate.seconds


def _worth_waiting(roomy: PlacementChoice, chosen: PlacementChoice, aim: int) -> bool:
    """Return whether memory that is about to be free allows a plan worth waiting for."""
    if _better(roomy, chosen, aim):
        return True
    assert roomy.candidate is not None and chosen.candidate is not None
    return _context(roomy) >= _context(chosen) and roomy.candidate.run.slots > chosen.candidate.run.slots


def _context(choice: PlacementChoice) -> int:
    assert choice.candidate is not None
    return choice.candidate.run.request_context


def _fewest(
    best: PlacementChoice, idle: list[Located], aim: int, attempt: Attempt
) -> tuple[PlacementChoice, list[Located]]:
    """Find the fewest evictions that the plan needs, the cheapest to lose first.

    A binary search finds the shortest sufficient prefix of ``idle``; then those in it that are not needed are
    spared.
    """

    def enough(victims: list[Located]) -> PlacementChoice | None:
        tried = attempt(victims, None)
        if tried.candidate is None or best.candidate is None:
            return None
        as_good = tried.candidate.seconds <= best.candidate.seconds * 1.1
        return tried if as_good and _context(tried) >= min(_context(best), aim) else None

    found, low, high = best, 0, len(idle)
    while high - low > 1:
        middle = (low + high) // 2
        tried = enough(idle[:middle])
        if tried is None:
            low = middle
        else:
            found, high = tried, middle
    victims = idle[:high]
    for pair in reversed(victims[-SPARED - 1 : -1]):
        fewer = [victim for victim in victims if victim is not pair]
        tried = enough(fewer)
        if tried is not None:
            found, victims = tried, fewer
    return found, victims


def reasons_to_end(
    ask: Ensure, snapshot: ClusterSnapshot, victims: Sequence[Located], larger: Located | None
) -> Iterator[str]:
    """Yield why deployments end for a placement: the evicted ones, and the one that it replaces."""
    for _, endpoint in victims:
        yield f"{endpoint.model} is idle and makes room."
    if larger is not None:
        lacks = missing_options(ask, larger[1], snapshot)
        detail = f"without {lacks}" if lacks else f"with {larger[1].context} tokens"
        yield f"It was idle {detail}, so it is reloaded."
