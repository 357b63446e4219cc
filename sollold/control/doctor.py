"""What `sollold doctor` finds: what is wrong, why it matters and how to fix it. Pure."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from sollold.cluster.gossip.record import Record, State
from sollold.control.cluster_findings import (
    SAME_VERSION,
    membership,
    network,
    offline_nodes,
    same_addresses,
    same_names,
)
from sollold.control.finding import Facts, Finding, Grade
from sollold.engines.llamacpp.exit_reason import lacked_memory
from sollold.leader.pinned import LostModel
from sollold.machine.device import Kind
from sollold.machine.external_worker import ExternalState
from sollold.models.model import Model
from sollold.units import bytes_text, seconds_text

LOW_DISK = 5 * 1024**3
_MAX_FINDINGS = 20
"""Maximum number of findings of one kind: a folder may hold thousands of files that can't be used, or whose
names are taken."""
_MAX_NAMES = 5
_PROCESSOR = "models run on the processor"
_GPU_ACCESS = (
    "if there is one, see that its driver is loaded, and that the daemon's user may open its files in /dev; "
    "a container has to be given it: `--device nvidia.com/gpu=all` for NVIDIA, else `--device /dev/dri` with "
    "`--group-add` and the number of the group that owns /dev/dri/renderD128, and /dev/kfd for ROCm"
)
_MORE_ROOM = (
    "see which other program uses memory there, and leave it more (node.reserve in sollold.toml), or request "
    "less context"
)


def examine(facts: Facts) -> list[Finding]:
    """Return all findings, the worst first."""
    found = [
        *_state(facts),
        *_settings(facts),
        *_llama(facts),
        *_builds(facts.live),
        *same_names(facts.live),
        *same_addresses(facts.live, facts.offline),
        *_crashing(facts),
        *_failed(facts),
        *_lost(facts.lost),
        # Those of a cluster that evicted this machine are not offline.
        *offline_nodes(() if facts.me.seeking else facts.offline, alone=len(facts.live) == 1),
        *_files(facts.files),
        *(Finding(Grade.PROBLEM, text, fix) for text, fix in facts.trouble),
        *network(facts),
        *_models(facts.models),
        *_memory(facts.me),
        *_memory_limit(facts.group),
        *_gpus(facts),
        *_external_workers(facts.me),
        *_disk(facts),
        *membership(facts),
    ]
    return sorted(found, key=lambda finding: finding.grade is Grade.NOTICE)


def _state(facts: Facts) -> list[Finding]:
    if not facts.unwritable:
        return []
    text = (
        f"{facts.state} can't be written to: {facts.unwritable}. This node can't take part in newly loaded "
        "models, and changes of keys and members are not saved"
    )
    return [Finding(Grade.PROBLEM, text, "free some space on that disk, or make it writable for the daemon")]


def _settings(facts: Facts) -> list[Finding]:
    found = []
    if facts.unread:
        text = f"the settings could not be reloaded, and the daemon would not start with them: {facts.unread}"
        found.append(Finding(Grade.PROBLEM, text, "fix that, then: `sudo systemctl reload sollold`"))
    if facts.held:
        text = f"these settings were changed and need a restart: {', '.join(facts.held)}"
        found.append(Finding(Grade.NOTICE, text, "sudo systemctl restart sollold"))
    return found


def _llama(facts: Facts) -> list[Finding]:
    if facts.me.build:
        return []
    if facts.setup_failed:
        text = f"no llama.cpp: {facts.setup_failed}; this node can't run models itself"
        command = f"sollold setup --set node.cache_dir={shlex.quote(str(facts.cache))}"
        fix = f"`{command}` (as the daemon's user; or install the package sollold-llama.cpp)"
        return [Finding(Grade.PROBLEM, text, fix)]
    return [Finding(Grade.NOTICE, f"llama.cpp is being set up: {facts.me.setup or 'starting'}")]


def _builds(live: Sequence[Record]) -> list[Finding]:
    builds: dict[str, list[str]] = {}
    for record in live:
        if record.build:
            builds.setdefault(record.build, []).append(record.name)
    if len(builds) < 2:
        return []
    words = "; ".join(f"{build} on {', '.join(names)}" for build, names in sorted(builds.items()))
    text = f"the nodes run different builds of llama.cpp, which can't share a model: {words}"
    if len({record.release for record in live if record.build}) > 1:
        return [Finding(Grade.PROBLEM, text, SAME_VERSION)]
    fix = (
        "make all use the same: a build other than sollold's own is named by llama.server in the settings, "
        "or was found as llama-server in the PATH (`sollold setup` there shows which)"
    )
    return [Finding(Grade.PROBLEM, text, fix)]


def _crashing(facts: Facts) -> list[Finding]:
    """Report nodes on which llama.cpp has loaded no model without crashing."""
    found = []
    for node in facts.crashing:
        models = ", ".join(node.models[-_MAX_NAMES:])
        folder = "the folder llama.cpp in its node.cache_dir"
        if node.node == facts.me.node:
            folder = f"{shlex.quote(facts.cache)}/llama.cpp"
        fix = (
            f"on {node.name}: update the driver of the GPU, if any. If sollold built this llama.cpp, "
            f"remove {folder}; then `sudo systemctl restart sollold` builds it again and tests it. Otherwise "
            "set llama.server to another one"
        )
        if len(node.models) > 1:
            text = f"llama.cpp {node.build} on {node.name} crashes with every model, last {models}: "
        else:
            text = f"llama.cpp {node.build} on {node.name} crashed as it loaded {models}: "
            fix = (
                f"load another model there. If that crashes, too, llama.cpp does not suit the machine: {fix}"
            )
        found.append(Finding(Grade.PROBLEM, f"{text}{node.reason}", fix))
    return found


def _failed(facts: Facts) -> list[Finding]:
    """Report each failure once, and whether the model is running again."""
    live = facts.live
    crashes = {(node.node, model) for node in facts.crashing for model in node.models}
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
        if endpoint.state is State.FAILED and (endpoint.culprit or record.node, endpoint.model) not in crashes
    )
    found = []
    for (model, node, reason), count in times.items():
        text = f"{model} on {node} failed{f' {count} times' if count > 1 else ''}: {reason}"
        if model in ready:
            found.append(Finding(Grade.NOTICE, f"{text}. It runs again, on {ready[model]}"))
        else:
            logs = f"`sollold logs {shlex.quote(model)}` shows the engine's last log lines"
            fix = f"{_MORE_ROOM}; {logs}" if lacked_memory(reason) else logs
            found.append(Finding(Grade.PROBLEM, text, fix))
    return found


def _lost(lost: Sequence[LostModel]) -> list[Finding]:
    found = []
    for model in lost:
        text = (
            f"{model.model} should stay loaded (keep_alive -1) but has been gone from {model.head} for "
            f"{seconds_text(model.seconds)}; it is loaded again as soon as possible"
        )
        if model.reason:
            text += f". Last attempt: {model.reason}"
        fix = f"`sollold plan {shlex.quote(model.model)}` shows where it would go, or what is missing"
        found.append(Finding(Grade.PROBLEM, text, fix))
    return found


def _files(problems: Sequence[tuple[str, str]]) -> list[Finding]:
    found = [Finding(Grade.PROBLEM, text, fix) for text, fix in problems[:_MAX_FINDINGS]]
    if rest := problems[_MAX_FINDINGS:]:
        text = f"{len(rest)} more problem{'s' if len(rest) > 1 else ''} with models' files and folders"
        fix = "fix those listed, then run `sollold doctor` again"
        found.append(Finding(Grade.PROBLEM, text, fix))
    return found


def _models(models: Sequence[Model]) -> list[Finding]:
    found = []
    unusable = [model for model in models if model.unusable]
    for model in unusable[:_MAX_FINDINGS]:
        location = f"{model.source}, {model.files[0]}" if model.files else model.source
        text = f"{model.name} ({location}) can't be used: {model.unusable}"
        fix = "pull or copy it again, or remove the file" if "truncated" in model.unusable else ""
        found.append(Finding(Grade.PROBLEM, text, fix))
    if rest := unusable[_MAX_FINDINGS:]:
        text = f"{len(rest)} more model{'s' if len(rest) > 1 else ''} can't be used"
        found.append(Finding(Grade.PROBLEM, text, "sollold models --all"))
    return found


def _gpus(facts: Facts) -> list[Finding]:
    if not facts.me.build or not (facts.idle_gpus or facts.absent_gpus):
        return []
    if not facts.idle_gpus:
        kinds = " and ".join(facts.absent_gpus)
        text = f"llama.cpp {facts.me.build} here is built for {kinds}, but no GPU was found: {_PROCESSOR}"
        return [Finding(Grade.NOTICE, text, _GPU_ACCESS)]
    names = ", ".join(facts.idle_gpus)
    text = f"llama.cpp {facts.me.build} here can't use {names}: {_PROCESSOR}"
    fix = "install the GPU's toolkit (for NVIDIA: nvcc), then: `sudo systemctl restart sollold`"
    return [Finding(Grade.NOTICE, text, fix)]


def _memory_limit(group: tuple[int, int]) -> list[Finding]:
    limit, machine = group
    if not limit:
        return []
    text = f"a control group lets this daemon use {bytes_text(limit)} of the machine's {bytes_text(machine)}"
    fix = "for more: MemoryMax or MemoryHigh of its systemd unit, or the memory limit of its container"
    return [Finding(Grade.NOTICE, text, fix)]


def _memory(me: Record) -> list[Finding]:
    devices = [device for device in me.devices if device.kind is not Kind.EXTERNAL]
    if devices and not any(device.limit > 64 * 1024**2 for device in devices):
        text = "no device of this machine may use more than 64 MiB"
        return [Finding(Grade.PROBLEM, text, "raise node.memory_limit, or lower node.reserve")]
    return []


def _external_workers(me: Record) -> list[Finding]:
    """Report external workers that can't be used, and the risk of those that are used."""
    found = []
    used = []
    for worker in me.plain:
        if worker.state in (ExternalState.USABLE, ExternalState.TAKEN):
            used.append(worker.address)
        elif worker.state is not ExternalState.CHECKING:
            text = f"the worker {worker.address} of rpc_backends is not used: {worker.reason}"
            grade = Grade.PROBLEM if worker.state is ExternalState.DEAD else Grade.NOTICE
            fix = "start it, or remove it from [llama] rpc_backends" if grade is Grade.PROBLEM else ""
            found.append(Finding(grade, text, fix))
    if used:
        text = (
            f"external workers are used ({', '.join(used)}): layers and prompts go to them unencrypted, and "
            "anyone who can reach them can change what is computed"
        )
        found.append(Finding(Grade.NOTICE, text, "run sollold on those machines instead"))
    return found


def _disk(facts: Facts) -> list[Finding]:
    if facts.disk_free >= LOW_DISK:
        return []
    text = f"only {bytes_text(facts.disk_free)} free at {facts.cache}: repeated loads will be slow"
    return [Finding(Grade.NOTICE, text, f"free some space, or delete {facts.cache}/tensors")]
