from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sollold.agent.ledger import Action, KillWorker, Ledger, PersistTerm
from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.record import GrantState
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Commit, Release, Renew, Reserve
from sollold.machine.device import Device, Kind


def device(name: str = "CPU", total: int = 1000, free: int | None = None, **more: Any) -> Device:
    kind = Kind.CPU if name == "CPU" else Kind.GPU
    base = Device(name, kind, name, total, total if free is None else free, total, 0, 0)
    return replace(base, **more)


def ledger(*devices: Device, **more: Any) -> Ledger:
    book = Ledger(ready=True, **more)
    book.measured(MeasuredMemory(devices or (device(),)))
    return book


T1 = Term(1, "a")


def ask(deployment: str = "d", size: int = 100, *, on: str = "CPU", term: Term = T1) -> Reserve:
    return Reserve(term, deployment, "head", {on: size})


def commit(deployment: str = "d") -> Commit:
    return Commit(deployment, "head", ("CPU",), "b1")


def test_reasons_contain_node_names() -> None:
    book = ledger(name=lambda node: node and f"pc-{node}")
    book.reserve(ask(), 0.0)
    assert book.commit(commit(), 1.0)[0].ok
    assert "belongs to head pc-head" in book.commit(replace(commit(), head="b"), 2.0)[0].reason
    stale = book.release(Release(Term(0, "z"), "d", "z"), "z", 3.0)[0].reason
    assert stale == "the command of pc-z in term 0 is older than term 1 of pc-a"
    assert KillWorker("d", "its head pc-head did not renew it in time") in book.expire(1000.0)
    book.reserve(ask("e"), 1001.0)
    assert book.commit(commit("e"), 1002.0)[0].ok
    assert KillWorker("e", "released by pc-head") in book.release(Release(T1, "e", "head"), "head", 1003.0)[1]


def test_a_released_grant_returns_its_memory_once_the_worker_ended() -> None:
    book = ledger()
    reserved, actions = book.reserve(ask(size=600), 0.0)
    assert reserved.ok
    assert reserved.available == {"CPU": 400}
    assert PersistTerm(T1) in actions
    assert book.commit(commit(), 1.0)[0].ok
    assert [grant.state for grant in book.grants()] == [GrantState.COMMITTED]
    done, actions = book.release(Release(T1, "d", "head"), "head", 2.0)
    assert done.ok
    assert KillWorker("d", "released by head") in actions
    assert book.available("CPU") == 400, "the worker still holds its bytes"
    book.ended("d")
    assert book.grants() == ()
    assert book.available("CPU") == 1000


def test_what_a_dead_worker_held_is_available_before_the_next_measurement() -> None:
    devices = device("Vulkan0", pool="ram"), device(pool="ram"), device("CUDA0")
    book = ledger(*devices)
    assert book.reserve(Reserve(T1, "d", "head", {"Vulkan0": 300, "CPU": 200, "CUDA0": 500}), 0.0)[0].ok
    assert book.commit(commit(), 1.0)[0].ok
    used = tuple(replace(entry, free=450 if entry.pool else 500) for entry in devices)
    book.measured(MeasuredMemory(used, {"d": {"CPU": 450, "CUDA0": 400}}))
    book.release(Release(T1, "d", "head"), "head", 2.0)
    book.ended("d")
    assert {entry.id: (entry.free, entry.available) for entry in book.devices()} == {
        "Vulkan0": (900, 900),
        "CPU": (900, 900),
        "CUDA0": (900, 900),
    }


def test_a_refusal_states_the_requested_and_available_memory() -> None:
    book = ledger(device(total=4 * 1024**3))
    refused, _ = book.reserve(ask(size=5 * 1024**3), 0.0)
    assert not refused.ok
    assert refused.reason == "CPU: 5,120 MiB requested, 4,096 MiB left under its limit of 4,096 MiB"
    assert refused.available == {"CPU": 4 * 1024**3}
    assert book.grants() == ()


def test_a_reservation_over_devices_is_atomic() -> None:
    book = ledger(device("CUDA0"), device("CUDA1"))
    refused, _ = book.reserve(Reserve(T1, "d", "head", {"CUDA0": 500, "CUDA1": 1001}), 0.0)
    assert not refused.ok
    assert book.available("CUDA0") == 1000


