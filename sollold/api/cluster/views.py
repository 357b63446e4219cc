"""The cluster as JSON: nodes, devices, deployments, leader. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sollold.cluster.gossip.record import Drafts, Endpoint, Record, State
from sollold.cluster.gossip.term import Term
from sollold.control.events import OfflineNode
from sollold.machine.device import Device, Kind, one_a_memory
from sollold.machine.external_worker import ExternalWorker
from sollold.natural_order import natural
from sollold.serving.counters import Counters


def device_object(device: Device) -> dict[str, Any]:
    """Return a device; sizes are in bytes."""
    return {
        "id": device.id,
        "kind": str(device.kind),
        "name": device.name,
        "total": device.total,
        "free": device.free,
        "limit": device.limit,
        "granted": device.granted,
        "available": device.available,
        "bandwidth": device.bandwidth,
        "compute": device.compute,
    }


def external_worker_object(worker: ExternalWorker) -> dict[str, Any]:
    """Return an external worker: used only if the settings allow unauthenticated, unencrypted workers."""
    return {
        "address": worker.address,
        "state": str(worker.state),
        "reason": worker.reason,
        "version": worker.version,
        "devices": worker.devices,
        "total": worker.total,
    }


def node_object(record: Record, me: str, leader: str) -> dict[str, Any]:
    """Return a node with its devices; the totals exclude the memory of external workers."""
    own = [device for device in record.devices if device.kind is not Kind.EXTERNAL]
    memories = one_a_memory(own, lambda device: device.limit)
    return {
        "node": record.node,
        "name": record.name,
        "url": record.url,
        "addresses": list(record.addresses),
        "http_port": record.http_port,
        "peer_port": record.peer_port,
        "release": record.release,
        "build": record.build,
        "setup": record.setup,
        "open": record.open,
        "door_until": record.door_until,
        "waiting": [msgspec.to_builtins(machine) for machine in record.waiting],
        "seeking": record.seeking,
        "inviting": record.inviting,
        "admitted_by": record.admitted_by,
        "draining": record.draining,
        "empty": record.draining and record.empty,
        "me": record.node == me,
        "leader": record.node == leader,
        "total": sum(device.limit for device in memories),
        "granted": sum(device.granted for device in own),
        "available": sum(device.available for device in memories),
        "devices": [device_object(device) for device in record.devices],
        "plain_workers": [external_worker_object(worker) for worker in record.plain],
        "links": [
            {"node": node, "round_trip_ms": round(trip * 1000, 3), "bytes_per_second": rate}
            for node, trip, rate in record.links
        ],
    }


def deployment_object(record: Record, endpoint: Endpoint, names: dict[str, str]) -> dict[str, Any]:
    """Return a deployment with the layers on each device, ``first`` to ``last - 1``."""
    return {
        "id": endpoint.id,
        "model": endpoint.model,
        "digest": endpoint.digest,
        "backend": str(endpoint.backend),
        "state": str(endpoint.state),
        "progress": endpoint.progress,
        "reason": endpoint.reason,
        "node": record.node,
        "node_name": record.name,
        "context": endpoint.context,
        "slots": endpoint.slots,
        "active": endpoint.active,
        "waiting": endpoint.waiting,
        "speed": endpoint.speed,
        "idle": endpoint.idle,
        "pinned": endpoint.pinned,
        "expires": endpoint.expires,
        "bytes": endpoint.bytes,
        "layers": endpoint.layers,
        "speculation": drafts_object(endpoint.drafts),
        "placed": [
            {
                "node": placed.node,
                "node_name": names.get(placed.node, placed.node),
                "device": placed.device,
                "first": placed.first,
                "last": placed.last,
                "bytes": placed.bytes,
            }
            for placed in endpoint.placed
        ],
    }


def drafts_object(drafts: Drafts) -> dict[str, Any] | None:
    """Return what drafts tokens, and the acceptance so far; None without speculation."""
    if not drafts.by:
        return None
    return {
        "by": drafts.by,
        "length": drafts.length,
        "tokens": drafts.tokens,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "acceptance": round(drafts.acceptance, 3),
    }


def offline_object(offline: OfflineNode) -> dict[str, Any]:
    """Return a missing node: since when (in seconds since the epoch), and what it held."""
    record = offline.record
    return {
        "node": record.node,
        "name": record.name,
        "url": record.url,
        "since": round(offline.since, 3),
        "stopped": offline.stopped,
        "total": sum(device.limit for device in record.devices),
        "served": list(offline.served),
        "held": [msgspec.to_builtins(held) for held in offline.held],
    }


def is_listed(endpoint: Endpoint) -> bool:
    """Whether an endpoint is listed as running: an Ollama's model that is not loaded is not."""
    return endpoint.loaded or endpoint.state is not State.READY


def names_of(live: Iterable[Record], offline: Iterable[OfflineNode]) -> dict[str, str]:
    """Return names of nodes by id, including missing ones: a model may have layers on a node just lost."""
    return {node.record.node: node.record.name for node in offline} | {node.node: node.name for node in live}


def cluster_object(
    me: Record, records: Sequence[Record], leader: Term, offline: Sequence[OfflineNode]
) -> dict[str, Any]:
    """Return the response of ``GET /api/cluster``."""
    names = names_of(records, offline)
    leads = next((record for record in records if record.node == leader.leader), None)
    ordered = sorted(records, key=lambda record: (natural(record.name), record.node))
    return {
        "me": me.node,
        "name": me.name,
        "open": any(record.open for record in records),
        "leader": leader.leader,
        "leader_name": names.get(leader.leader, ""),
        "leader_url": leads.url if leads is not None else "",
        "term": leader.counter,
        "nodes": [node_object(record, me.node, leader.leader) for record in ordered],
        "deployments": [
            deployment_object(record, endpoint, names)
            for record in ordered
            for endpoint in record.endpoints
            if is_listed(endpoint)
        ],
        "offline": [offline_object(node) for node in offline],
    }


def stats_object(me: Record, counters: Counters, now: float) -> dict[str, Any]:
    """Return the response of ``GET /api/cluster/stats``; ``now``: Unix time."""
    return {
        "node": me.node,
        "name": me.name,
        "uptime_seconds": round(counters.uptime(), 1),
        "distributed_requests": counters.distributed,
        "local_requests": counters.local,
        "ollama_requests": counters.ollama,
        "resumed_streams": counters.resumed,
        "generated_tokens": counters.tokens,
        "generating_seconds": round(counters.seconds, 3),
        "deployments": [
            {
                "id": endpoint.id,
                "model": endpoint.model,
                "backend": str(endpoint.backend),
                "uptime_seconds": round(max(0.0, now - endpoint.ready_since), 1),
            }
            for endpoint in me.endpoints
            if endpoint.ready_since > 0
        ],
    }
