"""What every deployment of a node is run with: the node's calls, tunnels, ports and folders."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from sollold.cluster.net.rpc_client import Calls
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
    """The same for all deployments of a node.

    Attributes:
        node: this node's id.
        http: for asking ``llama-server``.
        logs: the folder of the deployments' logs. ``keys``: the folder of the engines' keys.
        threads: of an engine; 0: as many as it likes. ``extra``: more words for ``llama-server``.
        local_worker_port: of this node's own worker for a deployment.
        prompts: what engines have read, kept on disk.
        holders: the nodes that have the files of a model, by its digest.
        header: of a model's files here; raises `GgufError`, and `LookupError` when they do not answer.
        name: a node's name for people, by its id.
    """

    node: str
    calls: Calls
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
