"""Orders about who may join and with which secret, carried by peer calls, and the setting."""

from __future__ import annotations

import logging
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from sollold.cluster.admission.keyring import (
    DamagedKeyring,
    Generation,
    Keyring,
    KeyringFile,
    Members,
    NodeId,
    Secret,
)
from sollold.cluster.net.identity import Tokens
from sollold.facts import dataclass
from sollold.settings.schema import ClusterSettings
from sollold.units import parse_seconds

log = logging.getLogger("sollold.cluster")


@dataclass(frozen=True, slots=True)
class AdmitOrder:
    """Let in the machine with this id, which waits. Answered with whether it does."""

    node: str


@dataclass(frozen=True, slots=True)
class DoorOrder:
    """Let in whoever asks within so many seconds."""

    seconds: Annotated[float, Meta(ge=0, le=86400)]


class Step(StrEnum):
    """A step of changing the secret: what a node is to do with the new one."""

    INSTALL = "install"
    """Accept it beside the one in use."""
    USE = "use"
    """Use it, and accept the former one still."""
    REMOVE = "remove"
    """Accept no other any more."""


@dataclass(frozen=True, slots=True)
class SecretOrder:
    """Peer method ``secret``, of the leader alone: one step of changing the secret.

    Attributes:
        founder: of the cluster, so that no other cluster's nodes obey.
        members: the machines that belong to it then; ``evicted``: those whose keys are refused.
    """

    step: Step
    founder: NodeId
    generation: Generation
    secret: Secret
    members: Members = ()
    evicted: Members = ()


@dataclass(frozen=True, slots=True)
class SecretAnswer:
    """What became of a step.

    Attributes:
        refusal: why it was not taken; empty when it was. ``again``: it may be soon.
        generation: the newest here; ``members``: that it knows.
    """

    refusal: str
    generation: Generation
    members: Members = ()
    again: bool = False


def door_seconds(door: str) -> float:
    """Seconds after its founding for which a cluster admits anyone, by the setting ``cluster.door``.

    ``open`` is none: it means a cluster without a door, and nothing any more once that has a secret.
    """
    return 0.0 if door.strip() in ("closed", "open") else parse_seconds(door)


def secret_of(settings: ClusterSettings, state: Path, node: str) -> tuple[Tokens, Keyring | None]:
    """The cluster's secret: the token of the settings, without a keyring, else the keyring in ``state``.

    A keyring that closed an open cluster counts more than the setting that once opened it.

    Blocks for the disk.

    Raises:
        BadToken: a token is not 64 hex digits.
        OSError: the keyring can't be read or written.
    """
    token, file = settings.token.strip(), KeyringFile(state)
    if token not in ("", "open"):
        return Tokens.read(token, settings.old_tokens), None
    if opened(settings):
        try:
            kept = file.read()
        except DamagedKeyring as error:
            # It may have been what closed this cluster: nobody comes in by its damage.
            log.error(
                "%s. This machine may have been in a cluster with a secret, so it is not open to anyone: if "
                "it is to be, delete that file and restart",
                error,
            )
            kept = replace(Keyring.found(node), closed=True, secured=True)
            file.write(kept)
        if kept is None or not kept.secured:
            return Tokens.read("open", settings.old_tokens), Keyring.for_open()
        # Not even for the rest of the change that closed it does the well-known secret count again.
        kept = replace(kept, old=())
        return kept.tokens, kept
    ring = file.load(node)
    return ring.tokens, ring


def opened(settings: ClusterSettings) -> bool:
    """Whether the settings say that anyone may join."""
    token = settings.token.strip()
    return token == "open" or (not token and settings.door.strip() == "open")