@pytest.mark.parametrize("name", ["", "..", "../../home", "/home/me", "a/b", "a\0b", ".", "x" * 201, "-"])
def test_ids_that_are_unsafe_as_file_names_are_refused(name: str) -> None:
    book = ledger()
    refused, _ = book.reserve(ask(name), 0.0)
    assert not refused.ok and "id" in refused.reason
    assert not book.holds(name)


@pytest.mark.parametrize("name", ["llama-3-1-70b-0a1b2c3d", "d_1", "模型-0a1b2c3d"])
def test_ids_of_leaders_are_accepted(name: str) -> None:
    assert ledger().reserve(ask(name), 0.0)[0].ok


def test_the_node_limit_applies_to_all_devices_together() -> None:
    book = ledger(device("CUDA0"), device("CUDA1"), node_limit=1200)
    assert book.reserve(Reserve(T1, "d", "head", {"CUDA0": 900}), 0.0)[0].ok
    assert book.available("CUDA1") == 300
    refused, _ = book.reserve(ask("e", 301, on="CUDA1"), 0.0)
    assert "node's limit" in refused.reason
    assert book.reserve(ask("e", 300, on="CUDA1"), 0.0)[0].ok


def test_an_unknown_device_is_refused() -> None:
    refused, _ = ledger().reserve(ask(on="CUDA7"), 0.0)
    assert refused.reason == "there is no device CUDA7 here"


def test_other_programs_and_the_reserve_are_respected() -> None:
    book = ledger()
    book.measured(MeasuredMemory((device(free=500),), reserves={"CPU": 100}))
    assert book.available("CPU") == 400
    assert book.reserve(ask(size=300), 0.0)[0].ok
    assert book.available("CPU") == 100
    # The engine has allocated 250 of its 300, and another program 50.
    book.measured(MeasuredMemory((device(free=200),), {"d": {"CPU": 250}}, {"CPU": 100}))
    assert book.available("CPU") == 50
    # Allocating more than granted does not increase the available memory.
    book.measured(MeasuredMemory((device(free=100),), {"d": {"CPU": 400}}, {"CPU": 100}))
    assert book.available("CPU") == 0


def test_devices_of_a_pool_share_memory() -> None:
    book = ledger(device("CPU", pool="ram"), device("Vulkan0", pool="ram"))
    assert book.reserve(ask(size=700, on="Vulkan0"), 0.0)[0].ok
    assert book.available("CPU") == 300
    refused, _ = book.reserve(Reserve(T1, "e", "head", {"CPU": 200, "Vulkan0": 200}), 0.0)
    assert not refused.ok


def test_usage_of_a_pool_counts_for_all_its_devices() -> None:
    book = ledger(device("CPU", pool="ram"), device("Vulkan0", pool="ram"))
    book.reserve(ask(size=700, on="Vulkan0"), 0.0)
    shared = (device("CPU", free=400, pool="ram"), device("Vulkan0", free=400, pool="ram"))
    book.measured(MeasuredMemory(shared, {"d": {"CPU": 600}}))
    assert {device.id: device.available for device in book.devices()} == {"CPU": 300, "Vulkan0": 300}


def test_a_reservation_expires_and_a_late_commit_is_refused() -> None:
    book = ledger()
    book.reserve(ask(), 0.0)
    assert book.next_deadline() == 15.0
    assert book.commit(commit(), 14.9)[0].ok
    book.reserve(ask("e"), 20.0)
    done, _ = book.commit(commit("e"), 35.0)
    assert not done.ok
    assert "expired" in done.reason
    assert not book.holds("e")


def test_a_grant_expires_without_renewals() -> None:
    book = ledger()
    book.reserve(ask(), 0.0)
    book.commit(commit(), 1.0)
    for now in range(4, 100, 10):
        assert book.renew(Renew("d", "head"), float(now))[0].ok
    assert not [a for a in book.expire(108.9) if isinstance(a, KillWorker)]
    killed = [a for a in book.expire(109.0) if isinstance(a, KillWorker)]
    assert [a.deployment for a in killed] == ["d"]
    assert not book.renew(Renew("d", "head"), 109.0)[0].ok
    assert book.holds("d")
    assert not book.live("d")


