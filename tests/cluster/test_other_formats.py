"""Packets in the format of another release."""

from __future__ import annotations

from random import Random

import pytest

from sollold.cluster.gossip.other_formats import KEPT_SECONDS, OtherFormats
from sollold.cluster.gossip.packet import FORMAT, encode, format_of
from tests.cluster.gossip_core import B, address_of, alive, core, receive

OTHER = encode([FORMAT + 1, "b" * 16, 1, "what nobody knows yet"])


@pytest.mark.parametrize(
    "data", [b"", b"\x94", b"\x94\xc0", b"\xa1a", encode({"format": 3}), Random(1).randbytes(40)]
)
def test_invalid_packets_have_format_zero(data: bytes) -> None:
    assert format_of(data) == 0


def test_addresses_with_another_format_are_reported_for_a_while() -> None:
    seen = OtherFormats()
    seen.note(OTHER, ("10.0.0.2", 11436), 100.0)
    seen.note(encode([FORMAT, "broken"]), ("10.0.0.3", 11436), 100.0)
    seen.note(OTHER, None, 100.0)
    assert seen.heard(100.0 + KEPT_SECONDS - 1) == {"10.0.0.2": FORMAT + 1}
    assert not seen.heard(100.0 + KEPT_SECONDS)


def test_the_number_of_addresses_is_limited() -> None:
    seen = OtherFormats()
    for number in range(1000):
        seen.note(OTHER, (f"10.0.{number // 250}.{number % 250}", 11436), float(number) / 100)
    assert len(seen.heard(10.0)) == 64 and "10.0.3.249" in seen.heard(10.0)


def test_another_format_is_reported_until_the_node_is_understood() -> None:
    """In datagrams and in push-pull exchanges."""
    gossip = core()
    gossip.handle_packet(OTHER, address_of(B), 1.0)
    assert gossip.known.other_formats(2.0) == {address_of(B)[0]: FORMAT + 1}
    gossip.push_pull(core(B).push_pull_open(), address_of(B), 3.0)
    assert not gossip.known.other_formats(4.0)
    gossip = core()
    gossip.push_pull(OTHER, address_of(B), 1.0)
    assert gossip.known.other_formats(2.0) == {address_of(B)[0]: FORMAT + 1}
    receive(gossip, B, alive(B), now=3.0)
    assert not gossip.known.other_formats(4.0)
