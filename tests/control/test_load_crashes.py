"""A node on which llama.cpp only crashes is remembered until a load succeeds there, or it restarts."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, Record, State
from sollold.control.load_crashes import LoadCrashes
from sollold.engines.llamacpp.exit_reason import exit_reason

ANNA = Record("aa", "anna", 1, ("10.0.0.1",), 1, 2, "0", build="b1")
BERT = replace(ANNA, node="bb", name="bert")
SEGV = f"llama-server: {exit_reason(-11, [])}"
CRASHED = Endpoint("d1", "a:1b", "", Backend.LOCAL, State.FAILED, reason=SEGV, culprit="aa", crashed=True)


def found(crashes: LoadCrashes) -> list[tuple[str, tuple[str, ...]]]:
    return [(node.name, node.models) for node in crashes.found()]


def after(*endpoints: Endpoint) -> LoadCrashes:
    crashes = LoadCrashes()
    for endpoint in endpoints:
        crashes.observe((replace(ANNA, endpoints=(endpoint,)), BERT))
        crashes.observe((ANNA, BERT))
    return crashes


def test_crashed_loads_are_remembered_by_the_node_whose_process_crashed() -> None:
    again = replace(CRASHED, id="d2", model="b:1b")
    assert found(after(CRASHED, again, replace(again, id="d3"))) == [("anna", ("a:1b", "b:1b"))]
    assert found(after(replace(CRASHED, culprit="bb"))) == [("bert", ("a:1b",))]


def test_an_engine_that_crashes_later_or_exits_does_not_count() -> None:
    assert not found(after(replace(CRASHED, answered=True)))
    refused = exit_reason(1, ["error loading model: unknown architecture"])
    assert not found(after(replace(CRASHED, reason=refused)))
    assert not found(after(replace(CRASHED, reason=exit_reason(-6, ["E failed to allocate buffer"]))))


def test_a_load_that_succeeds_with_a_part_on_the_node_ends_it() -> None:
    ready = Endpoint("d4", "c:1b", "", Backend.SHARDED, State.READY, placed=(Placed("bb", "CPU", 0, 2, 100),))
    assert not found(after(replace(CRASHED, culprit="bb"), ready))
    assert found(after(replace(CRASHED, culprit="bb"), replace(ready, placed=())))


def test_a_node_that_left_or_has_another_build_starts_afresh() -> None:
    for records in ((BERT,), (replace(ANNA, build=""), BERT)):
        crashes = after(CRASHED)
        crashes.observe(records)
        crashes.observe((ANNA, BERT))
        assert not found(crashes)
