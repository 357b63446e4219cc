from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, cast

import pytest
from zeroconf import ServiceStateChange, Zeroconf

from sollold.cluster.net import mdns as discovery_module
from sollold.cluster.net.interfaces import Interface, _passing_addresses, interfaces, rank, tellable, within
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


def test_what_is_told_to_others() -> None:
    found = (
        Interface("eth0", 0, ("192.168.1.5",), ("fd00::5",)),
        Interface("docker0", 3, ("172.17.0.1",)),
    )
    assert tellable(found, ipv6=False) == ("192.168.1.5", "172.17.0.1")
    assert tellable(found) == ("192.168.1.5", "fd00::5", "172.17.0.1")


def test_loopback_and_link_local_are_never_told() -> None:
    for one in interfaces():
        assert not any(address.startswith(("127.", "fe80:", "::1")) for address in one.ipv4 + one.ipv6)


def test_addresses_that_pass_are_not_told(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    table.write_text(
        "fd000000000000000000000000000002 04 40 00 80 eth0\n"  # permanent
        "fd000000000000000000000000000003 04 40 00 01 eth0\n"  # of a day
        "fd000000000000000000000000000004 04 40 00 40 eth0\n"  # still being probed
        "fd000000000000000000000000000005 04 40 00 c8 eth0\n"  # somebody else has it
        "rubbish\n"
    )
    assert _passing_addresses(table) == {"fd00::3", "fd00::4", "fd00::5"}
    assert _passing_addresses(tmp_path / "nothing") == frozenset()


def test_whether_an_address_is_on_a_network_of_ours() -> None:
    assert within("10.1.2.3", ("192.168.0.0/24", "10.1.2.0/24"))
    assert not within("10.1.3.3", ("10.1.2.0/24",))
    assert not within("fd00::1", ("10.1.2.0/24",))
    assert not within("fe80::1%eth0", ())


def test_chosen_interfaces_are_the_only_ones() -> None:
    assert interfaces(["there-is-none"]) == ()


def make(found: list[tuple[str, object]], *, ipv6: bool = False, named: tuple[str, ...] = ()) -> Discovery:
    return Discovery(
        node="00000000000000aa", boot=7, clusters=("c0ffee", "decaf"), port=11436,
        found=lambda node, addresses: found.append((node, addresses)), ipv6=ipv6,
        named=named,
    )  # fmt: skip


async def test_broken_mdns_is_said_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def broken(**options: object) -> object:
        tries.append(options)
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", broken)
    monkeypatch.setattr(discovery_module, "_RETRY_SECONDS", 0.01)
    discovery = make([])
    with caplog.at_level(logging.WARNING):
        discovery.use_interfaces((Interface("eth0", 0, ("192.168.1.5",)),))
        await until(lambda: len(tries) > 3)
    status = discovery.status()
    assert not status.working
    assert "No such device" in status.reason
    assert caplog.text.count("mDNS does not work here") == 1
    await discovery.close()


async def test_without_ipv6_multicast_the_announcement_goes_over_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[object] = []

    def half(**options: object) -> object:
        tries.append(options["interfaces"])
        if len(tries) == 1:
            raise OSError(97, "Address family not supported by protocol")
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", half)
    discovery = make([], ipv6=True)
    discovery.use_interfaces((Interface("eth0", 0, ("192.168.1.5",), ("fd00::5",)),))
    await until(lambda: not discovery.status().working and len(tries) == 2)
    assert tries == [["192.168.1.5", "fd00::5"], ["192.168.1.5"]]
    await discovery.close()


async def test_no_interface_is_a_reason_not_an_error() -> None:
    discovery = make([])
    discovery.use_interfaces(())
    await until(lambda: discovery.status().reason == "no network interface has an IPv4 address")
    await discovery.close()
    discovery = make([], named=("eht0",))
    discovery.use_interfaces(())
    await until(lambda: "none of eht0 (cluster.interfaces)" in discovery.status().reason)
    await discovery.close()


class Announced:
    """What another node tells."""

    decoded_properties: ClassVar = {"v": "1", "c": "c0ffee", "boot": "1"}
    port = 11436

    def __init__(self, service: str, name: str) -> None:
        pass

    async def async_request(self, zeroconf: object, milliseconds: int) -> bool:
        return True

    def parsed_scoped_addresses(self, version: object) -> list[str]:
        return ["10.0.0.2"]


async def test_while_the_token_is_changed_both_names_of_the_cluster_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", Announced)
    discovery = make([])
    for name, cluster in (("bb", "decaf"), ("cc", "c0ffee"), ("dd", "another")):
        monkeypatch.setitem(Announced.decoded_properties, "c", cluster)
        discovery._heard(cast(Zeroconf, None), SERVICE, f"{name}.{SERVICE}", ServiceStateChange.Added)
        await until(lambda: not discovery._asking)
    assert discovery.status().found == ("bb", "cc")
    assert discovery.status().foreign == 1
    monkeypatch.setitem(Announced.decoded_properties, "c", "decaf")
    discovery._heard(cast(Zeroconf, None), SERVICE, f"dd.{SERVICE}", ServiceStateChange.Updated)
    await until(lambda: discovery.status().found == ("bb", "cc", "dd"))
    assert discovery.status().foreign == 0


async def test_a_node_of_another_protocol_is_told_until_it_is_upgraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", Announced)
    discovery = make([])

    async def heard(version: str, change: ServiceStateChange) -> tuple[str, ...]:
        monkeypatch.setitem(Announced.decoded_properties, "v", version)
        discovery._heard(cast(Zeroconf, None), SERVICE, f"bb.{SERVICE}", change)
        await until(lambda: not discovery._asking)
        return discovery.status().unlike

    assert await heard("7", ServiceStateChange.Added) == ("10.0.0.2",)
    assert discovery.status().found == ()
    assert await heard("1", ServiceStateChange.Updated) == ()
    assert discovery.status().found == ("bb",)
    assert await heard("7", ServiceStateChange.Updated) == ("10.0.0.2",)
    assert await heard("7", ServiceStateChange.Removed) == ()


async def test_who_took_its_announcement_back_is_known_but_no_longer_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", Announced)
    found: list[tuple[str, object]] = []
    discovery = make(found)
    other = "00000000000000bb"
    for change, addresses in (
        (ServiceStateChange.Added, (("10.0.0.2", 11436),)),
        (ServiceStateChange.Removed, ()),
        (ServiceStateChange.Added, (("10.0.0.2", 11436),)),
    ):
        discovery._heard(cast(Zeroconf, None), SERVICE, f"{other}.{SERVICE}", change)
        await until(lambda: discovery.seen() == {other: addresses} and not discovery._asking)  # noqa: B023
    assert len(found) == 2


_TWO = """
import asyncio, sys
from sollold.cluster.net.mdns import SERVICE, Discovery
from sollold.cluster.net.interfaces import interfaces
async def main(node, cluster):
    came = asyncio.Event()
    def found(node, addresses):
        print(node, addresses, flush=True)
        came.set()
    one = Discovery(node=node, boot=1, clusters=[cluster], port=7000, found=found, ipv6=False, named=())
    one.use_interfaces(interfaces())
    foreign = 0
    for _ in range(400):
        if came.is_set():
            await asyncio.sleep(1)
            break
        foreign = max(foreign, one.status().foreign)
        await asyncio.sleep(0.01)
    else:
        print("nobody", foreign, flush=True)
    await one.close()
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.cluster
@pytest.mark.skipif(bool(netns.available()), reason=netns.available())
@pytest.mark.parametrize(("other", "seen"), [("c1", True), ("c2", False)])
async def test_announcements_meet_on_a_real_network(other: str, seen: bool) -> None:
    ids = ("00000000000000aa", "00000000000000bb")
    with netns.Lan(2) as lan:
        children = [
            lan[at].popen(
                [sys.executable, "-c", _TWO, ids[at], ("c1", other)[at]],
                stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            )
            for at in range(2)
        ]  # fmt: skip
        said = [await asyncio.to_thread(child.communicate, timeout=30) for child in children]
    for at in range(2):
        if seen:
            assert said[at][0].startswith(f"{ids[1 - at]} (('{lan[1 - at].address}', 7000),)")
        else:
            assert said[at][0] == "nobody 1\n"
