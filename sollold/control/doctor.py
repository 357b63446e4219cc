"""What `sollold doctor` finds: what is wrong, why it matters and how to fix it. Pure."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from sollold.cluster.gossip.record import Record, State
from sollold.cluster.net.status import ClusterStatus
from sollold.control.events import OfflineNode
from sollold.engines.llamacpp.exit_reason import KILLED, OUT_OF_MEMORY
from sollold.facts import dataclass
from sollold.leader.pinned import LostModel
from sollold.machine.device import Kind
from sollold.machine.external_worker import ExternalState
from sollold.models.model import Model
from sollold.units import bytes_text, seconds_text

LOW_DISK = 5 * 1024**3
_MOST_MODELS = 20
"""Models that are named which can't be used: a folder may hold thousands of other files."""
_PROCESSOR = "models run on the processor"
_GPU_ACCESS = (
    "if there is one, see that its driver is loaded, and that the daemon's user may open its files in /dev; "
    "a container has to be given it: `--device nvidia.com/gpu=all` for NVIDIA, else `--device /dev/dri` with "
    "`--group-add` and the number of the group that owns /dev/dri/renderD128, and /dev/kfd for ROCm"
)
_MORE_ROOM = (
    "see which other program takes memory there, and leave it more (node.reserve in sollold.toml), or ask "
    "for less context"
)
_SEED = 'name one other node in sollold.toml: `[cluster] seeds = ["HOST:11436"]`'


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
        trouble: (what, fix) that rooms report of themselves: GPUs, Ollama, model stores.
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


def examine(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    found = [
        *_state(facts),
        *_settings(facts),
        *_llama(facts),
        *_builds(facts.live),
        *_names(facts.live),
        *_failed(facts.live),
        *_lost(facts.lost),
        *_offline(facts.offline),
        *(Finding(Grade.PROBLEM, what, fix) for what, fix in facts.trouble),
        *_network(facts),
        *_models(facts.models),
        *_memory(facts.me),
        *_gpus(facts),
        *_plain(facts.me),
        *_disk(facts),
        *_company(facts),
    ]
    return sorted(found, key=lambda finding: finding.grade is Grade.NOTICE)


def _state(facts: Facts) -> list[Finding]:
    if not facts.unwritable:
        return []
    what = (
        f"nothing can be written to {facts.state}: {facts.unwritable}. This node can take no part in models "
        "that are loaded, and keys and members that change are not kept"
    )
    return [Finding(Grade.PROBLEM, what, "free some space on that disk, or make it writable for the daemon")]


def _settings(facts: Facts) -> list[Finding]:
    found = []
    if facts.unread:
        what = f"the settings could not be read again, and nothing would start with them: {facts.unread}"
        found.append(Finding(Grade.PROBLEM, what, "mend that, then: `sudo systemctl reload sollold`"))
    if facts.held:
        what = f"these settings were changed and need a restart: {', '.join(facts.held)}"
        found.append(Finding(Grade.NOTICE, what, "sudo systemctl restart sollold"))
    return found


def _llama(facts: Facts) -> list[Finding]:
    if facts.me.build:
        return []
    if facts.setup_failed:
        what = f"no llama.cpp: {facts.setup_failed}; this node can't run models itself"
        by_hand = f"sollold setup --set node.cache_dir={shlex.quote(str(facts.cache))}"
        fix = f"`{by_hand}` (as the daemon's user; or install the package sollold-llama.cpp)"
        return [Finding(Grade.PROBLEM, what, fix)]
    return [Finding(Grade.NOTICE, f"llama.cpp is being set up: {facts.me.setup or 'starting'}")]


def _builds(live: Sequence[Record]) -> list[Finding]:
    builds: dict[str, list[str]] = {}
    for record in live:
        if record.build:
            builds.setdefault(record.build, []).append(record.name)
    if len(builds) < 2:
        return []
    words = "; ".join(f"{build} on {', '.join(names)}" for build, names in sorted(builds.items()))
    what = f"the nodes run different builds of llama.cpp, which can't share a model: {words}"
    if len({record.release for record in live if record.build}) > 1:
        return [Finding(Grade.PROBLEM, what, "upgrade sollold on all nodes to the same version")]
    fix = (
        "have all use the same: one that is not sollold's own is named by llama.server in the settings, or a "
        "llama-server in the PATH was found first (`sollold setup` there shows which)"
    )
    return [Finding(Grade.PROBLEM, what, fix)]


def _names(live: Sequence[Record]) -> list[Finding]:
    """Images of machines are often copied with their host name."""
    where: dict[str, list[str]] = {}
    for record in live:
        where.setdefault(record.name.lower(), []).append(record.addresses[0] if record.addresses else "?")
    return [
        Finding(
            Grade.NOTICE,
            f"{len(hosts)} nodes are called {name} ({', '.join(sorted(hosts))}): messages and commands that "
            "name one can't tell them apart",
            "give each machine its own host name (`sudo hostnamectl hostname NAME`) or set node.name in its "
            "sollold.toml, then `sudo systemctl restart sollold` there",
        )
        for name, hosts in sorted(where.items())
        if len(hosts) > 1
    ]


def _failed(live: Sequence[Record]) -> list[Finding]:
    """Each failure once, and whether the model answers again meanwhile."""
    ready = {
        endpoint.model: record.name
        for record in live
        for endpoint in record.endpoints
        if endpoint.state is State.READY and endpoint.loaded
    }
    times = Counter(
        (endpoint.model, record.name, endpoint.reason.rstrip("."))
        for record in live
        for endpoint in record.endpoints
        if endpoint.state is State.FAILED
    )
    found = []
    for (model, node, reason), count in times.items():
        what = f"{model} on {node} failed{f' {count} times' if count > 1 else ''}: {reason}"
        if model in ready:
            found.append(Finding(Grade.NOTICE, f"{what}. It runs again, on {ready[model]}"))
        else:
            logs = f"`sollold logs {shlex.quote(model)}` shows the engine's last words"
            fix = f"{_MORE_ROOM}; {logs}" if OUT_OF_MEMORY in reason or KILLED in reason else logs
            found.append(Finding(Grade.PROBLEM, what, fix))
    return found


def _lost(lost: Sequence[LostModel]) -> list[Finding]:
    found = []
    for one in lost:
        what = (
            f"{one.model} was to stay loaded (keep_alive -1) and has been gone from {one.head} for "
            f"{seconds_text(one.seconds)}; it is loaded again as soon as it can be"
        )
        if one.reason:
            what += f". At the last try: {one.reason}"
        fix = f"`sollold plan {shlex.quote(one.model)}` shows where it would go, or what is missing"
        found.append(Finding(Grade.PROBLEM, what, fix))
    return found


def _offline(offline: Sequence[OfflineNode]) -> list[Finding]:
    found = []
    for one in offline:
        name = one.record.name
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.since))
        if one.stopped:
            what, grade = f"{name} was stopped and has been offline since {since}", Grade.NOTICE
        else:
            what, grade = f"{name} has been offline since {since}: it does not answer", Grade.PROBLEM
        if one.held:
            models = ", ".join(sorted({held.model for held in one.held}))
            what += f"; it held {bytes_text(sum(held.bytes for held in one.held))} of {models}"
        what += ". Start it again, or remove it from the list:"
        found.append(Finding(grade, what, f"sollold forget {shlex.quote(name)}"))
    return found


