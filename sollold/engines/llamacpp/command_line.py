"""Builds the command line of ``llama-server`` for a plan. Pure.

The order matters: ``--rpc`` defines the devices ``RPC0``, ``RPC1`` …, numbered across all workers' devices,
so it comes before ``--device``. ``--device`` gives the order of layers, and ``--tensor-split`` in whole
numbers of layers, one per device, is exact where fractions are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sollold.cluster.gossip.record import MTP, NGRAM
from sollold.engines.install.find import DRAFT_MTP, Llama
from sollold.engines.llamacpp.ports import LOOPBACK
from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR
from sollold.machine.external_worker import external_address, external_device
from sollold.models.footprint.run_options import Run
from sollold.models.model import Model
from sollold.placement.plan import Plan
from sollold.placement.speculation import NGRAM_LOOKUP

_OPTIONAL: tuple[tuple[str, ...], ...] = (
    # Fitting would change the plan; the prompt cache has caused aborts over RPC.
    ("--fit", "off"),
    ("--cache-ram", "0"),
    ("--jinja",),
    ("--slots",),
    ("--metrics",),
    # At this level it logs its buffer sizes, but not yet users' prompts.
    ("--log-verbosity", "4"),
    ("--log-colors", "off"),
    ("--no-webui",),
    # Web pages in a browser on this machine must not use the engine.
    ("--cors-origins", "localhost"),
    ("--offline",),
)
"""Options passed to builds that support them."""


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """How the head reaches a worker: its address, and all of its devices in order.

    ``host``: loopback for the node's own workers and for tunnels; an external worker that the head itself
    names is reached directly.
    """

    node: str
    port: int
    devices: tuple[str, ...]
    host: str = LOOPBACK


def worker_devices(plan: Plan, node: str) -> tuple[str, ...]:
    """Return the devices for which ``node`` starts a worker. The head's own GPUs need none."""
    wanted = (
        share.device for share in plan.shares if share.node == node and not external_address(share.device)
    )
    return tuple(dict.fromkeys(device for device in wanted if node != plan.head or device == PROCESSOR))


def worker_nodes(plan: Plan) -> tuple[str, ...]:
    """Return the nodes that start a worker, in the order of their layers."""
    return tuple(dict.fromkeys(share.node for share in plan.shares if worker_devices(plan, share.node)))


