"""Decode speed with and without speculative decoding: `python -m tests.bench.speculation`.

A model is split over two workers at a given distance in milliseconds, and runs with the command line of the
plan, once with speculation and once without. Both have their own workers and the same delays. Random weights
would accept no drafts, so ``--spec-synth-len`` tells llama-server how many tokens a round gives. Drafts come
from a draft model or from the model's own layer, with the last layers on the head or on the second worker.
The model is small, since the CPU time of larger batches would hide the round trips, which are most of a
token's time on GPUs. N-gram drafts are measured for a model that repeats its prompt, for one that repeats
nothing, and for a real one if available, for which ``auto`` would not draft because batches are too expensive
on a CPU. Exits with 1 if a goal is missed.

    python -m tests.bench.speculation [--pairs 12] [--tokens 48] [--only TEXT]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from _pytest.outcomes import Skipped

from sollold.cluster.gossip.record import MTP
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.command_line import WorkerAddress, command_line, worker_nodes
from sollold.machine.device import Kind
from sollold.machine.speed import Speed, speed
from sollold.models.footprint.footprint import footprint
from sollold.models.footprint.read_shape import shape_of
from sollold.models.gguf import reader
from sollold.models.gguf.demo_model import Recital, counting, write
from sollold.models.model import Model
from sollold.placement.inventory import DeviceCapacity, Fleet, Link, Machine
from sollold.placement.plan import Plan
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest
from sollold.placement.speculation import Drafter, with_drafts
from sollold.placement.speculation_gain import DraftStats
from sollold.settings.schema import GIB
from tests.bench.slow_link import slow_link
from tests.doubles import free_port
from tests.found_llama import required_llama
from tests.gguf import writer
from tests.gguf.llama_run import workers
from tests.gguf.size import Size
from tests.real_model import gemma

SYNTHETIC = 3
"""Mean number of tokens per round."""
STATS = DraftStats(1.0, 1 - 1 / SYNTHETIC)
"""Statistics with which rounds of unlimited drafts give `SYNTHETIC` tokens."""
CODE = "".join(
    f"def area_of_{name}(width: float, height: float) -> float:\n"
    f'    """Area of a {name}, in square metres."""\n'
    "    if width < 0 or height < 0:\n"
    '        raise ValueError("a length is never negative")\n'
    "    return width * height\n\n\n"
    for name in ("square", "table", "window", "door", "garden")
)
STORY = "The old lighthouse keeper looked at the sea. He remembered the winter when"


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. ``plain`` and ``drafting`` are the plans without and with speculation."""

    name: str
    model: Path
    plain: Plan
    drafting: Plan
    prompt: str
    goal: float
    round_trip: float
    draft: Path | None = None
    extra: tuple[str, ...] = ()


