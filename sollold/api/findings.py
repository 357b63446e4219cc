"""What is wrong, why it matters, and the one command that mends it. Pure: facts in, findings out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sollold.cluster.node import ClusterStatus
from sollold.cluster.record import Record, State
from sollold.machine.device import Kind
from sollold.machine.plain import PlainState
from sollold.models.model import Model
from sollold.units import bytes_text

LOW_DISK = 5 * 1024**3
_SEED = 'name one other node in sollold.toml: [cluster] seeds = ["HOST:11436"]'


class Grade(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"
    """Something does not work."""
    NOTICE = "notice"
    """It works, and could be better or safer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. ``mend``: what to type, or to do; empty where nothing needs to be done."""

    grade: Grade
    what: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon knows of itself.

    Attributes:
        trouble: (what, mend) that rooms report of themselves: GPUs, Ollama, model stores.
        disk_free: bytes free where the cache is.
        idle_gpus: names of GPUs that the driver knows and llama.cpp can't use.
        setup_failed: why llama.cpp could not be set up; empty when it could or is being.
        network: this node's part in the cluster; ``id_file``: where its id is kept.
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


def examine(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    found = [
        *_llama(facts),
        *_builds(facts.live),
        *_failed(facts.live),
        *(Finding(Grade.PROBLEM, what, mend) for what, mend in facts.trouble),
        *_network(facts),
        *_models(facts.models),
        *_memory(facts.me),
        *_gpus(facts),
        *_plain(facts.me),
        *_disk(facts),
        *_company(facts),
    ]
    return sorted(found, key=lambda finding: finding.grade is Grade.NOTICE)


def _llama(facts: Facts) -> list[Finding]:
    if facts.me.build:
        return []
    if facts.setup_failed:
        what = f"no llama.cpp: {facts.setup_failed}; this node can run no model by itself"
        by_hand = f"sollold setup --set node.cache_dir={facts.cache}"
        mend = f"{by_hand}   (as the daemon's user; or install the package sollold-llama.cpp)"
        return [Finding(Grade.PROBLEM, what, mend)]
    return [Finding(Grade.NOTICE, f"llama.cpp is being set up: {facts.me.setup or 'just begun'}")]


def _builds(live: Sequence[Record]) -> list[Finding]:
    builds: dict[str, list[str]] = {}
    for record in live:
        if record.build:
            builds.setdefault(record.build, []).append(record.name)
    if len(builds) < 2:
        return []
    words = "; ".join(f"{build} on {', '.join(names)}" for build, names in sorted(builds.items()))
    what = f"the nodes run different builds of llama.cpp, which can't share a model: {words}"
    return [Finding(Grade.PROBLEM, what, "upgrade sollold on all nodes to the same version")]


def _failed(live: Sequence[Record]) -> list[Finding]:
    return [
        Finding(Grade.PROBLEM, f"{endpoint.model} on {record.name} failed: {endpoint.reason}")
        for record in live
        for endpoint in record.endpoints
        if endpoint.state is State.FAILED
    ]


def _network(facts: Facts) -> list[Finding]:
    status = facts.network
    if status is None:
        return []
    found = []
    mdns = status.discovery
    if mdns is not None and not mdns.working:
        what = f"multicast DNS does not work: {mdns.reason}; nodes are found by seeds and memory alone"
        found.append(Finding(Grade.PROBLEM, what, _SEED))
    if status.cloned:
        what = (
            "since this daemon started another machine was heard that uses the same node id: one's state "
            "folder is a copy of the other's, so they can't find each other"
        )
        file = shlex.quote(facts.id_file)
        mend = f"on one of the two: sudo rm {file}, then on both: sudo systemctl restart sollold"
        found.append(Finding(Grade.PROBLEM, what, mend))
    if mdns is not None and mdns.foreign:
        several = mdns.foreign > 1
        what = (
            f"{mdns.foreign} node{'s' if several else ''} of another cluster on this network: "
            f"{'their' if several else 'its'} cluster.token is not the one of this node"
        )
        mend = "if they belong together, give all the same one (see sollold token), then restart them"
        found.append(Finding(Grade.NOTICE, what, mend))
    if status.unheard:
        what = (
            f"{', '.join(status.unheard)}: alive on this network, but never announced here by multicast "
            "DNS. It is switched off there, or a switch, a firewall or the Wi-Fi filters it; then new "
            "nodes do not find each other by themselves"
        )
        found.append(Finding(Grade.NOTICE, what, _SEED))
    return found


def _models(models: Sequence[Model]) -> list[Finding]:
    return [
        Finding(Grade.PROBLEM, f"{model.name} ({model.source}) can't be used: {model.unusable}")
        for model in models
        if model.unusable
    ]


def _gpus(facts: Facts) -> list[Finding]:
    if not facts.me.build or not facts.idle_gpus:
        return []
    names = ", ".join(facts.idle_gpus)
    what = f"llama.cpp {facts.me.build} here can't use {names}: models run on the processor"
    mend = "install the GPU's toolkit (for NVIDIA: nvcc), then: sudo systemctl restart sollold"
    return [Finding(Grade.NOTICE, what, mend)]


def _memory(me: Record) -> list[Finding]:
    own = [device for device in me.devices if device.kind is not Kind.PLAIN]
    if own and not any(device.limit > 64 * 1024**2 for device in own):
        what = "no device of this machine may hold more than 64 MiB"
        return [Finding(Grade.PROBLEM, what, "raise node.memory_limit, or lower node.reserve")]
    return []


def _plain(me: Record) -> list[Finding]:
    """Workers that others started: those that can't be used, and the price of those that can."""
    found = []
    used = []
    for worker in me.plain:
        if worker.state in (PlainState.USABLE, PlainState.TAKEN):
            used.append(worker.address)
        elif worker.state is not PlainState.CHECKING:
            what = f"the worker {worker.address} of rpc_backends is not used: {worker.reason}"
            grade = Grade.PROBLEM if worker.state is PlainState.DEAD else Grade.NOTICE
            mend = "start it, or take it out of [llama] rpc_backends" if grade is Grade.PROBLEM else ""
            found.append(Finding(grade, what, mend))
    if used:
        what = (
            f"plain workers are used ({', '.join(used)}): layers and prompts go to them unencrypted, and "
            "whoever can reach them can change what is computed"
        )
        found.append(Finding(Grade.NOTICE, what, "run sollold on those machines instead"))
    return found


def _disk(facts: Facts) -> list[Finding]:
    if facts.disk_free >= LOW_DISK:
        return []
    what = (
        f"only {bytes_text(facts.disk_free)} free at {facts.cache}: loads are slow without room for tensors"
    )
    return [Finding(Grade.NOTICE, what, f"free some room, or delete {facts.cache}/tensors")]


def _company(facts: Facts) -> list[Finding]:
    found = []
    if len(facts.live) == 1:
        what = (
            "this node sees no other; on the others, is sollold running, is the token the same, "
            "and does the firewall let 11436/tcp, 11436/udp and 5353/udp through?"
        )
        found.append(Finding(Grade.NOTICE, what, f"to find one without mDNS, {_SEED}"))
    if facts.me.open:
        what = "an open cluster: whoever is on this LAN can join it and use its memory"
        found.append(Finding(Grade.NOTICE, what, "sollold token"))
    return found