def external_workers(plan: Plan) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Return (node, address, devices) of each external worker, in the order of the layers.

    ``node`` is the one that names it. The devices include unused ones: llama-server counts them all.
    """
    found = {
        (share.node, device.address): device.all()
        for share in plan.shares
        if (device := external_device(share.device)) is not None
    }
    return tuple((node, address, devices) for (node, address), devices in found.items())


def device_names(plan: Plan, workers: Sequence[WorkerAddress]) -> tuple[str, ...]:
    """Return ``--device``: llama-server's names of the plan's devices, in the order of the shares."""
    remote = [(worker.node, device) for worker in workers for device in worker.devices]
    names = {pair: f"RPC{index}" for index, pair in enumerate(remote)}
    return tuple(names.get((share.node, share.device), share.device) for share in plan.shares)


def command_line(
    plan: Plan,
    model: Model,
    llama: Llama,
    workers: Sequence[WorkerAddress],
    *,
    port: int,
    key_file: Path,
    threads: int,
    extra: Sequence[str] = (),
    template: Path | None = None,
    draft: Model | None = None,
    slots: Path | None = None,
) -> list[str]:
    """Return ``llama-server`` with its options for ``plan``; ``workers`` are in ``--rpc`` order.

    ``key_file``: file with the API key that requests must carry. ``template``: file with the model's TEMPLATE
    as Jinja; None: use the model's built-in template. ``draft``: the plan's draft model. ``slots``: folder in
    which it may save its slots.
    """
    run = plan.run
    line = [str(llama.server), "--host", LOOPBACK, "--port", str(port)]
    line += ["--api-key-file", str(key_file)]
    line += ["--model", model.files[0], "--alias", plan.model]
    if workers:
        line += ["--rpc", ",".join(f"{worker.host}:{worker.port}" for worker in workers)]
    if plan.shares:
        line += ["--device", ",".join(device_names(plan, workers)), "--split-mode", "layer"]
        line += ["--tensor-split", ",".join(map(str, plan.tensor_split))]
    else:
        line += ["--device", "none"]
    line += ["--gpu-layers", str(plan.gpu_layers)]
    if plan.cpu_moe:
        line += ["--n-cpu-moe", str(plan.cpu_moe)]
    line += run_options(run)
    # Its default of 32 checkpoints per slot would exceed the planned memory.
    checkpoints = ("--ctx-checkpoints", str(run.checkpoints))
    for option in ("--kv-unified" if run.unified else "--no-kv-unified",), checkpoints, *_OPTIONAL:
        # Builds differ in the options they know; an unknown option's feature is absent from the build too.
        if option[0] in llama.flags:
            line += option
    if template is not None:
        line += ["--chat-template-file", str(template)]
    if slots is not None and "--slot-save-path" in llama.flags:
        line += ["--slot-save-path", f"{slots}/"]
    if threads:
        line += ["--threads", str(threads)]
    if run.embedding:
        line += _embedding(model)
    if model.projector:
        line += ["--mmproj", model.projector]
        line += _projector(plan, llama)
    if model.adapters:
        line += ["--lora", ",".join(map(_quoted, model.adapters))]
    return [*line, *_speculation(plan, llama, draft), *extra]


def run_options(run: Run) -> list[str]:
    """Return the options on which the memory for the context and for computing depends."""
    return [
        *("--ctx-size", str(run.context), "--parallel", str(run.slots)),
        *("--cache-type-k", run.type_k, "--cache-type-v", run.type_v, "--flash-attn", run.flash),
        *("--batch-size", str(run.batch), "--ubatch-size", str(run.ubatch)),
    ]


def _embedding(model: Model) -> list[str]:
    """Return the options for an embedding or reranking model."""
    if "rerank" in model.capabilities:
        return ["--reranking"]
    # Embedding models define their pooling; generating models do not.
    return ["--embedding", *(["--pooling", "mean"] if "completion" in model.capabilities else [])]


def can_draft(llama: Llama, drafts_by: str) -> bool:
    """Return whether a build supports this kind of speculation; ``drafts_by``: as in `Plan`."""
    return "--spec-ngram-simple-size-m" in llama.flags and (drafts_by != MTP or DRAFT_MTP in llama.flags)


def _speculation(plan: Plan, llama: Llama, draft: Model | None) -> list[str]:
    if not plan.drafts_by or not can_draft(llama, plan.drafts_by):
        return []
    limit = str(plan.run.drafts)
    if plan.drafts_by == NGRAM:
        lengths = ["--spec-ngram-simple-size-n", str(NGRAM_LOOKUP), "--spec-ngram-simple-size-m", limit]
        return ["--spec-type", "ngram-simple", *lengths]
    types = ["--spec-draft-type-k", plan.run.type_k, "--spec-draft-type-v", plan.run.type_v]
    # Sampling on the device would take memory that the plan has not counted.
    types += ["--no-spec-draft-backend-sampling"]
    if plan.drafts_by == MTP:
        return ["--spec-type", DRAFT_MTP, "--spec-draft-n-max", limit, *types]
    if draft is None:
        return []
    host = plan.draft_device == PROCESSOR
    line = ["--spec-type", "draft-simple", "--spec-draft-model", draft.files[0], "--spec-draft-n-max", limit]
    # By default it follows --device: to the workers, where each drafted token costs a round trip.
    line += ["--spec-draft-device", "none" if host else plan.draft_device]
    return [*line, "--spec-draft-ngl", "0" if host else "all", *types]


def _projector(plan: Plan, llama: Llama) -> list[str]:
    """Return where the projector runs. The default is the first device, perhaps on another machine."""
    device = plan.projector_device
    if device and "--mmproj-device" in llama.flags:
        return ["--mmproj-device", device]
    first = plan.shares[0] if plan.shares else plan.host
    return [] if device and (first.node, first.device) == (plan.head, device) else ["--no-mmproj-offload"]


def _quoted(path: str) -> str:
    """Quote a path as one field of a comma-separated list."""
    return '"' + path.replace('"', '""') + '"' if "," in path or '"' in path else path
