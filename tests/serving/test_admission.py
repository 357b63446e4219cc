"""The admission queue of an endpoint: bounded, fair, free of starvation."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sollold.serving.admission import STEP, AdmissionQueue, FairQueue, Full, QueueClosed, QueueFull
from sollold.serving.protocol import Trial
from sollold.serving.suspects import HOLD_SECONDS, Ticket

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(1, 10), st.sampled_from("abc")),
        st.tuples(st.just("leave"), st.integers(0, 60), st.just("")),
        st.tuples(st.just("resize"), st.integers(1, 6), st.just("")),
        st.tuples(st.just("wait"), st.integers(1, 40), st.just("")),
    ),
    max_size=120,
)


@settings(max_examples=200)
@given(EVENTS, st.integers(1, 4), st.integers(0, 10))
def test_running_and_waiting_counts_stay_consistent(
    events: list[tuple[str, int, str]], slots: int, limit: int
) -> None:
    queue = FairQueue(slots, limit)
    now, numbers = 0.0, itertools.count()
    waiting: set[str] = set()
    running: set[str] = set()
    for kind, number, client in events:
        admitted: tuple[str, ...] = ()
        if kind == "offer":
            id = str(next(numbers))
            answer = queue.offer(Ticket(id, number, client, now), now)
            if isinstance(answer, Full):
                assert len(waiting) >= limit and len(running) >= slots
                assert answer.retry_after >= 1
                continue
            waiting.add(id)
            admitted = answer
        elif kind == "leave":
            id = str(number)
            admitted = queue.leave(id, now)
            waiting.discard(id)
            running.discard(id)
        elif kind == "resize":
            slots = number
            admitted = queue.resize(slots, now)
        else:
            now += number
        assert set(admitted) <= waiting
        waiting -= set(admitted)
        running |= set(admitted)
        assert (queue.active, queue.waiting) == (len(running), len(waiting))
        # No slot stays free while a request waits.
        assert not waiting or len(running) >= slots
        order = queue.order(now)
        assert sorted(order) == sorted(waiting)
    for id in tuple(running | waiting):
        queue.leave(id, now)
    while queue.active:
        for number in range(next(numbers)):
            queue.leave(str(number), now)
    assert queue._client_running == Counter() and queue._last_served == {}


@settings(max_examples=50)
@given(st.integers(1, 10), st.floats(1.0, 5.0), st.integers(1, 3))
def test_low_priority_does_not_starve_under_higher_priority_load(
    priority: int, pace: float, slots: int
) -> None:
    queue = FairQueue(slots, 10_000)
    now, numbers = 0.0, itertools.count()
    running: list[str] = []
    for name in ("old", *(f"f{next(numbers)}" for _ in range(slots - 1))):
        admitted = queue.offer(Ticket(name, 10, "flood", now), now)
        assert not isinstance(admitted, Full)
        running += admitted
    queue.offer(Ticket("low", priority, "patient", now), now)
    longest = (11 - priority) * STEP + 2 * STEP
    while "low" not in running:
        now += pace
        # Two new requests of the highest priority for each served one.
        for _ in range(2):
            queue.offer(Ticket(f"f{next(numbers)}", 10, f"c{next(numbers)}", now), now)
        running += queue.leave(running.pop(0), now)
        # Requests ahead of it at the same priority are served first; their number is bounded.
        assert now <= 4 * longest + 10


def test_clients_of_one_priority_take_turns() -> None:
    queue = FairQueue(1, 100)
    queue.offer(Ticket("first", 5, "greedy", 0.0), 0.0)
    for n in range(5):
        queue.offer(Ticket(f"g{n}", 5, "greedy", 0.1), 0.1)
    queue.offer(Ticket("m0", 5, "modest", 0.2), 0.2)
    queue.offer(Ticket("m1", 5, "modest", 0.2), 0.2)
    served = []
    (current,) = queue.leave("first", 1.0)
    while current:
        served.append(current)
        after = queue.leave(current, 1.0)
        current = after[0] if after else ""
    assert served == ["m0", "g0", "m1", "g1", "g2", "g3", "g4"]


def test_higher_priority_goes_first_and_waiting_raises_priority() -> None:
    queue = FairQueue(1, 100)
    queue.offer(Ticket("running", 5, "a", 0.0), 0.0)
    queue.offer(Ticket("low", 4, "a", 0.0), 0.0)
    queue.offer(Ticket("high", 6, "a", 0.0), 0.0)
    assert queue.order(0.0) == ["high", "low"]
    queue.offer(Ticket("newer", 6, "a", 3 * STEP), 3 * STEP)
    assert queue.order(3 * STEP) == ["high", "low", "newer"]


def test_request_that_waited_elsewhere_keeps_its_place() -> None:
    queue = FairQueue(1, 100)
    queue.offer(Ticket("running", 5, "a", 0.0), 0.0)
    queue.offer(Ticket("here", 5, "a", 8.0), 8.0)
    queue.offer(Ticket("moved", 5, "a", 3.0), 9.0)
    assert queue.order(9.0) == ["moved", "here"]


def test_one_suspect_at_a_time_is_unanswered() -> None:
    queue = FairQueue(3, 100)
    for id in ("s1", "s2", "s3"):
        queue.offer(Ticket(id, 5, "a", 0.0, suspect=True), 0.0)
    assert (queue.active, queue.waiting) == (1, 2)
    assert queue.offer(Ticket("other", 5, "b", 0.0), 0.0) == ("other",)
    assert queue.answered("other", 1.0) == ()
    assert queue.answered("s1", 1.0) == ("s2",)
    assert queue.answered("s1", 1.0) == ()
    assert queue.leave("s1", 1.0) == ()
    assert queue.leave("s2", 1.0) == ("s3",)


def suspect(id: str) -> Ticket:
    trial = Trial(f"{id} before", ("s1 before", "s2 before") if id == "likeliest" else ())
    return Ticket(id, 5, "a", 0.0, suspect=True, trial=trial, held_until=HOLD_SECONDS)


def test_the_likeliest_cause_waits_for_the_other_suspects_and_is_found_by_elimination() -> None:
    queue = FairQueue(3, 100)
    assert queue.offer(suspect("likeliest"), 0.0) == ()
    assert queue.offer(suspect("s1"), 0.1) == ("s1",)
    assert queue.offer(suspect("s2"), 0.1) == ()
    assert queue.answered("s1", 9.0) == ("s2",)
    assert queue.causes() == []
    assert queue.answered("s2", 10.0) == ()
    assert queue.causes() == ["likeliest"]


@pytest.mark.parametrize("crashed", [True, False])
def test_the_likeliest_cause_is_tried_if_the_others_are_not_all_answered(crashed: bool) -> None:
    queue = FairQueue(3, 100)
    assert queue.offer(suspect("likeliest"), 0.0) == ()
    if crashed:
        assert queue.offer(suspect("s1"), 0.1) == ("s1",)
        assert queue.tick(HOLD_SECONDS) == ()
        assert queue.leave("s1", HOLD_SECONDS) == ("likeliest",)
    else:
        assert queue.tick(HOLD_SECONDS / 2) == ()
        assert queue.tick(HOLD_SECONDS) == ("likeliest",)


def test_a_full_queue_estimates_when_to_retry() -> None:
    queue = FairQueue(1, 2)
    queue.offer(Ticket("a", 5, "x", 0.0), 0.0)
    assert queue.leave("a", 30.0) == ()
    for id in "bcd":
        queue.offer(Ticket(id, 5, "x", 30.0), 30.0)
    answer = queue.offer(Ticket("e", 10, "x", 30.0), 30.0)
    assert isinstance(answer, Full)
    assert answer.retry_after == 60.0


async def test_in_a_full_queue_a_client_with_few_requests_takes_the_place_of_one_with_many() -> None:
    queue = AdmissionQueue(1, 3)
    refused: list[str] = []

    async def enter(id: str, client: str, priority: int = 5) -> None:
        try:
            await queue.enter(id, priority, client, 0.0, lambda position: None)
        except QueueFull as full:
            assert full.retry_after >= 1
            refused.append(id)
            queue.leave(id)

    async def arrive(*requests: tuple[str, str, int]) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(enter(*request)) for request in requests]
        for _ in range(3):
            await asyncio.sleep(0)
        return tasks

    await enter("running", "greedy")
    tasks = await arrive(("g1", "greedy", 6), ("g2", "greedy", 5), ("g3", "greedy", 5))
    tasks += await arrive(("low", "modest", 4))
    assert refused == ["low"] and queue.waiting == 3
    tasks += await arrive(("m1", "modest", 5))
    assert refused == ["low", "g3"] and queue.waiting == 3
    # Taking another place would only exchange the two clients' numbers.
    tasks += await arrive(("m2", "modest", 5), ("g4", "greedy", 9))
    assert refused == ["low", "g3", "m2", "g4"] and queue.waiting == 3
    for id in ("running", "g1", "m1", "g2"):
        queue.leave(id)
    await asyncio.gather(*tasks)


async def test_requests_after_dismissal_are_refused_until_the_queue_is_resized() -> None:
    queue = AdmissionQueue(1, 100)

    async def enter(id: str) -> None:
        try:
            await queue.enter(id, 5, "a", 0.0, lambda position: None)
        except QueueClosed:
            queue.leave(id)
            raise

    await enter("running")
    waiting = asyncio.create_task(enter("waiting"))
    await asyncio.sleep(0)
    queue.dismiss()
    with pytest.raises(QueueClosed):
        await waiting
    with pytest.raises(QueueClosed):
        await enter("late")
    queue.resize(1)
    late = asyncio.create_task(enter("late"))
    await asyncio.sleep(0)
    queue.leave("running")
    await late