def test_only_the_head_can_commit_and_renew() -> None:
    book = ledger()
    book.reserve(ask(), 0.0)
    assert not book.commit(replace(commit(), head="thief"), 0.0)[0].ok
    book.commit(commit(), 0.0)
    assert not book.renew(Renew("d", "thief"), 1.0)[0].ok


def test_commands_of_an_old_term_are_refused_except_releases_by_the_head() -> None:
    book = ledger()
    book.reserve(ask(term=Term(5, "b")), 0.0)
    book.commit(commit(), 0.0)
    refused, actions = book.reserve(ask("e", term=Term(5, "a")), 0.0)
    assert not refused.ok
    assert "older" in refused.reason
    assert actions == ()
    assert not book.release(Release(Term(4, "z"), "d", "head"), "z", 0.0)[0].ok
    assert book.live("d")
    assert book.release(Release(Term(4, "z"), "d", "head"), "head", 0.0)[0].ok
    assert book.term == Term(5, "b")


def test_commands_are_idempotent() -> None:
    book = ledger()
    for _ in range(3):
        assert book.reserve(ask(size=600), 0.0)[0].ok
    for _ in range(3):
        assert book.commit(commit(), 0.0)[0].ok
    assert book.reserve(ask(size=600), 1.0)[0].ok
    assert not book.reserve(ask(size=601), 1.0)[0].ok
    assert book.available("CPU") == 400
    for _ in range(3):
        assert book.release(Release(T1, "d", "head"), "head", 2.0)[0].ok
    assert not book.reserve(ask(size=600), 2.0)[0].ok, "the old worker is still ending"
    book.ended("d")
    book.ended("d")
    assert book.release(Release(T1, "d", "head"), "head", 2.0)[0].ok


def test_a_reservation_is_replaced_only_if_the_new_one_fits() -> None:
    book = ledger()
    book.reserve(ask(size=600), 0.0)
    assert not book.reserve(ask(size=1600), 0.0)[0].ok
    assert book.bytes_of("d") == {"CPU": 600}
    assert book.reserve(ask(size=900), 0.0)[0].ok
    assert book.bytes_of("d") == {"CPU": 900}


def test_nothing_is_granted_before_reconciliation() -> None:
    book = Ledger()
    book.measured(MeasuredMemory((device(),)))
    assert not book.reserve(ask(), 0.0)[0].ok
    book.reconciled()
    assert book.reserve(ask(), 0.0)[0].ok


def test_a_draining_node_refuses_reservations() -> None:
    book = ledger()
    book.draining = True
    assert "draining" in book.reserve(ask(), 0.0)[0].reason


