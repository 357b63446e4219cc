"""``sollold demo``: three daemons on this machine, and one model spread over them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sollold.cli.asking import console
from sollold.cli.config import loaded
from sollold.cli.exit import Exit
from sollold.cli.status import deployment_table, node_table
from sollold.client.errors import ClientError
from sollold.client.http import Client
from sollold.engines.install.find import Llama, LlamaUnusable, find
from sollold.errors import system_words
from sollold.facts import dataclass
from sollold.models.gguf.demo_model import GREETING, Recital, pieces, write
from sollold.settings.paths import places
from sollold.settings.schema import MIB
from sollold.units import bytes_text

NODES = ("anna", "bert", "cleo")
MODEL = "demo-12-layers"
RECITAL = Recital(pieces(GREETING), name=MODEL, layers=12, hidden=16384)
"""The demo model. Its layers are large (all zeros), so that it needs three machines."""
LIMIT = 130 * MIB
CONTEXT = 1024
SLOWEST = 120.0
"""Timeout of each step, in seconds."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class _Node:
    name: str
    http: int
    peer: int
    process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"


async def demo(options: argparse.Namespace) -> int:
    """Start the daemons, spread the model, ask each node, and clean up, also on a signal."""
    settings = loaded(options, skip_unreadable=True).settings
    try:
        llama, passed = await asyncio.to_thread(find, settings.llama, places(settings.node).cache)
    except LlamaUnusable as error:
        print(f"sollold: {error}", file=sys.stderr)
        return Exit.FAILED
    if llama is None:
        print(
            f"sollold: no llama.cpp here; run `sollold setup` first. {' '.join(map(str, passed))}",
            file=sys.stderr,
        )
        return Exit.FAILED
    with _signals() as received:
        try:
            with tempfile.TemporaryDirectory(prefix="sollold-demo-") as folder:
                return await _demo(Path(folder), llama, keep=options.keep)
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]
        except BrokenPipeError:
            raise
        except OSError as error:
            print(f"sollold: the demo can't run here: {system_words(error)}", file=sys.stderr)
            return Exit.FAILED


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Cancel the block on SIGINT, SIGHUP or SIGTERM; the list receives the signal.

    Further signals are ignored: cleaning up has its own timeouts.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if task is not None and len(received) == 1:
            task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        yield received
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _demo(folder: Path, llama: Llama, *, keep: bool) -> int:
    out = console()
    models = folder / "models"
    models.mkdir()
    await _write(models / f"{MODEL}.gguf")
    size = (models / f"{MODEL}.gguf").stat().st_size
    out.print(f"a model of {bytes_text(size)}, and three nodes that may use {bytes_text(LIMIT)} each\n")
    nodes: list[_Node] = []
    try:
        for name in NODES:
            nodes.append(await _start(folder, llama, name, models, [node.peer for node in nodes]))
        await _wait_for_nodes(nodes)
        await _show(nodes, out)
        if keep:
            out.print("\nThe nodes run until Ctrl-C: " + "  ".join(node.url for node in nodes))
            await asyncio.Event().wait()
    except (ClientError, TimeoutError) as error:
        print(f"sollold: {error}", file=sys.stderr)
        for node in nodes:
            log = (folder / node.name / "log").read_text(errors="replace")
            print(f"--- last lines of {node.name}'s log\n{log[-1500:]}", file=sys.stderr)
        return Exit.FAILED
    finally:
        await _stop(nodes)
    return Exit.DONE


async def _write(file: Path) -> None:
    """Write the model. On cancellation wait for the writer, since its folder is deleted next."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, file, RECITAL))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(socket.socket()) for _ in range(count)]
        for link in links:
            link.bind(("127.0.0.1", 0))
        return [int(link.getsockname()[1]) for link in links]


async def _start(folder: Path, llama: Llama, name: str, models: Path, seeds: list[int]) -> _Node:
    http, peer = _free_ports(2)
    (folder / name).mkdir()
    values = {
        "node.name": name,
        "node.state_dir": folder / name / "state",
        "node.cache_dir": folder / name / "cache",
        "node.memory_limit": LIMIT,
        "node.reserve": 0,
        "http.host": "127.0.0.1",
        "http.port": http,
        "cluster.host": "127.0.0.1",
        "cluster.port": peer,
        "cluster.mdns": "off",
        "cluster.door": "open",
        "cluster.seeds": ",".join(f"127.0.0.1:{seed}" for seed in seeds),
        # Only the first node has the file; the others receive their layers from it.
        "models.folders": models if not seeds else "",
        "models.huggingface": "off",
        "ollama.enabled": "off",
        "llama.server": llama.server,
        "llama.rpc_server": llama.worker,
        # The three share this machine's cores, and engines busy-wait for each other.
        "llama.threads": 1,
    }
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    # This process knows from its own start where the libraries are.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (folder / name / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sollold", "run", "--config", os.devnull, *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
        )  # fmt: skip
    return _Node(name, http, peer, process)


async def _ready_nodes(client: Client) -> int:
    """Number of nodes with llama.cpp that this node sees; 0 while it does not respond."""
    try:
        nodes = (await client.get("/api/cluster"))["nodes"]
    except ClientError:
        return 0
    return len([node for node in nodes if node["build"]])


async def _wait_for_nodes(nodes: list[_Node]) -> None:
    """Wait until every node sees all others with llama.cpp ready."""
    deadline = time.monotonic() + SLOWEST
    for node in nodes:
        async with Client(node.url) as client:
            while True:
                if await _ready_nodes(client) == len(nodes):
                    break
                if node.process.returncode is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"{node.name} did not find the other nodes")
                await asyncio.sleep(0.1)


async def _show(nodes: list[_Node], out: Any) -> None:
    first = nodes[0]
    async with Client(first.url) as client:
        body = {"model": MODEL, "context": CONTEXT, "slots": 1}
        await client.post("/api/cluster/load", body, timeout=SLOWEST)
        deadline = time.monotonic() + SLOWEST
        while not _known_everywhere(state := await client.get("/api/cluster")):
            if time.monotonic() > deadline:
                raise TimeoutError("the nodes do not report their granted memory")
            await asyncio.sleep(0.1)
    out.print(node_table(state))
    out.print()
    out.print(deployment_table(state))
    question = {"role": "user", "content": "Who are you?"}
    for node in nodes:
        async with Client(node.url) as client:
            body = {"model": MODEL, "messages": [question], "stream": False}
            answer = await client.post("/api/chat", body, timeout=SLOWEST)
        speed = answer["eval_count"] / (answer["eval_duration"] / 1e9)
        out.print(f"\n{node.name} ({node.url}), {speed:.0f} tokens/s:", style="bold")
        out.print(answer["message"]["content"])


def _known_everywhere(state: dict[str, Any]) -> bool:
    """Whether all nodes know of the load, which gossip spreads shortly after it."""
    ready = [d for d in state["deployments"] if d["state"] == "ready"]
    holders = {share["node"] for d in ready for share in d["placed"]}
    granted = {node["node"] for node in state["nodes"] if node["granted"]}
    return bool(ready) and holders <= granted


async def _stop(nodes: list[_Node]) -> None:
    for node in nodes:
        if node.process.returncode is None:
            node.process.send_signal(signal.SIGTERM)
    for node in nodes:
        try:
            async with asyncio.timeout(20):
                await node.process.wait()
        except TimeoutError:
            node.process.kill()
            await node.process.wait()
