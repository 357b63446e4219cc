"""Tests of tests.netns: machines made of network namespaces."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests import netns
from tests.daemons import until

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(netns.available()), reason=netns.available())]


def reaches(here: netns.Machine, there: netns.Machine) -> bool:
    # One datagram from here to there.
    with there.inside():
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((there.address, 0))
        listener.settimeout(0.4)
    with here.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.bind((here.address, 0))
    with listener, sender:
        sender.sendto(b"there?", listener.getsockname())
        try:
            return listener.recv(100) == b"there?"
        except TimeoutError:
            return False


def test_machines_reach_each_other_until_the_cable_is_cut() -> None:
    with netns.Lan(2) as lan:
        assert reaches(lan[0], lan[1])
        lan[1].cut()
        assert not reaches(lan[0], lan[1])
        lan[1].restore()
        # The bridge starts to forward a moment later.
        until(lambda: reaches(lan[0], lan[1]), "the cable works again")


def test_a_partition_separates_machines_until_it_is_healed() -> None:
    with netns.Lan(3) as lan:
        assert reaches(lan[0], lan[1])
        lan.partition([0, 2], [1])
        assert not reaches(lan[0], lan[1])
        assert reaches(lan[0], lan[2])
        lan.heal()
        until(lambda: reaches(lan[0], lan[1]) and reaches(lan[2], lan[1]), "the cables work again")


def test_closing_removes_processes_and_namespaces() -> None:
    with netns.Lan(1) as lan:
        name = lan.name
        child = lan[0].popen(["sleep", "600"])
        assert lan[0].run(["ip", "-4", "address", "show", "eth0"]).stdout.count(lan[0].address) == 1
        home = Path("/proc/self/ns/net").readlink()
        with lan[0].inside():
            assert Path("/proc/thread-self/ns/net").readlink() != home
        assert Path("/proc/thread-self/ns/net").readlink() == home
    assert child.poll() is not None
    assert name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
