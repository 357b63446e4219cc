"""What `sollold doctor` goes by, and what it finds."""

from __future__ import annotations

from enum import StrEnum

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.status import ClusterStatus
from sollold.control.events import OfflineNode
from sollold.facts import dataclass
from sollold.leader.pinned import LostModel
from sollold.models.model import Model


class Grade(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"
    """Something does not work."""
    NOTICE = "notice"
    """It works, and could be better or safer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. ``fix``: what to do, or a command; empty where nothing needs to be done.

    Commands among other words stand in backticks, so that they alone can be copied.
    """

    grade: Grade
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon knows of itself.

    Attributes:
        trouble: (what, fix) that rooms report of themselves: GPUs, Ollama.
        files: the same of models' files and folders; there may be thousands.
        disk_free: bytes free where the cache is.
        idle_gpus: names of GPUs that the driver knows and llama.cpp can't use.
        absent_gpus: kinds of GPU that llama.cpp was built for, where it found none.
        setup_failed: why llama.cpp could not be set up; empty when it could or is being.
        network: this node's part in the cluster; ``id_file``: where its key is kept.
        now: Unix time.
        open_api: other machines may ask models without an API key.
        lost: models that were to stay loaded and are not, with the names of their heads.
        state, unwritable: the folder of the state, and why nothing can be written there; empty when it can.
        unread: why the settings could not be read again; empty when they could.
        held: keys of settings that were changed and need a restart.
        group: bytes that a control group lets the daemon have, and those of the machine; zeros: no limit.
        outdated_door: the settings say that the cluster is open, though it was given a secret.
    """

    me: Record
    live: tuple[Record, ...]
    models: tuple[Model, ...]
    trouble: tuple[tuple[str, str], ...]
    setup_failed: str
    disk_free: int
    cache: str
    idle_gpus: tuple[str, ...] = ()
    network: ClusterStatus | None = None
    id_file: str = ""
    offline: tuple[OfflineNode, ...] = ()
    now: float = 0.0
    open_api: bool = False
    outdated_door: bool = False
    absent_gpus: tuple[str, ...] = ()
    state: str = ""
    unwritable: str = ""
    lost: tuple[LostModel, ...] = ()
    unread: str = ""
    held: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    group: tuple[int, int] = (0, 0)
