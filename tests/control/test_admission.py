"""Finding the machine to admit: machines choose their names, but not their ids and codes."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from sollold.cluster.admission.keyring import Keyring, KeyringMember
from sollold.cluster.admission.orders import AdmitOrder, DoorOrder
from sollold.cluster.gossip.record import WaitingMachine
from sollold.cluster.net.node import ClusterNode
from sollold.control.admission import AdmissionService
from sollold.control.nodes import node_named
from sollold.control.secret_change import SecretChanges
from sollold.errors import Fault, Refusal
from tests.doubles import FakeView, record
from tests.models.fakes import FakeCalls, FakeServer

ID, OTHER = "0" * 16, "1" * 16
NEW, NEWER = "a" * 16, "b" * 16
GPU_BOX = WaitingMachine(NEW, "gpu-box", "ABCD-EFGH")


class View(FakeView):
    """A view with the keyring of its cluster, or none."""

    ring: Keyring | None = Keyring.found(ID)

    def keyring(self) -> Keyring | None:
        return self.ring


class Admitter:
    """A member with machines that wait for admission."""

    def __init__(self, *waiting: WaitingMachine) -> None:
        self.view = View(replace(record(ID), waiting=waiting))
        self.approved: list[str] = []
        self.opened: list[float] = []
        server = FakeServer()
        server.method("admit", AdmitOrder, self._approve)
        server.method("door", DoorOrder, self._open)
        calls = FakeCalls(ID, {ID: server})
        view = cast(ClusterNode, self.view)
        self.service = AdmissionService(view, calls, SecretChanges(view, calls))

    async def _approve(self, caller: str, order: AdmitOrder) -> bool:
        self.approved.append(order.node)
        return True

    async def _open(self, caller: str, order: DoorOrder) -> bool:
        self.opened.append(order.seconds)
        return True


@pytest.mark.parametrize("text", ["gpu-box", NEW, "ABCD-EFGH", "abcd-efgh", "abcdefgh", " ABCD EFGH "])
async def test_a_machine_is_found_by_name_id_and_code_as_typed(text: str) -> None:
    admitter = Admitter(GPU_BOX, WaitingMachine(NEWER, "bert", "WXYZ-2345"))
    assert await admitter.service.admit(text) == GPU_BOX
    assert admitter.approved == [NEW]


@pytest.mark.parametrize("text", ["ABCD-EFGH", NEW])
async def test_a_machine_named_like_anothers_code_or_id_is_not_admitted_instead(text: str) -> None:
    thief = WaitingMachine(NEWER, text, "WXYZ-2345")
    admitter = Admitter(thief)
    with pytest.raises(Refusal, match=f"no machine '{text}' waits for admission"):
        await admitter.service.admit(text)
    assert not admitter.approved, "the machine that the admin means has not applied yet"
    admitter = Admitter(thief, GPU_BOX)
    assert await admitter.service.admit(text) == GPU_BOX, "nor can its admission be prevented"
    assert admitter.approved == [NEW]


async def test_refusals_list_the_candidates() -> None:
    admitter = Admitter(GPU_BOX, replace(GPU_BOX, node=NEWER, code="WXYZ-2345"))
    with pytest.raises(Refusal, match="by its code: ABCD-EFGH, WXYZ-2345"):
        await admitter.service.admit("gpu-box")
    admitter = Admitter(GPU_BOX, replace(GPU_BOX, node=NEWER))
    with pytest.raises(Refusal, match=f"by its id: {NEW}, {NEWER}"):
        await admitter.service.admit("ABCD-EFGH")
    with pytest.raises(
        Refusal, match=r"no machine 'ABCD' waits for admission; waiting: gpu-box \(ABCD-EFGH\)"
    ):
        await Admitter(GPU_BOX).service.admit("ABCD")


@pytest.mark.parametrize(
    ("ring", "words"),
    [(None, "cluster.token"), (Keyring.for_open(), "any machine may join .* cluster secure")],
)
async def test_admission_is_refused_in_a_cluster_without_a_secret(ring: Keyring | None, words: str) -> None:
    admitter = Admitter()
    await admitter.service.open_door(0)
    assert admitter.opened == [0]
    admitter.view.ring = ring
    for seconds in (0.0, 600.0):
        with pytest.raises(Refusal, match=words) as refused:
            await admitter.service.open_door(seconds)
        assert refused.value.fault is Fault.BAD_REQUEST and admitter.opened == [0]
    with pytest.raises(Refusal, match=words):
        await admitter.service.admit("gpu-box")


async def test_admission_opened_on_some_nodes_only_is_reported() -> None:
    admitter = Admitter()
    admitter.view.others = {OTHER: record(OTHER, name="bert")}
    for seconds, words in (
        (600.0, "new machines are admitted at name-0000000000000000; failed: bert: "),
        (0.0, "new machines are no longer admitted at name-0000000000000000; "),
    ):
        with pytest.raises(Refusal, match=words) as refused:
            await admitter.service.open_door(seconds)
        assert refused.value.fault is Fault.UNAVAILABLE
    assert admitter.opened == [600, 0]


async def test_one_of_the_nodes_at_which_a_machine_waits_is_enough() -> None:
    admitter = Admitter(GPU_BOX)
    admitter.view.others = {OTHER: replace(record(OTHER, name="bert"), waiting=(GPU_BOX,))}
    assert await admitter.service.admit("gpu-box") == GPU_BOX, "bert can't be reached"
    assert admitter.approved == [NEW]
    admitter.view.update_me(waiting=())
    with pytest.raises(Refusal, match="bert: ") as refused:
        await admitter.service.admit("gpu-box")
    assert refused.value.fault is Fault.UNAVAILABLE


async def test_an_evicted_machine_is_reported_as_evicted() -> None:
    admitter = Admitter()
    gone = KeyringMember(NEW, "bert")
    admitter.view.ring = replace(Keyring.found(ID), evicted=(gone,))
    for text in ("bert", NEW):
        with pytest.raises(Refusal, match=r"bert \(a+\) was evicted already"):
            await admitter.service.secret.evict(text)


def test_ids_take_precedence_over_names() -> None:
    view = FakeView(record(ID, name=OTHER))
    view.others = {OTHER: record(OTHER, name=ID)}
    assert node_named(view, ID) == ID and node_named(view, OTHER) == OTHER
    view.others = {node: record(node, name="box") for node in (OTHER, NEW)}
    with pytest.raises(Refusal, match=rf"{OTHER} \(127\.0\.0\.1\), {NEW} \(127\.0\.0\.1\)"):
        node_named(view, "box")
    view.others = {}
    with pytest.raises(Refusal, match="there is no node"):
        node_named(view, OTHER)
