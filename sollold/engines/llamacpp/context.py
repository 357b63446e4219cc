"""What all deployments of a node share: the node's calls, tunnels, ports and folders."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.fit_check import FitCheck
from sollold.engines.llamacpp.kept_prompts import KeptPrompts
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.tunnel import Tunnels
from sollold.facts import dataclass
from sollold.models.gguf.header import Header
from sollold.models.model import Model


@dataclass(frozen=True, slots=True)
class DeploymentContext:
    """The environment shared by all deployments of a node.

    Attributes:
        node: this node's id.
        http: session for requests to ``llama-server``.
        logs: folder of the deployments' logs. ``keys``: folder of the engines' API keys.
        threads: threads per engine; 0: the engine's default. ``extra``: more arguments for ``llama-server``.
        local_worker_port: returns the port of this node's own worker for a deployment.
        prompts: processed prompts saved to disk.
        holders: returns the nodes that have the files of the model with a digest.
        header: reads a local model's header; raises `GgufError`, or `LookupError` if the file system hangs.
        name: returns a node's display name for its id.
    """

    node: str
    calls: RpcClient
    tunnels: Tunnels
    http: aiohttp.ClientSession
    ports: Ports
    journal: Journal
    logs: Path
    keys: Path
    threads: int
    extra: tuple[str, ...]
    local_worker_port: Callable[[str], Awaitable[int]]
    holders: Callable[[str], tuple[str, ...]]
    header: Callable[[Model], Awaitable[Header]]
    fit_check: FitCheck
    prompts: KeptPrompts
    name: Callable[[str], str]
