"""What a leader or a head may ask of a node, and what it answers. Carried by peer calls.

A placement goes in three steps. The leader sends `Reserve` to every owner in node-id order, all or
nothing. Then it sends `Deploy` to the head, which sends `Commit` to every other owner (each starts its
worker), opens tunnels to them and starts ``llama-server``. From then on the head alone sends `Renew`;
an owner that hears none for the time to live kills the worker and frees the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sollold.cluster.term import Term
from sollold.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Reserve:
    """Leader → owner. Set aside ``bytes`` (device → bytes) for ``deployment``, uncommitted."""

    term: Term
    deployment: str
    head: str
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Owner's answer. ``ok`` False: ``reason`` says why, ``available`` is device → bytes there now."""

    ok: bool
    reason: str = ""
    available: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Deploy:
    """Leader → head: carry out ``plan`` under what every owner has reserved.

    ``keep_alive``: seconds of idleness before the head unloads it; negative: never.
    """

    term: Term
    deployment: str
    plan: Plan
    keep_alive: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Head → owner: the reservation becomes a grant; start the worker over these ``devices``.

    ``digest``: of the model, whose tensors the worker may find kept here, and keeps.
    """

    deployment: str
    head: str
    devices: tuple[str, ...]
    build: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Renew:
    """Head → owner: the deployment still lives. Answered with ``Done(ok=False)`` if it is unknown.

    ``loaded``: every tensor has arrived, so what the worker wrote to its cache is whole.
    """

    deployment: str
    head: str
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Leader or head → owner: end the worker, free the bytes. Idempotent."""

    term: Term
    deployment: str
    head: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Owner → head: the worker of the deployment is dead. Saves the head the wait for its next renewal.

    ``crashed``: by a fault of its own; nobody killed it.
    """

    deployment: str
    reason: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Leader → head: end a deployment. Refused while requests are in it, unless ``force``."""

    term: Term
    deployment: str
    force: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Leader → head-to-be: get the file of the model with this content from a node that has it.

    Sent again and again while somebody waits for it; without that the fetch is given up.
    """

    term: Term
    model: str
    digest: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """``done``: the file is there. ``failed``: why it will not be. Else bytes of ``total`` that have come."""

    done: bool = False
    failed: str = ""
    completed: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """A plain answer: whether it was done, and why not.

    ``work``: to a renewal, what the worker has done so far (`sollold.agent.process.Process.work`), 0 where
    there is none; None when that is not known.
    """

    ok: bool
    reason: str = ""
    work: int | None = None
