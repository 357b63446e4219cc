"""Events: each change of the cluster is reported once; missing nodes are remembered until they return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, Record, State
from sollold.cluster.gossip.term import Term
from sollold.control.events import MOST_OFFLINE, ClusterWatcher, EventKind, EventLog, LoadTime, as_object

ANNA = Record("aa", "anna", 1, ("10.0.0.1",), 1, 2, "0")
BERT = replace(ANNA, node="bb", name="bert")
LEAD = Term(1, "aa")
SPREAD = Endpoint(
    "d1",
    "big:latest",
    "",
    Backend.SHARDED,
    State.LOADING,
    placed=(Placed("aa", "CPU", 0, 2, 100), Placed("bb", "CPU", 2, 5, 2048)),
)


class Scene:
    def __init__(self, *records: Record) -> None:
        self.log = EventLog()
        self.left: set[str] = set()
        self.evicted: set[str] = set()
        self.loads: list[LoadTime] = []
        self.watcher = ClusterWatcher(
            self.log, "aa", self.left.__contains__, self.loads.append, self.evicted.__contains__
        )
        self.now, self.clock = 100.0, 0.0
        self.update(*records)
        self.seen = self.log.newest

    def update(self, *records: Record, leader: Term = LEAD) -> list[tuple[EventKind, str]]:
        self.now += 1
        self.clock += 1
        before = self.log.newest
        self.watcher.observe(records, leader, self.now, self.clock)
        return [(event.kind, event.message) for event in self.log.after(before)]


def test_the_first_view_gives_no_events() -> None:
    scene = Scene(replace(ANNA, endpoints=(replace(SPREAD, state=State.READY),)), BERT)
    assert scene.log.newest == 0


def test_nodes_join_stop_get_lost_and_return() -> None:
    scene = Scene(ANNA)
    assert scene.update(ANNA, BERT) == [(EventKind.NODE_JOINED, "bert joined")]
    assert scene.update(ANNA) == [(EventKind.NODE_LOST, "bert stopped responding")]
    (missing,) = scene.watcher.offline()
    assert (missing.record.name, missing.stopped, missing.since) == ("bert", False, scene.now)
    assert scene.update(ANNA, BERT) == [(EventKind.NODE_RETURNED, "bert is back")]
    assert not scene.watcher.offline()
    scene.left.add("bb")
    assert scene.update(ANNA) == [(EventKind.NODE_STOPPED, "bert stopped")]
    assert scene.watcher.offline()[0].stopped


def test_an_evicted_node_is_not_reported_missing() -> None:
    scene = Scene(ANNA, BERT)
    scene.update(ANNA)
    assert scene.watcher.offline()
    scene.evicted.add("bb")
    assert scene.update(ANNA) == [] and not scene.watcher.offline()
    scene = Scene(ANNA, BERT)
    scene.evicted.add("bb")
    assert scene.update(ANNA) == [(EventKind.NODE_EVICTED, "bert was evicted from the cluster")]
    assert not scene.watcher.offline()


def test_a_lost_node_is_remembered_with_its_layers() -> None:
    head = replace(ANNA, endpoints=(replace(SPREAD, state=State.READY),))
    scene = Scene(head, BERT)
    ((kind, message),) = scene.update(head)
    assert kind is EventKind.NODE_LOST and "2.00 KiB of big:latest" in message
    (missing,) = scene.watcher.offline()
    assert [(held.model, held.first, held.last) for held in missing.held] == [("big:latest", 2, 5)]


def test_a_missing_node_can_be_removed_by_name_or_id() -> None:
    scene = Scene(ANNA, BERT)
    scene.update(ANNA)
    assert not scene.watcher.remove("cleo", 1.0)
    assert scene.watcher.remove("bert", 1.0) and not scene.watcher.offline()
    assert scene.log.after(0)[-1].kind is EventKind.NODE_REMOVED
    assert not scene.watcher.remove("bb", 1.0)


def test_drains_and_elections_are_events() -> None:
    scene = Scene(ANNA, BERT)
    draining = replace(BERT, draining=True)
    assert [kind for kind, _ in scene.update(ANNA, draining)] == [EventKind.NODE_DRAINING]
    drained = scene.update(ANNA, replace(draining, empty=True))
    assert drained == [(EventKind.NODE_DRAINED, "bert is drained; safe to stop")]
    assert [kind for kind, _ in scene.update(ANNA, BERT)] == [EventKind.NODE_UNDRAINED]
    elected = scene.update(ANNA, BERT, leader=Term(2, "bb"))
    assert elected == [(EventKind.LEADER_CHANGED, "bert is the leader (term 2)")]
    # A new term of the same leader is not an event.
    assert scene.update(ANNA, BERT, leader=Term(3, "bb")) == []


def test_events_of_a_model_from_load_to_failure() -> None:
    scene = Scene(ANNA, BERT)

    def with_state(state: State, **changes: Any) -> Record:
        return replace(ANNA, endpoints=(replace(SPREAD, state=state, **changes),))

    assert scene.update(with_state(State.STARTING), BERT) == [
        (EventKind.MODEL_LOADING, "big:latest is being loaded by anna, spread over 2 machines")
    ]
    assert scene.update(with_state(State.LOADING), BERT) == []
    assert scene.update(with_state(State.READY), BERT) == [
        (EventKind.MODEL_LOADED, "big:latest is loaded on anna after 2.0 s")
    ]
    assert scene.update(with_state(State.READY, active=3), BERT) == []
    failed = scene.update(with_state(State.FAILED, reason="a worker died"), BERT)
    assert failed == [(EventKind.MODEL_FAILED, "big:latest failed on anna: a worker died")]
    assert scene.update(ANNA, BERT) == [], "a failure is not followed by an unload event"
    assert scene.loads == [LoadTime("big:latest", 2.0, True)], "it failed, but not to load"


def test_a_load_that_fails_is_counted() -> None:
    scene = Scene(ANNA)
    scene.update(replace(ANNA, endpoints=(replace(SPREAD, state=State.LOADING),)))
    scene.update(replace(ANNA, endpoints=(replace(SPREAD, state=State.FAILED),)))
    assert scene.loads == [LoadTime("big:latest", 1.0, False)]


def test_a_clock_that_is_set_during_a_load_does_not_change_its_duration() -> None:
    scene = Scene(ANNA)
    scene.update(replace(ANNA, endpoints=(SPREAD,)))
    scene.now += 50 * 366 * 86400.0
    (loaded,) = scene.update(replace(ANNA, endpoints=(replace(SPREAD, state=State.READY),)))
    assert loaded[1] == "big:latest is loaded on anna after 1.0 s"
    assert [load.seconds for load in scene.loads] == [1.0]


def test_a_model_that_is_unloaded_or_lost_with_its_node() -> None:
    head = replace(BERT, endpoints=(replace(SPREAD, state=State.READY),))
    scene = Scene(ANNA, head)
    assert scene.update(ANNA, BERT) == [(EventKind.MODEL_UNLOADED, "big:latest was unloaded from bert")]
    scene.update(ANNA, head)
    kinds = [kind for kind, _ in scene.update(ANNA)]
    assert kinds == [EventKind.NODE_LOST, EventKind.MODEL_LOST]


def test_an_ollama_model_counts_once_it_is_loaded() -> None:
    idle = Endpoint("ollama:x", "x", "", Backend.OLLAMA, State.READY, loaded=False)
    scene = Scene(ANNA)
    assert scene.update(replace(ANNA, endpoints=(idle,))) == []
    assert [kind for kind, _ in scene.update(replace(ANNA, endpoints=(replace(idle, loaded=True),)))] == [
        EventKind.MODEL_LOADED
    ]
    assert [kind for kind, _ in scene.update(replace(ANNA, endpoints=(idle,)))] == [EventKind.MODEL_UNLOADED]


def test_the_numbers_of_events_and_missing_nodes_are_bounded() -> None:
    log = EventLog(most=3)
    for _ in range(5):
        log.add(1.0, EventKind.NODE_JOINED, "x")
    assert [event.id for event in log.after(0)] == [3, 4, 5]
    assert [event.id for event in log.after(0, 2)] == [4, 5]
    assert [event.id for event in log.after(4)] == [5]
    assert log.counts == {EventKind.NODE_JOINED: 5}
    scene = Scene(
        ANNA, *(replace(BERT, node=f"n{number}", name=f"n{number}") for number in range(MOST_OFFLINE + 9))
    )
    scene.update(ANNA)
    assert len(scene.watcher.offline()) == MOST_OFFLINE


def test_empty_fields_are_omitted() -> None:
    event = EventLog().add(1.23456, EventKind.MODEL_LOADED, "m", model="x")
    assert as_object(event) == {"id": 1, "time": 1.235, "kind": "model.loaded", "message": "m", "model": "x"}