def _network(facts: Facts) -> list[Finding]:
    status = facts.network
    if status is None:
        return []
    found = []
    mdns = status.discovery
    if mdns is not None and not mdns.working:
        what = f"multicast DNS does not work ({mdns.reason}): only seeds and remembered addresses are tried"
        found.append(Finding(Grade.PROBLEM, what, _SEED))
    names = {record.node: record.name for record in facts.live}
    for double in status.doubles:
        if double.node != facts.me.node:
            name = names.get(double.node, double.node)
            what = (
                f"two machines use the node id of {name}: {double.kept}, which takes part in the cluster, "
                f"and {double.other}, which does not. The state folder of one is a copy of the other's"
            )
            fix = (
                "on one of the two: delete the file node-key in its state folder, then "
                "`sudo systemctl restart sollold`"
            )
            found.append(Finding(Grade.PROBLEM, what, fix))
    if status.cloned:
        what = (
            "another machine uses the same node id: one's state "
            "folder is a copy of the other's, so they can't find each other"
        )
        for double in status.doubles:
            if double.node == facts.me.node and double.kept and double.other:
                what += f". {double.kept} takes part in the cluster, {double.other} does not"
        file = shlex.quote(facts.id_file)
        fix = f"on one of the two: `sudo rm {file}`, then on both: `sudo systemctl restart sollold`"
        found.append(Finding(Grade.PROBLEM, what, fix))
    # Who waits at another cluster is told how it gets in, not how to have none of its own.
    if mdns is not None and mdns.foreign and not facts.me.seeking:
        several = mdns.foreign > 1
        what = (
            f"{mdns.foreign} node{'s' if several else ''} of another cluster on this network: "
            f"{'their' if several else 'its'} cluster.token is not the one of this node"
        )
        fix = (
            "if they belong together, give all the same one (see `sollold token`), then restart them; "
            "without tokens delete the file keyring in the state folder of those that are to join, and "
            "restart those"
        )
        found.append(Finding(Grade.NOTICE, what, fix))
    if refused := sum(status.disbelieved.values()):
        what = (
            f"{refused} statement{'s' if refused > 1 else ''} from members of the cluster refused since the "
            "start: not signed by the node they are about, or with values that no node has"
        )
        fix = "upgrade sollold on all nodes to the same version; if it goes on, change the cluster.token"
        found.append(Finding(Grade.NOTICE, what, fix))
    if status.unheard:
        what = (
            f"{', '.join(status.unheard)}: alive on this network, but never announced here by multicast "
            "DNS. It is switched off there, or a switch, a firewall or the Wi-Fi filters it; then new "
            "nodes do not find each other by themselves"
        )
        found.append(Finding(Grade.NOTICE, what, _SEED))
    return found


