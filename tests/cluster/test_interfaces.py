from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, cast

import pytest
from zeroconf import ServiceStateChange, Zeroconf

from sollold.cluster.net import interfaces as interfaces_module
from sollold.cluster.net import mdns as discovery_module
from sollold.cluster.net.interfaces import (
    Interface,
    InterfaceWatch,
    _unstable_addresses,
    interfaces,
    rank,
    tellable,
    within,
)
from sollold.cluster.net.mdns import SERVICE, Discovery
from tests import netns
from tests.doubles import until


def test_network_cards_come_first_and_bridges_for_containers_last(tmp_path: Path) -> None:
    for card in ("eth0", "wlp3s0"):
        (tmp_path / card / "device").mkdir(parents=True)
    names = ["docker0", "tailscale0", "br0", "veth12ab", "wlp3s0", "br-77aa", "eth0", "wg0", "bond0"]
    ranked = sorted(names, key=lambda name: (rank(name, tmp_path), name))
    assert ranked[:2] == ["eth0", "wlp3s0"]
    assert set(ranked[2:4]) == {"br0", "bond0"}
    assert set(ranked[4:6]) == {"tailscale0", "wg0"}
    assert set(ranked[6:]) == {"docker0", "veth12ab", "br-77aa"}


def test_published_addresses_are_ordered_by_interface_rank() -> None:
    found = (
        Interface("eth0", 0, ("192.168.1.5",), ("fd00::5",)),
        Interface("docker0", 3, ("172.17.0.1",)),
    )
    assert tellable(found, ipv6=False) == ("192.168.1.5", "172.17.0.1")
    assert tellable(found) == ("192.168.1.5", "fd00::5", "172.17.0.1")


def test_loopback_and_link_local_addresses_are_not_published() -> None:
    for interface in interfaces():
        assert not any(
            address.startswith(("127.", "fe80:", "::1")) for address in interface.ipv4 + interface.ipv6
        )


def test_temporary_addresses_are_not_published(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    table.write_text(
        "fd000000000000000000000000000002 04 40 00 80 eth0\n"  # permanent
        "fd000000000000000000000000000003 04 40 00 01 eth0\n"  # temporary
        "fd000000000000000000000000000004 04 40 00 40 eth0\n"  # tentative
        "fd000000000000000000000000000005 04 40 00 c8 eth0\n"  # duplicate
        "rubbish\n"
    )
    assert _unstable_addresses(table) == {"fd00::3", "fd00::4", "fd00::5"}
    assert _unstable_addresses(tmp_path / "nothing") == frozenset()


def test_an_address_is_matched_with_the_own_networks() -> None:
    assert within("10.1.2.3", ("192.168.0.0/24", "10.1.2.0/24"))
    assert not within("10.1.3.3", ("10.1.2.0/24",))
    assert not within("fd00::1", ("10.1.2.0/24",))
    assert not within("fe80::1%eth0", ())


def test_only_the_chosen_interfaces_are_used() -> None:
    assert interfaces(["does-not-exist"]) == ()


def make(found: list[tuple[str, object]], *, ipv6: bool = False, named: tuple[str, ...] = ()) -> Discovery:
    return Discovery(
        node="00000000000000aa", boot=7, clusters=("c0ffee", "decaf"), port=11436,
        found=lambda node, addresses: found.append((node, addresses)), ipv6=ipv6,
        named=named,
    )  # fmt: skip


async def test_broken_mdns_is_logged_once_and_retried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def broken(**options: object) -> object:
        attempts.append(options)
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", broken)
    monkeypatch.setattr(discovery_module, "_RETRY_SECONDS", 0.01)
    discovery = make([])
    with caplog.at_level(logging.WARNING):
        discovery.use_interfaces((Interface("eth0", 0, ("192.168.1.5",)),))
        await until(lambda: len(attempts) > 3)
    status = discovery.status()
    assert not status.working
    assert "No such device" in status.reason
    assert caplog.text.count("mDNS does not work here") == 1
    await discovery.close()


async def test_without_ipv6_multicast_the_announcement_uses_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[object] = []

    def without_ipv6(**options: object) -> object:
        attempts.append(options["interfaces"])
        if len(attempts) == 1:
            raise OSError(97, "Address family not supported by protocol")
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", without_ipv6)
    discovery = make([], ipv6=True)
    discovery.use_interfaces((Interface("eth0", 0, ("192.168.1.5",), ("fd00::5",)),))
    await until(lambda: not discovery.status().working and len(attempts) == 2)
    assert attempts == [["192.168.1.5", "fd00::5"], ["192.168.1.5"]]
    await discovery.close()


async def test_a_missing_interface_is_reported_in_the_status() -> None:
    discovery = make([])
    discovery.use_interfaces(())
    await until(lambda: discovery.status().reason == "no network interface has an IPv4 address")
    await discovery.close()
    discovery = make([], named=("eht0",))
    discovery.use_interfaces(())
    await until(lambda: "none of eht0 (cluster.interfaces)" in discovery.status().reason)
    await discovery.close()


class FakeServiceInfo:
    """The announcement of another node."""

    decoded_properties: ClassVar = {"v": "1", "c": "c0ffee", "boot": "1"}
    port = 11436

    def __init__(self, service: str, name: str) -> None:
        pass

    async def async_request(self, zeroconf: object, milliseconds: int) -> bool:
        return True

    def parsed_scoped_addresses(self, version: object) -> list[str]:
        return ["10.0.0.2"]


async def test_both_cluster_names_are_accepted_while_the_token_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", FakeServiceInfo)
    discovery = make([])
    for name, cluster in (("bb", "decaf"), ("cc", "c0ffee"), ("dd", "another")):
        monkeypatch.setitem(FakeServiceInfo.decoded_properties, "c", cluster)
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"{name}.{SERVICE}", ServiceStateChange.Added)
        await until(lambda: not discovery._asking)
    assert discovery.status().found == ("bb", "cc")
    assert discovery.status().foreign == 1
    monkeypatch.setitem(FakeServiceInfo.decoded_properties, "c", "decaf")
    discovery._on_change(cast(Zeroconf, None), SERVICE, f"dd.{SERVICE}", ServiceStateChange.Updated)
    await until(lambda: discovery.status().found == ("bb", "cc", "dd"))
    assert discovery.status().foreign == 0


