"""Orders on who may join and with which secret, sent by peer calls, and the initial secret."""

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
    """Admit the waiting machine with this id. The reply says whether it is waiting."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class DoorOrder:
    """Admit any machine that asks within these seconds."""

    seconds: Annotated[float, Meta(ge=0, le=86400)]


class Step(StrEnum):
    """A step of changing the secret: what a node must do with the new one."""

    INSTALL = "install"
    """Accept it in addition to the one in use."""
    USE = "use"
    """Use it, and still accept the former one."""
    REMOVE = "remove"
    """Accept no other."""


@dataclass(frozen=True, slots=True)
class SecretOrder:
    """Request of the peer method ``secret``, by the leader only: one step of changing the secret.

    Attributes:
        founder: founder of the cluster, so that nodes of other clusters refuse.
        members: machines that are then members; ``evicted``: those whose keys are refused.
    """

    step: Step
    founder: NodeId
    generation: Generation
    secret: Secret
    members: Members = ()
    evicted: Members = ()


@dataclass(frozen=True, slots=True)
class SecretAnswer:
    """Result of a step.

    Attributes:
        refusal: why it was refused; empty if it was not. ``again``: a retry may succeed soon.
        generation: the newest generation here; ``members``: the known members.
    """

    refusal: Annotated[str, Meta(max_length=1000)]
    generation: Generation
    members: Members = ()
    again: bool = False


def door_seconds(door: str) -> float:
    """Return for how many seconds a new cluster admits anyone, by the setting ``cluster.door``.

    ``open`` counts as 0: it means a cluster without a secret, and has no effect once there is one.
    """
    return 0.0 if door.strip() in ("closed", "open") else parse_seconds(door)


def secret_of(settings: ClusterSettings, state: Path, node: str) -> tuple[Tokens, Keyring | None]:
    """Return the cluster's secret: the token of the settings, without a keyring, or the one in ``state``.

    A keyring that closed an open cluster overrides the setting that once opened it.

    Blocks on disk I/O.

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
            # It may have closed this cluster: its damage must not admit anyone.
            log.error(
                "%s. This machine may have been in a cluster with a secret, so not everyone can join it: to "
                "allow that, delete that file and restart",
                error,
            )
            kept = replace(Keyring.found(node), closed=True, secured=True)
            file.write(kept)
        if kept is None or not kept.secured:
            return Tokens.read("open", settings.old_tokens), Keyring.for_open()
        # The well-known secret is not accepted again, even if the change that closed it is unfinished.
        kept = replace(kept, old=())
        return kept.tokens, kept
    ring = file.load(node)
    return ring.tokens, ring


def opened(settings: ClusterSettings) -> bool:
    """Whether the settings allow anyone to join."""
    token = settings.token.strip()
    return token == "open" or (not token and settings.door.strip() == "open")
