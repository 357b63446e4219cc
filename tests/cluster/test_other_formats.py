"""Packets of another release, whose format this one does not read."""

from __future__ import annotations

from random import Random

import pytest

from sollold.cluster.gossip.other_formats import KEPT_SECONDS, OtherFormats
from sollold.cluster.gossip.packet import FORMAT, encode, format_of
from tests.cluster.gossip_core import B, alive, at, core, says

OTHER = encode([FORMAT + 1, "b" * 16, 1, "what nobody knows yet"])


@pytest.mark.parametrize(
    "data", [b"", b"\x94", b"\x94\xc0", b"\xa1a", encode({"format": 3}), Random(1).randbytes(40)]
)
def test_what_is_no_packet_has_no_format(data: bytes) -> None:
    assert format_of(data) == 0


def test_who_speaks_another_format_is_told_by_its_address_for_a_while() -> None:
    seen = OtherFormats()
    seen.note(OTHER, ("10.0.0.2", 11436), 100.0)
    seen.note(encode([FORMAT, "broken"]), ("10.0.0.3", 11436), 100.0)
    seen.note(OTHER, None, 100.0)
    assert seen.heard(100.0 + KEPT_SECONDS - 1) == {"10.0.0.2": FORMAT + 1}
    assert not seen.heard(100.0 + KEPT_SECONDS)


def test_many_addresses_are_not_all_kept() -> None:
    seen = OtherFormats()
    for number in range(1000):
        seen.note(OTHER, (f"10.0.{number // 250}.{number % 250}", 11436), float(number) / 100)
    assert len(seen.heard(10.0)) == 64 and "10.0.3.249" in seen.heard(10.0)


def test_a_node_hears_who_it_does_not_understand_until_it_does() -> None:
    """In a datagram and in an exchange."""
    gossip = core()
    gossip.handle_packet(OTHER, at(B), 1.0)
    assert gossip.other_formats(2.0) == {at(B)[0]: FORMAT + 1}
    gossip.push_pull(core(B).push_pull_open(), at(B), 3.0)
    assert not gossip.other_formats(4.0)
    gossip = core()
    gossip.push_pull(OTHER, at(B), 1.0)
    assert gossip.other_formats(2.0) == {at(B)[0]: FORMAT + 1}
    says(gossip, B, alive(B), now=3.0)
    assert not gossip.other_formats(4.0)