async def test_a_node_with_another_protocol_is_reported_until_it_is_upgraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", FakeServiceInfo)
    discovery = make([])

    async def announce(version: str, change: ServiceStateChange) -> tuple[str, ...]:
        monkeypatch.setitem(FakeServiceInfo.decoded_properties, "v", version)
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"bb.{SERVICE}", change)
        await until(lambda: not discovery._asking)
        return discovery.status().unlike

    assert await announce("7", ServiceStateChange.Added) == ("10.0.0.2",)
    assert discovery.status().found == ()
    assert await announce("1", ServiceStateChange.Updated) == ()
    assert discovery.status().found == ("bb",)
    assert await announce("7", ServiceStateChange.Updated) == ("10.0.0.2",)
    assert await announce("7", ServiceStateChange.Removed) == ()


async def test_a_node_that_withdrew_its_announcement_stays_known_without_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", FakeServiceInfo)
    found: list[tuple[str, object]] = []
    discovery = make(found)
    other = "00000000000000bb"
    for change, addresses in (
        (ServiceStateChange.Added, (("10.0.0.2", 11436),)),
        (ServiceStateChange.Removed, ()),
        (ServiceStateChange.Added, (("10.0.0.2", 11436),)),
    ):
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"{other}.{SERVICE}", change)
        await until(lambda: discovery.seen() == {other: addresses} and not discovery._asking)  # noqa: B023
    assert len(found) == 2


async def test_changes_of_the_interfaces_are_noticed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces_module, "_SETTLE_SECONDS", 0.0)
    found: list[tuple[Interface, ...]] = []
    answers: list[tuple[Interface, ...] | Exception] = [
        (),
        RuntimeError("can't start new thread"),
        (Interface("eth0", 0, ("192.168.1.5",)),),
    ]

    def read(chosen: object) -> tuple[Interface, ...]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(interfaces_module, "interfaces", read)
    watch = InterfaceWatch((), found.append, lambda lost: None)
    await watch.start()
    for left in (1, 0):
        watch._news.set()
        await until(lambda: len(answers) == left)  # noqa: B023
    await until(lambda: len(found) == 2)
    await watch.close()


