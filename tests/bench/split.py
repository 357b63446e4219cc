"""The chosen split against llama.cpp's own, one worker slowed to a third: `python -m tests.bench.split`.

Three workers of the real llama.cpp, one of them stopped two thirds of the time. The planner knows the
speeds and picks the cut points; llama.cpp's default splits by memory, of which all have the same. Tokens
per second of both, and what was predicted for them, in one run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sollold.agent.command_line import Reach, command_line
from sollold.agent.llama_find import Llama, find
from sollold.config import MIB, LlamaSettings
from sollold.machine.device import Kind
from sollold.models.footprint import footprint
from sollold.models.gguf import read
from sollold.models.model import Model
from sollold.models.shape import shape_of
from sollold.placement.fleet import Fleet, Link, Machine, Spot
from sollold.placement.plan import Plan
from sollold.placement.planner import choose
from sollold.placement.wish import Policy, Wish
from tests.gguf import writer
from tests.gguf.size import Size

TOKENS = 48
ROUNDS = 3
PERIOD = 0.03
SPEED = 6e9
"""Bytes per second that one thread reads weights with, about: only the ratio of the workers matters."""
NODES = ("one", "two", "slow")


def main() -> None:
    llama, why = find(LlamaSettings(), Path.home() / ".cache" / "sollold")
    if llama is None:
        sys.exit(f"no llama.cpp: {'; '.join(why)}")
    with tempfile.TemporaryDirectory() as folder:
        size = writer.sized("llama", 0.4e9, Size(layers=24, embd=1024, heads=16, heads_kv=4, vocab=4096))
        path = writer.write(Path(folder) / "model.gguf", "llama", size)
        shape = shape_of(read(path))
        wish = Wish("bench", "bench", usual=1024, slots=1, always=True)
        whole = sum(layer.weights for layer in shape.layers)
        room = int(whole * 0.5) + 64 * MIB
        spots = [Spot(n, "CPU", Kind.CPU, room, bandwidth=SPEED / (3 if n == "slow" else 1)) for n in NODES]
        head = Spot("head", "CPU", Kind.CPU, 2048 * MIB, bandwidth=SPEED / 20)
        links = tuple((name, Link(0.0002, 1e9)) for name in NODES)
        machines = (
            Machine("head", "head", (head,), True, links),
            *(Machine(s.node, s.node, (s,)) for s in spots),
        )
        print(f"{'split':<12} {'layers (the slow one last)':<28} {'tokens/s':>9} {'predicted ratio':>16}")
        found: dict[str, tuple[float, float]] = {}
        for policy in (Policy.SPREAD, Policy.FASTEST):
            # By memory as llama.cpp does it: over the workers alone, in proportion to their room.
            allowed = tuple((name, "CPU") for name in NODES)
            choice = choose(
                replace(wish, policy=policy, devices=allowed),
                Fleet(machines),
                lambda run: footprint(shape, run),
            )
            if choice.draft is None:
                sys.exit("the model does not fit")
            plan = choice.draft.plan(wish, len(shape.layers), ())
            speed = measured(llama, path, plan)
            counts = {share.node: share.layers for share in plan.shares}
            found[policy.value] = speed, plan.tokens_per_second
            base = found[Policy.SPREAD.value][1]
            print(
                f"{policy.value:<12} {', '.join(f'{n} {counts.get(n, 0)}' for n in NODES):<28} "
                f"{speed:>9.2f} {plan.tokens_per_second / base:>16.2f}"
            )
        gain = found["fastest"][0] / found["spread"][0]
        print(f"the chosen split is {gain:.2f} times as fast as the default one")


def measured(llama: Llama, path: Path, plan: Plan) -> float:
    """Tokens per second of a plan, the median of some rounds."""
    model = Model("bench", "bench", "folder", (str(path),), 0, 0.0)
    with contextlib.ExitStack() as stack:
        reach = []
        for node in dict.fromkeys(share.node for share in plan.shares):
            port = free_port()
            worker = stack.enter_context(running([llama.worker, "-H", "127.0.0.1", "-p", port, "-t", 1]))
            if node == "slow":
                stack.enter_context(slowed(worker.pid))
            reach.append(Reach(node, port, ("CPU",)))
            until_listening(port)
        port = free_port()
        line = command_line(plan, model, llama, reach, port=port, threads=1)
        stack.enter_context(running(line))
        until_healthy(port)
        speeds = sorted(one_answer(port) for _ in range(ROUNDS))
        return speeds[len(speeds) // 2]


@contextlib.contextmanager
def running(line: list[object]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [str(word) for word in line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        restore_signals=False,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process runs a third of the time."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(PERIOD / 3):
            os.kill(pid, signal.SIGSTOP)
            end.wait(PERIOD * 2 / 3)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])


def until_listening(port: int) -> None:
    """By the kernel's table: to connect would be to be the worker's only client."""
    wanted = f":{port:04X} "
    for _ in range(400):
        table = Path("/proc/net/tcp").read_text().splitlines()
        if any(wanted in row[:40] and " 0A " in row for row in table):
            return
        time.sleep(0.05)
    raise TimeoutError("the worker does not listen")


def until_healthy(port: int) -> None:
    for _ in range(1200):
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("llama-server is not ready")


def one_answer(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": "a b c", "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    connection.request("POST", "/completion", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    return float(answer["timings"]["predicted_per_second"])


if __name__ == "__main__":
    main()
