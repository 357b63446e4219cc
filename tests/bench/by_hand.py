"""A deployment's engines once more, as somebody would start them without us.

The very command lines of the deployment's workers and llama-server, but the workers listen on the machines'
own addresses and llama-server calls them there in the clear.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.daemons import Cluster, Node, until
from tests.gguf.llama_run import listens

PORT = 61080
"""Where llama-server listens, at its node's loopback address."""
_WORKER = 60052


@dataclass(frozen=True, slots=True)
class Engines:
    """Command lines, as the daemons have started them.

    Attributes:
        head, server: llama-server's node and words, without the ports of the tunnels, new with each load.
        workers: nodes and words, in the order of their layers.
        layers: how many each device holds, as ``5+6+5``.
    """

    head: Node
    server: tuple[str, ...]
    workers: tuple[tuple[Node, tuple[str, ...]], ...]
    layers: str


def engines(cluster: Cluster) -> Engines:
    """Those of the only deployment."""
    (deployment,) = cluster.deployments()
    placed = deployment["placed"]
    nodes = {node.state()["me"]: node for node in cluster}
    head, server = next((n, words) for n in cluster if (words := command_line(n, "llama-server")))
    # Device order is what the placement says.
    order = [nodes[share["node"]] for share in placed if nodes[share["node"]] is not head]
    workers = tuple((node, command_line(node, "rpc-server")) for node in order)
    layers = "+".join(str(share["last"] - share["first"]) for share in placed)
    # The key is gone with the deployment.
    at = server.index("--api-key-file")
    server = with_option((*server[:at], *server[at + 2 :]), "--rpc", "")
    return Engines(head, server, workers, layers)


def command_line(node: Node, program: str) -> tuple[str, ...]:
    """The command line of this node's engine; empty when it has none."""
    for process in processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if words and program in words[0]:
                return tuple(words)
    return ()


def processes(node: Node) -> list[psutil.Process]:
    """What the node's daemon has started and lives. By parentage: engines by hand name its files, too."""
    return psutil.Process(node.process.pid).children() if node.process else []


def with_option(words: tuple[str, ...], name: str, value: str) -> tuple[str, ...]:
    """The same command line with another value of one option."""
    at = words.index(name)
    return (*words[: at + 1], value, *words[at + 2 :])


@contextlib.contextmanager
def by_hand(engines: Engines) -> Iterator[list[int]]:
    """The engines run and are ready; their process ids. llama-server answers at `PORT`."""
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
            until(lambda pid=pid: listens(pid, _WORKER), "a worker by hand listens", 30)
        addresses = ",".join(f"{node.address}:{_WORKER}" for node, _ in engines.workers)
        words = with_option(with_option(engines.server, "--rpc", addresses), "--port", str(PORT))
        server = head.machine.popen(list(words), stdin=subprocess.PIPE, **quiet)
        children.append(server)
        until(lambda: server.poll() is not None or _healthy(head), "the engines by hand are ready", 300, 0.05)
        assert server.poll() is None, f"llama-server by hand ended with {server.returncode}"
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
    """Let all threads of a process run on ``cores`` alone."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