class LedgerMachine(RuleBasedStateMachine):
    """Random commands of leaders and heads, with random measurements in between."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.totals = {"CPU": 1000, "CUDA0": 700, "Vulkan0": 1000}
        self.pools = {"CPU": "ram", "CUDA0": "", "Vulkan0": "ram"}
        self.limits = {"CPU": 900, "CUDA0": 700, "Vulkan0": 800}
        self.book = Ledger(ready=True, node_limit=1500)
        self.measure(dict.fromkeys(self.totals, 0))
        self.dying: set[str] = set()
        self.newest = Term()

    def measure(self, others: dict[str, int]) -> None:
        devices = (
            device(name, total, max(0, total - others[name]), limit=self.limits[name], pool=self.pools[name])
            for name, total in self.totals.items()
        )
        self.book.measured(MeasuredMemory(tuple(devices)))

    def apply(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, KillWorker):
                self.dying.add(action.deployment)
            if isinstance(action, PersistTerm):
                assert action.term > self.newest
                self.newest = action.term

    names = st.sampled_from("abcde")
    heads = st.sampled_from(["h1", "h2"])
    terms = st.builds(Term, st.integers(0, 4), st.sampled_from(["h1", "h2"]))
    sizes = st.dictionaries(st.sampled_from(["CPU", "CUDA0", "Vulkan0"]), st.integers(0, 1100), min_size=1)

    @rule(term=terms, name=names, head=heads, sizes=sizes)
    def reserve(self, term: Term, name: str, head: str, sizes: dict[str, int]) -> None:
        old = term < self.newest
        before = {key: self.book.available(key) for key in self.totals}
        known = self.book.holds(name)
        reserved, actions = self.book.reserve(Reserve(term, name, head, sizes), self.now)
        self.apply(actions)
        assert not (old and reserved.ok)
        if reserved.ok and not known:
            assert all(size <= before[key] for key, size in sizes.items())

    @rule(name=names, head=heads)
    def commit(self, name: str, head: str) -> None:
        owner = next((g.head for g in self.book.grants() if g.deployment == name), head)
        done, actions = self.book.commit(Commit(name, head, (), "b"), self.now)
        self.apply(actions)
        assert not (done.ok and owner != head)

    @rule(name=names, head=heads)
    def renew(self, name: str, head: str) -> None:
        self.apply(self.book.renew(Renew(name, head), self.now)[1])

    @rule(term=terms, name=names, caller=heads)
    def release(self, term: Term, name: str, caller: str) -> None:
        self.apply(self.book.release(Release(term, name, caller), caller, self.now)[1])

    @rule(step=st.floats(0, 20))
    def wait(self, step: float) -> None:
        self.now += step
        self.apply(self.book.expire(self.now))

    @rule()
    def die(self) -> None:
        for name in self.dying:
            self.book.ended(name)
        self.dying.clear()

    @rule(others=st.fixed_dictionaries({k: st.integers(0, 1000) for k in ("CPU", "CUDA0", "Vulkan0")}))
    def others_take_memory(self, others: dict[str, int]) -> None:
        self.measure(others)

    @invariant()
    def grants_stay_within_limits(self) -> None:
        granted = dict.fromkeys(self.totals, 0)
        for grant in self.book.grants():
            granted[grant.device] += grant.bytes
        for name, size in granted.items():
            assert size <= self.limits[name]
        assert granted["CPU"] + granted["Vulkan0"] <= 1000
        assert sum(granted.values()) <= 1500

    @invariant()
    def devices_agree_with_grants(self) -> None:
        for known in self.book.devices():
            assert known.granted == sum(g.bytes for g in self.book.grants() if g.device == known.id)
            assert 0 <= known.available <= known.limit - known.granted

    @invariant()
    def ending_deployments_are_being_killed(self) -> None:
        ending = {g.deployment for g in self.book.grants() if not self.book.live(g.deployment)}
        assert ending <= self.dying

    @invariant()
    def the_newest_term_is_persisted(self) -> None:
        assert self.book.term == self.newest


LedgerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
TestLedgerMachine = LedgerMachine.TestCase


def external(name: str = "pc:50052", total: int = 1000) -> Device:
    return Device(name, Kind.EXTERNAL, name, total, total, total, 0, 0)


def test_an_external_worker_serves_one_deployment_with_all_its_devices() -> None:
    book = ledger(device(), external("pc:50052#1/2"), external("pc:50052#2/2"), external("pc:50053"))
    assert book.reserve(ask("d", 100, on="pc:50052#1/2"), 0.0)[0].ok
    assert [book.available(device) for device in ("pc:50052#1/2", "pc:50052#2/2", "pc:50053")] == [0, 0, 1000]
    refused, _ = book.reserve(ask("e", 100, on="pc:50052#2/2"), 0.0)
    assert not refused.ok and "one deployment at a time, and d has it" in refused.reason
    book.release(Release(T1, "d", "head"), "head", 1.0)
    assert book.reserve(ask("e", 100, on="pc:50052#2/2"), 1.0)[0].ok


def test_the_node_limit_excludes_external_workers() -> None:
    book = ledger(device(), external(), node_limit=300)
    assert book.reserve(ask("far", 900, on="pc:50052"), 0.0)[0].ok
    assert book.available("CPU") == 300
    assert book.reserve(ask("near", 300), 0.0)[0].ok
    assert not book.reserve(ask("more", 1), 0.0)[0].ok


def test_memory_mapped_by_others_is_not_granted() -> None:
    book = ledger()
    book.measured(MeasuredMemory((device(free=900),), taken={"CPU": 500}))
    assert book.available("CPU") == 400
    assert not book.reserve(ask("d", 401), 0.0)[0].ok
    assert book.reserve(ask("d", 400), 0.0)[0].ok
    book.measured(MeasuredMemory((device(free=900),)))
    assert book.available("CPU") == 500, "the other program released it"