def plans(
    here: Speed,
    model: Path,
    round_trip: float,
    speculation: str,
    draft: Path | None = None,
    nodes: str = "bc",
) -> tuple[Plan, Plan]:
    """Return the plans without and with speculation for a model on two machines at a distance.

    ``here``: the speed of the machines. ``nodes``: the machines; "a" is the head.
    """
    shape = shape_of(reader.read(model))
    links = tuple((name, Link(round_trip, 110e6)) for name in "bc")
    fleet = Fleet(
        tuple(
            Machine(
                name,
                name,
                (
                    DeviceCapacity(
                        name, "CPU", Kind.CPU, 8 * GIB, bandwidth=here.bandwidth, compute=here.compute
                    ),
                ),
                holds=name == "a",
                links=links if name == "a" else (),
            )
            for name in "abc"
        )
    )
    count = len(shape.layers) + 1
    request = PlacementRequest(
        "bench:latest",
        "d1",
        parameters=shape.parameters,
        context=2048,
        slots=1,
        fixed=((nodes[0], count // 2), (nodes[1], count - count // 2)),
        speculation=speculation,
    )
    footprint_of = partial(footprint, shape)
    found = choose(request, fleet, footprint_of).candidate
    assert found is not None
    drafters = []
    if draft is not None:
        drafters.append(Drafter("small:latest", "d2", shape_of(reader.read(draft)), frozenset("a")))
    made, _ = with_drafts(
        found,
        request,
        fleet,
        footprint_of,
        drafters,
        lambda drafter: STATS if drafter in ("d2", MTP) else None,
    )
    return found.plan(request, count - 1, ()), made.plan(request, count - 1, ())


class Server:
    """A running llama-server."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self._key = port, key

    def ask(self, prompt: str, tokens: int) -> dict[str, float]:
        """Request an answer and return its timings."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion",
            json.dumps(body | {"cache_prompt": False}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return dict(json.load(answer)["timings"])


@contextlib.contextmanager
def server(case: Case, plan: Plan, llama: Llama, folder: Path) -> Iterator[Server]:
    """Run llama-server by ``plan`` with workers at the distance of ``case``."""
    port = free_port()
    key = folder / f"key{port}"
    key.write_text("bench")
    models = [
        Model("m", "d", "folder", (str(path),), 1, 0.0) if path is not None else None
        for path in (case.model, case.draft)
    ]
    with contextlib.ExitStack() as stack:
        ready = stack.enter_context(workers(2))
        ports = [int(endpoint.partition(":")[2]) for endpoint in ready.endpoints]
        reach = [
            WorkerAddress(
                node,
                worker_port
                if node == plan.head
                else stack.enter_context(slow_link(worker_port, case.round_trip)),
                ("CPU",),
            )
            for node, worker_port in zip(worker_nodes(plan), ports, strict=True)
        ]
        assert models[0] is not None
        words = command_line(
            plan, models[0], llama, reach, port=port, key_file=key, threads=1, draft=models[1],
            extra=case.extra if plan.drafts_by else (),
        )  # fmt: skip
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _until_healthy(process, port)
            yield Server(port, "bench")
        finally:
            process.kill()
            process.wait()


def _until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=3) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.1)
    raise SystemExit("llama-server did not become ready")


def measured(case: Case, llama: Llama, folder: Path, pairs: int, tokens: int) -> float:
    """Measure a case, print a row and return the median ratio."""
    rows: list[tuple[float, float]] = []
    drafted = accepted = 0.0
    with (
        server(case, case.plain, llama, folder) as plain,
        server(case, case.drafting, llama, folder) as fast,
    ):
        for running in (plain, fast):
            running.ask(case.prompt, 16)
        for turn in range(pairs):
            order = (plain, fast) if turn % 2 else (fast, plain)
            timings = {target.port: target.ask(case.prompt, tokens) for target in order}
            rows.append(
                (timings[plain.port]["predicted_per_second"], timings[fast.port]["predicted_per_second"])
            )
            drafted += timings[fast.port].get("draft_n", 0)
            accepted += timings[fast.port].get("draft_n_accepted", 0)
    ratio = statistics.median(fast / plain for plain, fast in rows)
    without, with_ = (statistics.median(side) for side in zip(*rows, strict=True))
    share = f"{accepted / drafted:.0%} of {drafted:.0f}" if drafted else "none drafted"
    predicted = case.drafting.tokens_per_second / case.plain.tokens_per_second
    print(
        f"{case.name:<34} {case.round_trip * 1000:>4.1f} ms {without:>8.1f} {with_:>8.1f} {ratio:>6.2f}"
        f" {case.goal:>6.2f} {predicted:>9.2f}   {share}",
        flush=True,
    )
    return ratio


def cases(folder: Path, here: Speed) -> Iterator[Case]:
    """Yield all cases, writing their models when needed."""
    size = Size(layers=8, embd=256, heads=4, heads_kv=2, vocab=2048)
    model = writer.write(folder / "model.gguf", "llama", size)
    draft = writer.write(folder / "draft.gguf", "llama", replace(size, layers=1, embd=128, ff=128), seed=2)
    synthetic = ("--spec-synth-len", str(SYNTHETIC))
    for trip, goal in ((0.001, 1.5), (0.005, 2.0)):
        plain, drafting = plans(here, model, trip, "small", draft)
        name = f"draft model, {drafting.run.drafts} tokens"
        yield Case(name, model, plain, drafting, "A story", goal, trip, draft, synthetic)
    ahead = writer.write(folder / "ahead.gguf", "glm4moe", replace(size, layers=9, nextn=1, ff_expert=64))
    for trip, nodes, goal in ((0.001, "ba", 0.97), (0.005, "ba", 1.3), (0.005, "bc", 0.0)):
        plain, drafting = plans(here, ahead, trip, MTP, nodes=nodes)
        where = "on the head" if nodes == "ba" else "far away"
        name = f"own layer {where}, {drafting.run.drafts} tokens"
        yield Case(name, ahead, plain, drafting, "A story", goal, trip, extra=synthetic)
    words = counting(900)
    recital = folder / "recital.gguf"
    write(recital, Recital(words, layers=8))
    plain, drafting = plans(here, recital, 0.001, "ngram")
    name = f"n-grams, {drafting.run.drafts}, a copy of the prompt"
    yield Case(name, recital, plain, drafting, "".join(words[:400]) + "<|end|>", 1.3, 0.001)
    yield Case("n-grams, nothing repeated", recital, plain, drafting, "<|end|>", 0.97, 0.001)
    try:
        real = gemma()
    except Skipped as why:
        print(why)
        return
    plain, drafting = plans(here, real, 0.001, "ngram")
    edit = CODE + CODE[: CODE.index("def area_of_window")]
    yield Case("n-grams, gemma3-270m, code", real, plain, drafting, edit, 0.0, 0.001)
    yield Case("n-grams, gemma3-270m, a story", real, plain, drafting, STORY, 0.0, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", default="", help="run only cases with this text in their names")
    options = parser.parse_args()
    llama = required_llama()
    titles: Sequence[str] = ("trip", "without", "with", "ratio", "goal", "predicted")
    print(
        f"{'':<34} {titles[0]:>7} {titles[1]:>8} {titles[2]:>8} {titles[3]:>6} {titles[4]:>6} {titles[5]:>9}"
    )
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        for case in cases(Path(name), speed(Path(name) / "speed.json")):
            if options.only in case.name:
                ratio = measured(case, llama, Path(name), options.pairs, options.tokens)
                missed += ratio < case.goal
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
