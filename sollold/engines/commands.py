"""What a leader or a head may ask of a node, and what it answers. Carried by peer calls.

A placement goes in three steps. The leader sends `Reserve` to every participant in node-id order, all or
nothing. Then it sends `Deploy` to the head, which sends `Commit` to every other participant (each starts its
worker), opens tunnels to them and starts ``llama-server``. From then on the head alone sends `Renew`;
a participant that hears none for the time to live kills the worker and frees the bytes.
"""

from __future__ import annotations

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass
from sollold.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Reserve:
    """Leader → participant. Set aside ``bytes`` (device → bytes) for ``deployment``, uncommitted."""

    term: Term
    deployment: str
    head: str
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Its answer. ``ok`` False: ``reason`` says why, ``available`` is device → bytes there now."""

    ok: bool
    reason: str = ""
    available: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Deploy:
    """Leader → head: carry out ``plan`` under what every participant has reserved.

    ``keep_alive``: seconds of idleness before the head unloads it; negative: never.
    """

    term: Term
    deployment: str
    plan: Plan
    keep_alive: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Head → participant: the reservation becomes a grant; start the worker over these ``devices``.

    ``digest``: of the model, whose tensors the worker may find kept here, and keeps.
    """

    deployment: str
    head: str
    devices: tuple[str, ...]
    build: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """Where the bytes of a tensor lie: ``size`` of them from ``start`` of the model's file number ``file``.

    ``type`` and ``shape`` (four dimensions) as its header says.
    """

    name: str
    file: int
    start: int
    size: int
    type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FillCache:
    """Head → participant, after its commit: get ready for the worker what it will be asked for by its hash.

    From a copy of the file on the participant's own disk, else from all of ``sources`` (node ids) at a time.
    Answered at once; what is not there when llama-server asks for it comes from the head as ever.

    ``digest``: of the model.
    """

    deployment: str
    head: str
    digest: str
    tensors: tuple[WantedTensor, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """Head → participant: the deployment still lives. Answered with ``Done(ok=False)`` if it is unknown.

    ``loaded``: every tensor has arrived, so what the worker wrote to its cache is whole.
    """

    deployment: str
    head: str
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Leader or head → participant: end the worker, free the bytes. Idempotent."""

    term: Term
    deployment: str
    head: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Participant → head: the worker of the deployment is dead. Saves the head the wait for its next renewal.

    ``crashed``: by a fault of its own; nobody killed it.
    """

    deployment: str
    reason: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Leader → head: end a deployment. Refused while requests are in it, unless ``force``.

    ``when_idle``: let no new requests in, and end it when those in it are done; answered at once.
    """

    term: Term
    deployment: str
    force: bool = False
    reason: str = ""
    when_idle: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Leader → head-to-be: get the file of the model with this content from a node that has it.

    Sent again and again while somebody waits for it; without that the fetch is given up. ``stop``: give it up
    at once; what has come is kept.
    """

    term: Term
    model: str
    digest: str
    stop: bool = False


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

    ``work``: to a renewal, what the worker has done so far (`sollold.engines.llamacpp.process.Process.work`),
    0 where there is none; None when that is not known.
    """

    ok: bool
    reason: str = ""
    work: int | None = None


GRANT_SECONDS = 15.0
"""How long a committed grant lives after its head's last word."""
