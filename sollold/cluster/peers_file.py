"""Peers remembered on disk: where nodes were when they were last alive."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sollold.cluster.actions import Address
from sollold.cluster.state_file import read_bounded, write_whole

log = logging.getLogger("sollold.cluster")

_MOST = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """A node and its addresses, the best first."""

    node: str
    addresses: tuple[Address, ...]


class PeersFile:
    """The file ``peers.json`` in the state folder. Its methods block for the disk."""

    def __init__(self, state: Path) -> None:
        self._path = state / "peers.json"

    def read(self) -> tuple[Peer, ...]:
        """Who is remembered; nobody when the file is not there or spoilt."""
        try:
            return msgspec.json.decode(read_bounded(self._path), type=tuple[Peer, ...])[:_MOST]
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the remembered peers in %s can't be read: %s", self._path, error)
            return ()

    def write(self, peers: tuple[Peer, ...]) -> None:
        """Remember ``peers``.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.format(msgspec.json.encode(peers[:_MOST]), indent=1))


def merged(live: tuple[Peer, ...], before: tuple[Peer, ...]) -> tuple[Peer, ...]:
    """The live ones first, then those remembered from before, as many as fit.

    One whose address another node has now is not remembered: its machine was set up anew, or it moved.
    """
    known = {peer.node for peer in live}
    taken = {address for peer in live for address in peer.addresses[:1]}
    rest = (one for one in before if one.node not in known and taken.isdisjoint(one.addresses[:1]))
    return (*live, *rest)[:_MOST]