def _models(models: Sequence[Model]) -> list[Finding]:
    found = []
    unusable = [model for model in models if model.unusable]
    for model in unusable[:_MOST_MODELS]:
        where = f"{model.source}, {model.files[0]}" if model.files else model.source
        what = f"{model.name} ({where}) can't be used: {model.unusable}"
        fix = "pull or copy it again, or remove the file" if "truncated" in model.unusable else ""
        found.append(Finding(Grade.PROBLEM, what, fix))
    if more := unusable[_MOST_MODELS:]:
        what = f"{len(more)} more model{'s' if len(more) > 1 else ''} can't be used"
        found.append(Finding(Grade.PROBLEM, what, "sollold models --all"))
    return found


def _gpus(facts: Facts) -> list[Finding]:
    if not facts.me.build or not (facts.idle_gpus or facts.absent_gpus):
        return []
    if not facts.idle_gpus:
        kinds = " and ".join(facts.absent_gpus)
        what = f"llama.cpp {facts.me.build} here is built for {kinds}, but no GPU was found: {_PROCESSOR}"
        return [Finding(Grade.NOTICE, what, _GPU_ACCESS)]
    names = ", ".join(facts.idle_gpus)
    what = f"llama.cpp {facts.me.build} here can't use {names}: {_PROCESSOR}"
    fix = "install the GPU's toolkit (for NVIDIA: nvcc), then: `sudo systemctl restart sollold`"
    return [Finding(Grade.NOTICE, what, fix)]


def _memory(me: Record) -> list[Finding]:
    own = [device for device in me.devices if device.kind is not Kind.EXTERNAL]
    if own and not any(device.limit > 64 * 1024**2 for device in own):
        what = "no device of this machine may use more than 64 MiB"
        return [Finding(Grade.PROBLEM, what, "raise node.memory_limit, or lower node.reserve")]
    return []


def _plain(me: Record) -> list[Finding]:
    """Workers that others started: those that can't be used, and the price of those that can."""
    found = []
    used = []
    for worker in me.plain:
        if worker.state in (ExternalState.USABLE, ExternalState.TAKEN):
            used.append(worker.address)
        elif worker.state is not ExternalState.CHECKING:
            what = f"the worker {worker.address} of rpc_backends is not used: {worker.reason}"
            grade = Grade.PROBLEM if worker.state is ExternalState.DEAD else Grade.NOTICE
            fix = "start it, or remove it from [llama] rpc_backends" if grade is Grade.PROBLEM else ""
            found.append(Finding(grade, what, fix))
    if used:
        what = (
            f"external workers are used ({', '.join(used)}): layers and prompts go to them unencrypted, and "
            "anyone who can reach them can change what is computed"
        )
        found.append(Finding(Grade.NOTICE, what, "run sollold on those machines instead"))
    return found


def _disk(facts: Facts) -> list[Finding]:
    if facts.disk_free >= LOW_DISK:
        return []
    what = f"only {bytes_text(facts.disk_free)} free at {facts.cache}: repeated loads will be slow"
    return [Finding(Grade.NOTICE, what, f"free some space, or delete {facts.cache}/tensors")]


def _company(facts: Facts) -> list[Finding]:
    found = []
    if len(facts.live) == 1 and not facts.me.seeking:
        what = (
            "no other node found; on the others, check that sollold runs, that the token is the same "
            "and that the firewall allows 11436/tcp, 11436/udp and 5353/udp"
        )
        found.append(Finding(Grade.NOTICE, what, f"to find one without mDNS, {_SEED}"))
    if facts.me.open:
        what = (
            "an open cluster: anyone on this LAN can join it, and then read prompts, write answers, fetch "
            "models and use its memory"
        )
        found.append(Finding(Grade.NOTICE, what, "sollold cluster secure"))
    if facts.outdated_door:
        what = (
            "the settings say that this cluster is open, but it was given a secret (sollold cluster secure), "
            "which counts more"
        )
        found.append(Finding(Grade.NOTICE, what, "remove cluster.door and cluster.token from sollold.toml"))
    if facts.me.seeking:
        what = f"this machine {facts.me.seeking}"
        found.append(
            Finding(Grade.PROBLEM, what, f"on a machine there: `sollold admit {shlex.quote(facts.me.name)}`")
        )
    for record in facts.live:
        for one in record.waiting:
            what = f"{one.name} waits at {record.name} for admission; it shows the code {one.code}"
            found.append(
                Finding(Grade.NOTICE, what, f"if it is yours: `sollold admit {shlex.quote(one.code)}`")
            )
    # Of other nodes it is known that they do: how long, their clocks say.
    if any(one.door_until for one in facts.live):
        what = "new machines on this LAN are admitted to the cluster"
        if facts.me.door_until > facts.now:
            # The record tells the end of the minute in which it shuts.
            what += f" for another {max(1, int((facts.me.door_until - facts.now) // 60))} min"
        found.append(Finding(Grade.NOTICE, what, "to end that now: `sollold cluster close`"))
    if facts.open_api:
        what = (
            "open API: other machines on this network can ask models and read the cluster's state without an "
            'API key (http.auth = "open" says that this is meant)'
        )
        found.append(Finding(Grade.NOTICE, what, "sollold key new NAME"))
    return found
