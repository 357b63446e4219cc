"""Which machine an admin means: names are chosen by whoever has them, ids and codes are not."""

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
    """With the secret of its cluster, or none."""

    ring: Keyring | None = Keyring.found(ID)

    def keyring(self) -> Keyring | None:
        return self.ring


class Door:
    """A member at which some machines wait."""

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
async def test_a_machine_is_meant_by_name_id_and_code_as_people_type_it(text: str) -> None:
    door = Door(GPU_BOX, WaitingMachine(NEWER, "bert", "WXYZ-2345"))
    assert await door.service.admit(text) == GPU_BOX
    assert door.approved == [NEW]


@pytest.mark.parametrize("text", ["ABCD-EFGH", NEW])
async def test_a_stranger_named_as_anothers_code_or_id_is_not_admitted_in_its_place(text: str) -> None:
    thief = WaitingMachine(NEWER, text, "WXYZ-2345")
    door = Door(thief)
    with pytest.raises(Refusal, match=f"no machine '{text}' waits for admission"):
        await door.service.admit(text)
    assert not door.approved, "the machine that the admin means is not there yet"
    door = Door(thief, GPU_BOX)
    assert await door.service.admit(text) == GPU_BOX, "nor can it be kept out so"
    assert door.approved == [NEW]


async def test_what_leads_further_is_said() -> None:
    door = Door(GPU_BOX, replace(GPU_BOX, node=NEWER, code="WXYZ-2345"))
    with pytest.raises(Refusal, match="by its code: ABCD-EFGH, WXYZ-2345"):
        await door.service.admit("gpu-box")
    door = Door(GPU_BOX, replace(GPU_BOX, node=NEWER))
    with pytest.raises(Refusal, match=f"by its id: {NEW}, {NEWER}"):
        await door.service.admit("ABCD-EFGH")
    with pytest.raises(
        Refusal, match=r"no machine 'ABCD' waits for admission; waiting: gpu-box \(ABCD-EFGH\)"
    ):
        await Door(GPU_BOX).service.admit("ABCD")


@pytest.mark.parametrize(
    ("ring", "words"),
    [(None, "cluster.token"), (Keyring.for_open(), "any machine may join .* cluster secure")],
)
async def test_where_there_is_no_door_none_is_said_to_be_shut(ring: Keyring | None, words: str) -> None:
    door = Door()
    await door.service.open_door(0)
    assert door.opened == [0]
    door.view.ring = ring
    for seconds in (0.0, 600.0):
        with pytest.raises(Refusal, match=words) as refused:
            await door.service.open_door(seconds)
        assert refused.value.fault is Fault.BAD_REQUEST and door.opened == [0]
    with pytest.raises(Refusal, match=words):
        await door.service.admit("gpu-box")


async def test_a_door_that_is_open_at_some_nodes_is_said_to_be_so() -> None:
    door = Door()
    door.view.others = {OTHER: record(OTHER, name="bert")}
    for seconds, words in (
        (600.0, "the door is open at name-0000000000000000; failed: bert: "),
        (0.0, "the door is shut at name-0000000000000000; "),
    ):
        with pytest.raises(Refusal, match=words) as refused:
            await door.service.open_door(seconds)
        assert refused.value.fault is Fault.UNAVAILABLE
    assert door.opened == [600, 0]


async def test_who_was_evicted_is_not_called_unknown() -> None:
    door = Door()
    gone = KeyringMember(NEW, "bert")
    door.view.ring = replace(Keyring.found(ID), evicted=(gone,))
    for text in ("bert", NEW):
        with pytest.raises(Refusal, match=r"bert \(a+\) was evicted already"):
            await door.service.secret.evict(text)


def test_a_node_named_as_anothers_id_stands_in_nobodys_way() -> None:
    view = FakeView(record(ID, name=OTHER))
    view.others = {OTHER: record(OTHER, name=ID)}
    assert node_named(view, ID) == ID and node_named(view, OTHER) == OTHER
    view.others = {}
    with pytest.raises(Refusal, match="there is no node"):
        node_named(view, OTHER)
