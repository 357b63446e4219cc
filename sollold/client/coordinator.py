"""A distributed deployment, as callers see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from sollold.client.errors import ClientError
from sollold.facts import dataclass

DISTRIBUTED = "llama.cpp-distributed"


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The llama-server that runs a model over several machines.

    Attributes:
        id: id of the deployment; empty if known only from an answer.
        model: name of the model.
        base_url: API of the node that runs it; the llama-server itself listens only on that machine.
        state: ``ready``, ``loading`` …
        node: name of the node that runs it.
        rpc_backends: devices on other machines that hold layers, each with ``host``, ``port``, ``node``,
            ``device``, ``layers`` and ``bytes``. ``port`` is the one for traffic between nodes.
        layers: all shares: ``node``, ``device``, ``first``, ``last`` (inclusive), ``bytes``.
        context: context length per request, in tokens.
        tokens_per_second: measured speed of a single stream; 0.0 before the first.
    """

    id: str
    model: str
    base_url: str
    state: str = "ready"
    node: str = ""
    rpc_backends: tuple[dict[str, Any], ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    context: int = 0
    tokens_per_second: float = 0.0
    look: Callable[[str], bool] | None = field(default=None, repr=False, compare=False)
    """Asks the cluster whether the deployment with this id runs; None: the last known state is used."""

    def is_running(self) -> bool:
        """Whether it is ready: checked now by the blocking classes, as last seen by the async ones."""
        return self.look(self.id) if self.look is not None else self.state == "ready"


def coordinators_in(cluster: dict[str, Any]) -> list[Coordinator]:
    """The coordinators in ``/api/cluster``, ready ones first.

    Raises:
        ClientError: a field is missing: the node runs another release.
    """
    try:
        nodes = {node["node"]: node for node in cluster["nodes"]}
        found = [
            _coordinator(deployment, nodes)
            for deployment in cluster["deployments"]
            if deployment["backend"] == DISTRIBUTED
        ]
    except (LookupError, TypeError) as error:
        text = f"the node's answer is not understood ({type(error).__name__}: {error})"
        raise ClientError(f"{text}: use the same release of sollold here and there") from error
    return sorted(found, key=lambda c: c.state != "ready")


def coordinator_of(model: str, routing: Mapping[str, Any]) -> Coordinator | None:
    """The coordinator in an answer's ``_routing``; None if a single machine answered."""
    if routing.get("backend") != DISTRIBUTED:
        return None
    name, head = str(routing.get("model") or model), str(routing.get("node") or "")
    layers, backends = [], []
    for device in routing.get("devices") or ():
        node, _, part = str(device).partition("/")
        layers.append({"node": node, "device": part})
        if node != head or ":" in part:
            backends.append({"host": node, "port": 0, "node": node, "device": part})
    url = str(routing.get("coordinator_url") or "")
    return Coordinator("", name, url, "ready", head, tuple(backends), tuple(layers))


def _coordinator(deployment: dict[str, Any], nodes: dict[str, Any]) -> Coordinator:
    head = nodes.get(deployment["node"], {})
    parts = [part for part in deployment["placed"] if part["last"] > part["first"]]
    backends = []
    for part in parts:
        host, port = _address(part, nodes)
        if part["node"] != deployment["node"] or "#" in part["device"] or ":" in part["device"]:
            backends.append(
                {
                    "host": host,
                    "port": port,
                    "node": part["node_name"],
                    "device": part["device"],
                    "layers": part["last"] - part["first"],
                    "bytes": part["bytes"],
                }
            )
    return Coordinator(
        id=deployment["id"],
        model=deployment["model"],
        base_url=head.get("url", ""),
        state=deployment["state"],
        node=deployment["node_name"],
        rpc_backends=tuple(backends),
        layers=tuple(
            {
                "node": part["node_name"],
                "device": part["device"],
                "first": part["first"],
                "last": part["last"] - 1,
                "bytes": part["bytes"],
            }
            for part in parts
        ),
        context=deployment["context"],
        tokens_per_second=deployment["speed"],
    )


def _address(part: dict[str, Any], nodes: dict[str, Any]) -> tuple[str, int]:
    """Address of a share: that of the external worker, else of its node."""
    host, colon, port = part["device"].partition("#")[0].rpartition(":")
    if colon and port.isdigit():
        return host, int(port)
    node = nodes.get(part["node"], {})
    return (node.get("addresses") or [""])[0], int(node.get("peer_port") or 0)