async def test_many_withdrawn_announcements_do_not_hide_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", FakeServiceInfo)
    monkeypatch.setattr(discovery_module, "_MAX_INSTANCES", 2)
    found: list[tuple[str, object]] = []
    discovery = make(found)
    for name, change in (
        ("bb", ServiceStateChange.Added),
        ("cc", ServiceStateChange.Added),
        ("dd", ServiceStateChange.Added),
        ("bb", ServiceStateChange.Removed),
        ("ee", ServiceStateChange.Added),
    ):
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"{name}.{SERVICE}", change)
        await until(lambda: not discovery._asking)
    assert [name for name, _ in found] == ["bb", "cc", "dd", "ee"] and len(discovery.seen()) == 2


async def test_forged_announcements_do_not_keep_out_another_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForgedServiceInfo(FakeServiceInfo):
        def __init__(self, service: str, name: str) -> None:
            self._forged = name.startswith("forged")

        def parsed_scoped_addresses(self, version: object) -> list[str]:
            return ["10.0.0.66" if self._forged else "10.0.0.2"]

    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", ForgedServiceInfo)
    monkeypatch.setattr(discovery_module, "_MAX_INSTANCES", 4)
    monkeypatch.setitem(FakeServiceInfo.decoded_properties, "c", "another")
    discovery = make([])
    for name in (*(f"forged{number}" for number in range(9)), "00000000000000bb"):
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"{name}.{SERVICE}", ServiceStateChange.Added)
        await until(lambda: not discovery._asking)
    assert discovery.announces(["00000000000000bb"]) and discovery.status().foreign == 4
    asked = [discovery.foreign() for _ in range(50)]
    assert (("10.0.0.2", 11436),) in {group for groups in asked for group in groups}
    monkeypatch.setattr(discovery_module, "_MAX_FOREIGN_ASKED", 2)
    assert {len(discovery.foreign()) for _ in range(50)} == {2}, "seeds are asked as well"


async def test_forged_announcements_that_do_not_answer_hide_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = asyncio.Event()

    class SlowServiceInfo(FakeServiceInfo):
        def __init__(self, service: str, name: str) -> None:
            self._forged = name.startswith("forged")

        async def async_request(self, zeroconf: object, milliseconds: int) -> bool:
            if self._forged:
                await timeout.wait()
            return not self._forged

    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", SlowServiceInfo)
    monkeypatch.setattr(discovery_module, "_MAX_INSTANCES", 2)
    found: list[tuple[str, object]] = []
    discovery = make(found)
    for name in ("forged1", "forged2", "forged3", "bb"):
        discovery._on_change(cast(Zeroconf, None), SERVICE, f"{name}.{SERVICE}", ServiceStateChange.Added)
    assert len(discovery._asking) == 2
    timeout.set()
    await until(lambda: [name for name, _ in found] == ["bb"])


_DISCOVER = """
import asyncio, sys
from sollold.cluster.net.mdns import SERVICE, Discovery
from sollold.cluster.net.interfaces import interfaces
async def main(node, cluster):
    found_other = asyncio.Event()
    def found(node, addresses):
        print(node, addresses, flush=True)
        found_other.set()
    discovery = Discovery(node=node, boot=1, clusters=[cluster], port=7000, found=found, ipv6=False, named=())
    discovery.use_interfaces(interfaces())
    foreign = 0
    for _ in range(400):
        if found_other.is_set():
            await asyncio.sleep(1)
            break
        foreign = max(foreign, discovery.status().foreign)
        await asyncio.sleep(0.01)
    else:
        print("nobody", foreign, flush=True)
    await discovery.close()
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.cluster
@pytest.mark.skipif(bool(netns.available()), reason=netns.available())
@pytest.mark.parametrize(("other", "seen"), [("c1", True), ("c2", False)])
async def test_nodes_of_one_cluster_discover_each_other_on_a_real_network(other: str, seen: bool) -> None:
    ids = ("00000000000000aa", "00000000000000bb")
    with netns.Lan(2) as lan:
        children = [
            lan[index].popen(
                [sys.executable, "-c", _DISCOVER, ids[index], ("c1", other)[index]],
                stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            )
            for index in range(2)
        ]  # fmt: skip
        outputs = [await asyncio.to_thread(child.communicate, timeout=30) for child in children]
    for index in range(2):
        if seen:
            assert outputs[index][0].startswith(f"{ids[1 - index]} (('{lan[1 - index].address}', 7000),)")
        else:
            assert outputs[index][0] == "nobody 1\n"
