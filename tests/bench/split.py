"""The planned split compared with llama.cpp's default: `python -m tests.bench.split`.

Three real daemons in network namespaces, none of which can hold the model alone; one has a third of a core.
The daemons measure the speed of each machine at the start and from one answer. llama.cpp's default is to
split by memory, which is the same for all (policy ``spread``). One run measures the tokens per second of both
splits and shows the predictions. Exits with 1 if the planned split is not faster.

    python -m tests.bench.split [--rounds 3] [--tokens 32] [--bytes 0.4e9]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests import netns
from tests.bench.slowed import slowed
from tests.daemons import Cluster, Node, until
from tests.found_llama import required_llama
from tests.gguf import writer
from tests.gguf.size import Size

MODEL = "bench"
SLOW = 2
"""Index of the slowed node. Node 0 is the head."""
SHARE = 1 / 3
PAIRS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A split: layers of each node, predicted and measured tokens per second."""

    layers: tuple[int, ...]
    predicted: float
    speed: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bytes", type=float, default=0.4e9)
    options = parser.parse_args()
    if reason := netns.available():
        print(f"skipped: {reason}")
        return
    llama = required_llama()
    with tempfile.TemporaryDirectory() as folder:
        size = writer.sized(
            "llama", options.bytes, Size(layers=24, embd=1024, heads=16, heads_kv=4, vocab=4096)
        )
        settings = {"placement.context": 1024, "placement.slots": 1, "placement.keep_alive": -1}
        memory = f"{int(options.bytes / 1.6e6)} MB"
        cluster = Cluster(3, Path(folder), llama, memory=memory, settings=settings, start=False)
        with cluster, contextlib.ExitStack() as stack:
            writer.write(cluster[0].models / f"{MODEL}.gguf", "llama", size)
            for index, node in enumerate(cluster):
                # Sequentially, since each measures its speed and they share this machine's cores.
                node.start()
                assert node.process is not None
                if index == SLOW:
                    means = stack.enter_context(slowed(node.process.pid, SHARE))
                    print(f"{node.name} has {SHARE:.2f} of a core (by {means})")
                until(partial(bandwidth, node), f"{node.name} has measured itself", 180)
            cluster.together(timeout=180)
            rates = ", ".join(f"{node.name} {bandwidth(node) / 1e9:.1f} GB/s" for node in cluster)
            print(f"measured memory bandwidth: {rates}")
            until(lambda: MODEL in cluster[0].ask("GET", "/api/tags").body.decode(), "it is listed")
            # Alternating, so that other load on this machine affects both.
            pairs = [
                (
                    measured(cluster, "spread", options.rounds, options.tokens),
                    measured(cluster, "fastest", options.rounds, options.tokens),
                )
                for _ in range(PAIRS)
            ]
    defaults, choices = zip(*pairs, strict=True)
    gain = statistics.median(chosen.speed / default.speed for default, chosen in pairs)
    print(f"{'split':<9} {'layers':>10} {'predicted':>11} {'measured':>10}")
    for name, found in (("default", defaults), ("chosen", choices)):
        for split in found:
            counts = "+".join(map(str, split.layers))
            print(f"{name:<9} {counts:>10} {split.predicted:>7.2f} t/s {split.speed:>6.2f} t/s")
    print(f"the chosen split is {gain:.2f} times as fast as the default one")
    if gain <= 1:
        raise SystemExit(1)


def measured(cluster: Cluster, policy: str, rounds: int, tokens: int) -> Measured:
    """Load the model with a policy, let the daemons measure one answer, and measure the speed."""
    head = cluster[0]
    request = {"model": MODEL, "policy": policy}
    loaded = head.ask("POST", "/api/cluster/load", request, timeout=300)
    assert loaded.status == 200, loaded.body
    answer_speed(head, tokens)
    (deployment,) = cluster.deployments()
    # Wait for the leader, so that the next plan uses the measured speed of the devices.
    until(lambda: cluster.deployments()[0]["speed"] > 0, "the daemons have measured it")
    speed = statistics.median(answer_speed(head, tokens) for _ in range(rounds))
    reply = head.ask("POST", "/api/cluster/plan", request)
    unloaded = head.ask("POST", "/api/cluster/unload", {"model": MODEL, "force": True})
    assert unloaded.status == 200, unloaded.body
    names = {node.state()["me"]: index for index, node in enumerate(cluster)}
    layers = [0] * len(cluster)
    for share in deployment["placed"]:
        layers[names[share["node"]]] += share["last"] - share["first"]
    return Measured(tuple(layers), float(reply.json["plan"]["tokens_per_second"]), speed)


def bandwidth(node: Node) -> float:
    """Return the CPU memory bandwidth that the node reports in bytes per second, or 0.0."""
    state = node.state()
    for record in state.get("nodes", []):
        if record["node"] == state["me"]:
            return float(next((d["bandwidth"] for d in record["devices"] if d["kind"] == "cpu"), 0.0))
    return 0.0


def answer_speed(node: Node, tokens: int) -> float:
    """Request an answer and return the engine's tokens per second."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}]}
    body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    reply = node.ask("POST", "/v1/chat/completions", body, timeout=300)
    assert reply.status == 200, reply.body
    return float(reply.json["timings"]["predicted_per_second"])


if __name__ == "__main__":
    main()
