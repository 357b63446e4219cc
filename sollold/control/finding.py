"""The input and the results of `sollold doctor`."""

from __future__ import annotations

from enum import StrEnum

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.reach_check import Unreached
from sollold.cluster.net.status import ClusterStatus
from sollold.control.events import OfflineNode
from sollold.control.load_crashes import CrashingNode
from sollold.facts import dataclass
from sollold.leader.pinned import LostModel
from sollold.models.model import Model


class Grade(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"
    """Something does not work."""
    NOTICE = "notice"
    """It works, but could be better or safer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``fix``: what to do, or a command; empty if nothing needs to be done.

    Commands within a sentence are in backticks, so that they can be copied by themselves.
    """

    grade: Grade
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon knows about itself and the cluster.

    Attributes:
        trouble: (what, fix) pairs that other modules report: GPUs, Ollama.
        files: the same for models' files and folders; there may be thousands.
        disk_free: free bytes on the cache's disk.
        idle_gpus: names of GPUs that the driver knows and llama.cpp can't use.
        absent_gpus: kinds of GPU that llama.cpp was built for, if it found none.
        setup_failed: why llama.cpp could not be set up; empty if it could, or setup is under way.
        network: this node's view of the cluster's network; ``id_file``: the file with its key.
        now: Unix time.
        open_api: whether other machines may use models without an API key.
        lost: lost models that should stay loaded, with the names of their heads.
        state, unwritable: the state folder, and why it can't be written to; empty if it can.
        unread: why the settings could not be reloaded; empty if they could.
        held: keys of changed settings that need a restart.
        group: bytes that the daemon's control group may use, and those of the machine; zeros: no limit.
        outdated_door: whether the settings call the cluster open although it was given a secret.
        unreached: live nodes that this node can't connect to, or that can't connect to it.
        crashing: nodes on which llama.cpp only crashes.
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
    unreached: tuple[Unreached, ...] = ()
    crashing: tuple[CrashingNode, ...] = ()
