"""Messages between a leader or head and the participants of a deployment, sent as peer calls.

A placement takes three steps. The leader sends `Reserve` to every participant in node-id order, all or
nothing. Then it sends `Deploy` to the head, which sends `Commit` to every other participant (each starts its
worker), opens tunnels to them and starts ``llama-server``. From then on the head alone sends `Renew`;
a participant that receives none within the time to live kills the worker and frees the memory.
"""

from __future__ import annotations

from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass
from sollold.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Reserve:
    """Leader → participant: reserve ``bytes`` (device → bytes) for ``deployment``, uncommitted."""

    term: Term
    deployment: str
    head: str
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Reply to `Reserve`. If not ``ok``: ``reason``, and ``available`` (device → bytes available now),
    which is empty if memory is not the reason."""

    ok: bool
    reason: str = ""
    available: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Deploy:
    """Leader → head: carry out ``plan`` with the memory that every participant has reserved.

    ``keep_alive``: seconds of idleness before the head unloads it; negative: never.
    """

    term: Term
    deployment: str
    plan: Plan
    keep_alive: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Head → participant: turn the reservation into a grant; start the worker on these ``devices``.

    ``digest``: digest of the model, under which the worker's tensors are cached on that node.
    """

    deployment: str
    head: str
    devices: tuple[str, ...]
    build: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """Location of a tensor's data: ``size`` bytes from offset ``start`` in the model's file number ``file``.

    ``type`` and ``shape`` (four dimensions) are those of the file's header.
    """

    name: str
    file: int
    start: int
    size: int
    type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FillCache:
    """Head → participant, after its commit: fill the worker's cache with tensors that it will need.

    The data comes from the participant's own copy of the file, else from all ``sources`` (node ids) in
    parallel. The reply comes at once; tensors that are not ready in time come from the head as usual.

    ``digest``: digest of the model.
    """

    deployment: str
    head: str
    digest: str
    tensors: tuple[WantedTensor, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """Head → participant: the deployment is alive. The reply is ``Done(ok=False)`` if it is unknown there.

    ``loaded``: every tensor has arrived, so what the worker wrote to its cache is complete.
    """

    deployment: str
    head: str
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Leader or head → participant: stop the worker and free the memory. Idempotent."""

    term: Term
    deployment: str
    head: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Participant → head: the deployment's worker has died. Saves the head the wait for a renewal.

    ``crashed``: it ended by a fault of its own; nobody killed it.
    """

    deployment: str
    reason: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Leader → head: unload a deployment. Refused while requests are in it, unless ``force``.

    ``when_idle``: admit no new requests and unload once the running ones finish; the reply comes at once.
    """

    term: Term
    deployment: str
    force: bool = False
    reason: str = ""
    when_idle: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Leader → future head: download the files of the model with this digest from a node that has them.

    Repeated while a request waits for the model, else the download is cancelled. ``stop``: cancel at
    once, keeping the data received so far.
    """

    term: Term
    model: str
    digest: str
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """Progress of `Fetch`: ``done``, or ``failed`` with the reason, or ``completed`` of ``total`` bytes."""

    done: bool = False
    failed: str = ""
    completed: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """Generic reply: whether the command was carried out, and if not, why.

    ``work``: in replies to `Renew`, the worker's counter `sollold.engines.llamacpp.process.Process.work`;
    0 without a worker, None if unknown.
    """

    ok: bool
    reason: str = ""
    work: int | None = None


GRANT_SECONDS = 15.0
"""Time to live of a committed grant after its head's last message, in seconds."""
