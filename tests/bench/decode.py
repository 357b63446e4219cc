"""Decode speed of a sharded model through a node, against the same engines started by hand without us.

By hand: the very command lines of the deployment's workers and llama-server, but the workers listen on the
machines' own addresses and llama-server calls them there in the clear. Pairs in turn, in one run.

All nodes share this machine, where each would have one of its own, whose processor is idle while another
computes its layers. So the engines of both sides get half of its cores and leave the rest to what runs
beside them; ``--threads`` gives them others.

And how fast the plan says that the model answers, once one answer has been seen, against how fast it does.
Exits 1 when that is off by more than a quarter.

    python -m tests.bench.decode [--pairs 8] [--tokens 64] [--bytes 0.8e9] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sollold.agent.llama_find import find
from sollold.config import LlamaSettings, NodeSettings
from sollold.places import places
from tests import netns
from tests.daemons import Cluster, Node, until
from tests.gguf import writer
from tests.gguf.size import Size

MODEL = "bench"
ERROR = 0.25
PROMPT = {"role": "user", "content": "Tell me a story about a lighthouse."}


def command_line(node: Node, program: str) -> list[str]:
    """The command line of this node's engine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")[:-1]
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if words and program in words[0] and node.process and parent == node.process.pid:
                    return words
    return []


def with_option(words: list[str], name: str, value: str) -> list[str]:
    """The same command line with another value of one option."""
    at = words.index(name)
    return [*words[: at + 1], value, *words[at + 2 :]]


@contextlib.contextmanager
def by_hand(cluster: Cluster) -> Iterator[tuple[Node, int]]:
    """The same engines again, without the daemons between them; (the head's node, its HTTP port)."""
    workers: dict[str, list[str]] = {}
    head, server = cluster[0], []
    for node in cluster:
        if words := command_line(node, "llama-server"):
            head, server = node, words
        if words := command_line(node, "rpc-server"):
            workers[node.address] = words
    children = []
    addresses = []
    try:
        # Device order is what the placement says: the holders in layer order.
        (deployment,) = cluster.deployments()
        names = {node.state()["me"]: node for node in cluster}
        order = [names[share["node"]] for share in deployment["placed"] if names[share["node"]] is not head]
        for node in order:
            assert node.machine is not None
            words = with_option(with_option(workers[node.address], "-H", "0.0.0.0"), "-p", "60052")
            words = [word for word in words if word != "-c"]
            children.append(node.machine.popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            addresses.append(f"{node.address}:60052")
        time.sleep(1.0)
        server = with_option(with_option(server, "--rpc", ",".join(addresses)), "--port", "61080")
        assert head.machine is not None
        children.append(
            head.machine.popen(
                server, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

        def healthy() -> bool:
            try:
                with head.machine.inside():  # type: ignore[union-attr]
                    link = http.client.HTTPConnection("127.0.0.1", 61080, timeout=3)
                    link.connect()
                link.request("GET", "/health")
                return link.getresponse().status == 200
            except OSError:
                return False

        until(healthy, "the engines by hand are ready", 300, 0.5)
        yield head, 61080
    finally:
        for child in children:
            child.kill()
            child.wait()


def speed(node: Node, port: int, tokens: int) -> float:
    """Tokens per second between the first and the last event of a stream."""
    body: dict[str, Any] = {"model": MODEL, "messages": [PROMPT], "stream": True, "max_tokens": tokens}
    body |= {"temperature": 0, "seed": 1, "ignore_eos": True, "cache_prompt": False}
    with node.network():
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        link.connect()
    with contextlib.closing(link):
        headers = {"Content-Type": "application/json"}
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        events = (line for line in link.getresponse() if line.startswith(b"data: {"))
        times = [time.perf_counter() for event in events if b'"content":' in event]
    return (len(times) - 1) / (times[-1] - times[0])


def predicted(node: Node) -> float:
    """Tokens per second that a plan for the model says now."""
    reply = node.ask("POST", "/api/cluster/plan", {"model": MODEL})
    assert reply.status == 200, reply.body
    return float(reply.json["plan"]["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bytes", type=float, default=0.8e9)
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="of each engine"
    )
    options = parser.parse_args()
    if reason := netns.available():
        print(f"skipped: {reason}")
        return
    llama, _ = find(LlamaSettings(), places(NodeSettings()).cache)
    if llama is None:
        raise SystemExit("no llama.cpp: run `sollold setup`")
    with tempfile.TemporaryDirectory() as folder:
        size = writer.sized(
            "llama", options.bytes, Size(layers=16, embd=1024, heads=16, heads_kv=4, vocab=4096)
        )
        settings = {"placement.context": 1024, "placement.slots": 1, "placement.keep_alive": -1}
        settings["llama.threads"] = options.threads
        memory = f"{int(options.bytes / 2e6)} MB"
        with Cluster(3, Path(folder), llama, memory=memory, settings=settings) as cluster:
            writer.write(cluster[0].models / f"{MODEL}.gguf", "llama", size)
            cluster.together()
            until(lambda: MODEL in cluster[0].ask("GET", "/api/tags").body.decode(), "the model is listed")
            loaded = cluster[0].ask("POST", "/api/cluster/load", {"model": MODEL}, timeout=300)
            assert loaded.status == 200, loaded.body
            with by_hand(cluster) as (head, port):
                asked = next(node for node in cluster if node is not head)
                blind = predicted(asked)
                speed(asked, asked.http, max(options.tokens, 24)), speed(head, port, 8)
                told = until(lambda: (now := predicted(asked)) != blind and now, "an answer was seen", 60)
                pairs = []
                for turn in range(options.pairs):
                    # Each goes first half of the times: what comes second may find the machine warmer.
                    sides = {asked: asked.http, head: port}
                    order = reversed(sides) if turn % 2 else iter(sides)
                    speeds = {node: speed(node, sides[node], options.tokens) for node in order}
                    pairs.append((speeds[asked], speeds[head]))
            (deployment,) = cluster.deployments()
    layers = "+".join(str(share["last"] - share["first"]) for share in deployment["placed"])
    through, direct = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{'layers':>10} {'through a node':>15} {'by hand':>10} {'ratio':>6}")
    print("pairs: " + ", ".join(f"{a:.1f}/{b:.1f}" for a, b in pairs))
    print(f"{layers:>10} {through:>11.2f} t/s {direct:>6.2f} t/s {ratio:>6.3f}   (at least 0.97 wanted)")
    print(
        f"predicted before any answer {blind:.2f} t/s, after one {told:.2f} t/s; measured {through:.2f} t/s"
    )
    error = told / through - 1
    print(f"the prediction is off by {error:+.0%}   (at most 25 % wanted)")
    if abs(error) > ERROR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
