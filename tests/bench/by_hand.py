"""A deployment's engines started manually, without sollold.

The command lines are those of the deployment's workers and llama-server, except that the workers listen on
the machines' own addresses and llama-server connects to them there without encryption.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.daemons import Cluster, Node, until
from tests.gguf.llama_run import listens

PORT = 61080
"""Port of llama-server on its node's loopback address."""
_WORKER = 60052


@dataclass(frozen=True, slots=True)
class Engines:
    """Command lines of a deployment's engines.

    Attributes:
        head, server: node and command line of llama-server, without the ports of the tunnels.
        workers: nodes and command lines in the order of their layers.
        layers: number of layers of each device, for example ``5+6+5``.
    """

    head: Node
    server: tuple[str, ...]
    workers: tuple[tuple[Node, tuple[str, ...]], ...]
    layers: str


def engines(cluster: Cluster) -> Engines:
    """Return the command lines of the only deployment."""
    (deployment,) = cluster.deployments()
    placed = deployment["placed"]
    nodes = {node.state()["me"]: node for node in cluster}
    head, server = next((n, words) for n in cluster if (words := command_line(n, "llama-server")))
    # The order of devices is that of the placement.
    order = [nodes[share["node"]] for share in placed if nodes[share["node"]] is not head]
    workers = tuple((node, command_line(node, "rpc-server")) for node in order)
    layers = "+".join(str(share["last"] - share["first"]) for share in placed)
    # The key file is deleted with the deployment.
    index = server.index("--api-key-file")
    server = with_option((*server[:index], *server[index + 2 :]), "--rpc", "")
    return Engines(head, server, workers, layers)


def command_line(node: Node, program: str) -> tuple[str, ...]:
    """Return the command line of the node's engine, or an empty tuple."""
    for process in processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if words and program in words[0]:
                return tuple(words)
    return ()


def processes(node: Node) -> list[psutil.Process]:
    """Return the running child processes of the node's daemon; manually started engines are not children."""
    return psutil.Process(node.process.pid).children() if node.process else []


def with_option(words: tuple[str, ...], name: str, value: str) -> tuple[str, ...]:
    """Return the command line with another value of one option."""
    index = words.index(name)
    return (*words[: index + 1], value, *words[index + 2 :])


@contextlib.contextmanager
def by_hand(engines: Engines) -> Iterator[list[int]]:
    """Run the engines until ready and yield their process ids. llama-server listens on `PORT`."""
    children: list[subprocess.Popen[bytes]] = []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = engines.head
    assert head.machine is not None
    try:
        for node, words in engines.workers:
            assert node.machine is not None
            words = with_option(with_option(words, "-H", "0.0.0.0"), "-p", str(_WORKER))
            children.append(node.machine.popen([word for word in words if word != "-c"], **quiet))
            pid = children[-1].pid
            until(partial(listens, pid, _WORKER), "a manually started worker listens", 30)
        addresses = ",".join(f"{node.address}:{_WORKER}" for node, _ in engines.workers)
        words = with_option(with_option(engines.server, "--rpc", addresses), "--port", str(PORT))
        server = head.machine.popen(list(words), stdin=subprocess.PIPE, **quiet)
        children.append(server)
        until(
            lambda: server.poll() is not None or _healthy(head),
            "the manually started engines are ready",
            300,
            0.05,
        )
        assert server.poll() is None, f"the manually started llama-server ended with {server.returncode}"
        yield [child.pid for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _healthy(node: Node) -> bool:
    try:
        with node.network():
            link = http.client.HTTPConnection("127.0.0.1", PORT, timeout=3)
            link.connect()
        with contextlib.closing(link):
            link.request("GET", "/health")
            return link.getresponse().status == 200
    except OSError:
        return False


def bind(pid: int, cores: set[int]) -> None:
    """Restrict all threads of a process to ``cores``."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
