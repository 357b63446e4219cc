"""The command line of ``llama-server`` for a plan. Pure.

The order matters: ``--rpc`` makes the devices ``RPC0``, ``RPC1`` … known, one counter over all workers'
devices, so it comes before ``--device``. ``--device`` gives the order of layers, and ``--tensor-split``
in whole numbers of layers, one a device, is exact where fractions are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sollold.agent.llama_find import Llama
from sollold.agent.ports import LOOPBACK
from sollold.machine.plain import plain_address, plain_device
from sollold.models.model import Model
from sollold.placement.plan import Plan

PROCESSOR = "CPU"
"""llama-server refuses it in ``--device``: a worker or the host holds its layers."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How the head reaches one worker of a node: where, and all of the worker's devices in their order.

    ``host``: loopback, where the node's own workers and the tunnels are; a plain worker that the head itself
    names is reached as it is.
    """

    node: str
    port: int
    devices: tuple[str, ...]
    host: str = LOOPBACK


def worker_devices(plan: Plan, node: str) -> tuple[str, ...]:
    """The devices for which ``node`` starts a worker. The head's own GPUs need none."""
    wanted = (one.device for one in plan.shares if one.node == node and not plain_address(one.device))
    return tuple(dict.fromkeys(device for device in wanted if node != plan.head or device == PROCESSOR))


def worker_nodes(plan: Plan) -> tuple[str, ...]:
    """The nodes that start a worker, in the order in which their layers come."""
    return tuple(dict.fromkeys(share.node for share in plan.shares if worker_devices(plan, share.node)))


def plain_workers(plan: Plan) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(node, address, devices) of the workers that others started and ``node`` names, as layers come.

    The devices are all that a worker has, used or not: llama-server counts them all.
    """
    found = {
        (share.node, device.address): device.all()
        for share in plan.shares
        if (device := plain_device(share.device)) is not None
    }
    return tuple((node, address, devices) for (node, address), devices in found.items())


def device_names(plan: Plan, reach: Sequence[Reach]) -> tuple[str, ...]:
    """``--device``: llama-server's names of the plan's devices, in the order of the shares."""
    remote = [(one.node, device) for one in reach for device in one.devices]
    names = {place: f"RPC{index}" for index, place in enumerate(remote)}
    return tuple(names.get((share.node, share.device), share.device) for share in plan.shares)


def command_line(
    plan: Plan,
    model: Model,
    llama: Llama,
    reach: Sequence[Reach],
    *,
    port: int,
    threads: int,
    extra: Sequence[str] = (),
) -> list[str]:
    """``llama-server`` with its options for ``plan``; the workers of ``reach`` are in ``--rpc`` order."""
    run = plan.run
    line = [str(llama.server), "--host", LOOPBACK, "--port", str(port)]
    line += ["--model", model.files[0], "--alias", plan.model]
    if reach:
        line += ["--rpc", ",".join(f"{one.host}:{one.port}" for one in reach)]
    if plan.shares:
        line += ["--device", ",".join(device_names(plan, reach)), "--split-mode", "layer"]
        line += ["--tensor-split", ",".join(map(str, plan.tensor_split))]
    else:
        line += ["--device", "none"]
    line += ["--gpu-layers", str(plan.gpu_layers)]
    if plan.cpu_moe:
        line += ["--n-cpu-moe", str(plan.cpu_moe)]
    line += ["--ctx-size", str(run.context), "--parallel", str(run.slots)]
    line += ["--cache-type-k", run.type_k, "--cache-type-v", run.type_v, "--flash-attn", run.flash]
    line += ["--batch-size", str(run.batch), "--ubatch-size", str(run.ubatch)]
    for option in (
        ("--kv-unified",) if run.unified else ("--no-kv-unified",),
        # Fitting would change what was planned; the prompt cache has aborted over RPC.
        ("--fit", "off"),
        ("--cache-ram", "0"),
        # Left to itself it keeps 32 a slot, which nobody has reckoned with.
        ("--ctx-checkpoints", str(run.checkpoints)),
        ("--jinja",),
        ("--slots",),
        ("--metrics",),
        # At this level it tells of its buffers, and not yet of what people ask.
        ("--log-verbosity", "4"),
        ("--log-colors", "off"),
        ("--no-webui",),
        # A web page that a person on this machine looks at has no business here.
        ("--cors-origins", "localhost"),
        ("--offline",),
    ):
        # Builds differ in what they know; what a build does not know it does not do either.
        if option[0] in llama.flags:
            line += option
    if threads:
        line += ["--threads", str(threads)]
    if run.embedding and "rerank" in model.capabilities:
        line += ["--reranking"]
    elif run.embedding:
        line += ["--embedding"]
        if "completion" in model.capabilities:
            # An embedder says itself how it sums up its tokens; a model that generates says nothing.
            line += ["--pooling", "mean"]
    if model.projector:
        line += ["--mmproj", model.projector]
        line += _projector(plan, llama)
    if model.adapters:
        line += ["--lora", ",".join(map(_quoted, model.adapters))]
    return [*line, *extra]


def _projector(plan: Plan, llama: Llama) -> list[str]:
    """Where it computes. Left to itself it goes to the first device, another machine's perhaps."""
    device = plan.projector_device
    if device and "--mmproj-device" in llama.flags:
        return ["--mmproj-device", device]
    first = plan.shares[0] if plan.shares else plan.host
    return [] if device and (first.node, first.device) == (plan.head, device) else ["--no-mmproj-offload"]


def _quoted(path: str) -> str:
    """As one field of a comma-separated row."""
    return '"' + path.replace('"', '""') + '"' if "," in path or '"' in path else path
