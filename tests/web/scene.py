"""A fictitious cluster for the dashboard: five machines, three models, requests, an hour of history."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from sollold.api.http.services import AppServices
from sollold.cluster.gossip.record import Backend, Endpoint, Placed, Record, State
from sollold.control.activity import FinishedRequest
from sollold.control.doctor import examine
from sollold.control.finding import Facts
from sollold.control.keys import Keys
from sollold.errors import Fault, Refusal
from sollold.machine.device import Device, Kind
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.serving.request import Answer, Ask, Waiting
from sollold.settings.schema import GIB
from tests.api.api_parts import (
    PlainCluster,
    PlainLibrary,
    chunk,
    model,
    monitor_of,
    parts,
    routing,
    singly,
    usage_chunk,
)
from tests.models.fakes import FakeCalls

NODES = {name: f"{place:016x}" for place, name in enumerate(("anna", "bert", "cleo", "dora", "emil"))}


def device(id_: str, total: float, granted: float, other: float, name: str = "") -> Device:
    """Return a device. Sizes are in GiB."""
    kind = Kind.CPU if id_ == "CPU" else Kind.GPU
    size, set_aside, used = int(total * GIB), int(granted * GIB), int((granted + other) * GIB)
    return Device(id_, kind, name or "AMD Ryzen 9", size, size - used, size, set_aside, size - used)


def share(name: str, device_id: str, first: int, last: int, gib: float) -> Placed:
    return Placed(NODES[name], device_id, first, last, int(gib * GIB))


def machine(name: str, *devices: Device, **changes: Any) -> Record:
    place = list(NODES).index(name) + 11
    facts: dict[str, Any] = {
        "node": NODES[name],
        "name": name,
        "version": 1,
        "addresses": (f"192.168.1.{place}",),
        "http_port": 11435,
        "peer_port": 11436,
        "release": "0.1.0",
        "build": "b11434",
        "open": False,
        "devices": devices,
    }
    return Record(**{**facts, **changes})


LLAMA = Endpoint(
    "llama-70b-1",
    "llama3.3:70b",
    "a" * 64,
    Backend.SHARDED,
    State.READY,
    context=16384,
    slots=2,
    active=2,
    waiting=1,
    speed=14.2,
    bytes=int(45.3 * GIB),
    layers=80,
    expires=300.0,
    placed=(
        share("anna", "CUDA0", 0, 36, 20.1),
        share("bert", "CUDA0", 36, 64, 15.8),
        share("cleo", "CPU", 64, 81, 9.4),
    ),
)
QWEN = Endpoint(
    "qwen-1",
    "qwen2.5-coder:14b",
    "b" * 64,
    Backend.LOCAL,
    State.READY,
    context=32768,
    slots=4,
    speed=31.5,
    bytes=int(9.8 * GIB),
    layers=48,
    pinned=True,
    expires=-1.0,
    placed=(share("dora", "CUDA0", 0, 49, 9.8),),
)
GEMMA = Endpoint(
    "gemma-1",
    "hf.co/unsloth/gemma-3-27b-it-GGUF:Q4_K_M",
    "c" * 64,
    Backend.SHARDED,
    State.LOADING,
    progress=0.43,
    bytes=int(17.5 * GIB),
    layers=62,
    placed=(share("dora", "CUDA0", 0, 20, 5.6), share("emil", "Vulkan0", 20, 63, 11.9)),
)


def machines() -> tuple[Record, ...]:
    return (
        machine(
            "anna",
            device("CUDA0", 24, 20.1, 1.2, "NVIDIA RTX 4090"),
            device("CPU", 64, 0.6, 11),
            endpoints=(LLAMA,),
            links=(
                (NODES["bert"], 0.00042, 1.18e8),
                (NODES["dora"], 0.00051, 1.1e8),
                (NODES["cleo"], 0.0013, 9e7),
            ),
        ),
        machine(
            "bert",
            device("CUDA0", 24, 15.8, 0.8, "NVIDIA RTX 3090"),
            device("CPU", 32, 0, 6),
            links=((NODES["cleo"], 0.00061, 1.1e8),),
        ),
        machine("cleo", device("CPU", 32, 9.4, 5.5)),
        machine(
            "dora",
            device("CUDA0", 24, 15.4, 0.7, "NVIDIA RTX 4090"),
            device("CPU", 64, 0.3, 9),
            endpoints=(QWEN, GEMMA),
            links=((NODES["emil"], 0.00048, 1.2e8),),
        ),
        machine("emil", device("Vulkan0", 16, 11.9, 0.5, "AMD Radeon RX 7800 XT"), device("CPU", 32, 0, 8)),
    )


def library() -> PlainLibrary:
    able = ("completion", "tools")
    facts: list[tuple[Model, tuple[str, ...]]] = [
        (model("llama3.3:70b", size=int(42.5 * GIB), quantization="Q4_K_M", parameters=70_600_000_000,
               layers=80, context_train=131072, capabilities=able), ("anna", "bert")),
        (model("qwen2.5-coder:14b", size=9 * GIB, architecture="qwen2", parameters=14_800_000_000, layers=48,
               context_train=32768, capabilities=(*able, "insert")), ("dora",)),
        (model("hf.co/unsloth/gemma-3-27b-it-GGUF:Q4_K_M", size=int(16.5 * GIB), architecture="gemma3",
               parameters=27_000_000_000, layers=62, capabilities=("completion", "vision")),
         ("dora", "emil")),
        (model("nomic-embed-text:latest", size=274 * 1024**2, architecture="nomic-bert", quantization="F16",
               parameters=137_000_000, layers=12, capabilities=("embedding",)), ("cleo",)),
        (model("demo:latest", size=GIB // 2, parameters=600_000_000), ("anna",)),
    ]  # fmt: skip
    found = PlainLibrary(*(model for model, _ in facts))
    found.all = {model.name: Listed(model, nodes) for model, nodes in facts}
    return found


PLAN: dict[str, Any] = {
    "ok": True,
    "message": "No machine holds it alone; three hold it together.",
    "plan": {
        "model": "llama3.3:70b", "digest": "a" * 64, "head": NODES["anna"], "layers": 80,
        "run": {"context": 32768, "slots": 2},
        "host": {"node": NODES["anna"], "device": "CPU", "first": 0, "last": 0, "weights": 600 * 2**20,
                 "state": 0, "compute": 60 * 2**20, "overhead": 24 * 2**20},
        "shares": [
            {"node": NODES["anna"], "device": "CUDA0", "first": 0, "last": 36, "weights": int(18.4 * GIB),
             "state": int(1.1 * GIB), "compute": 300 * 2**20, "overhead": 512 * 2**20},
            {"node": NODES["bert"], "device": "CUDA0", "first": 36, "last": 64, "weights": int(14.2 * GIB),
             "state": int(0.9 * GIB), "compute": 300 * 2**20, "overhead": 512 * 2**20},
            {"node": NODES["cleo"], "device": "CPU", "first": 64, "last": 81, "weights": int(8.6 * GIB),
             "state": int(0.5 * GIB), "compute": 200 * 2**20, "overhead": 24 * 2**20},
        ],
        "tokens_per_second": 14.6, "load_seconds": 38.0,
        "reasons": ["anna and bert read their memory fastest.", "cleo takes what the two GPUs do not hold."],
    },
    "evicts": [], "prompt_tokens_per_second": 310.0, "context": 16384,
    "weights": int(41.8 * GIB), "state": int(2.5 * GIB), "compute": 860 * 2**20, "overhead": 1072 * 2**20,
    "free": [{"node": NODES["anna"], "name": "anna", "device": "CUDA0", "total": 24 * GIB,
              "before": int(22.8 * GIB), "after": int(2.7 * GIB)}],
    "options": [{"what": "all five machines", "tokens_per_second": 9.1, "reason": "more network steps"}],
    "missing": None, "estimate": False,
}  # fmt: skip

ANSWER = """Here is a **short** answer with `code`:

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"
```

1. It runs over *three* machines.
2. A lost machine only makes it pause.

| machine | layers |
| --- | --- |
| anna | 0–35 |
| bert | 36–63 |

<b>HTML stays text</b>, and [a script](javascript:alert(1)) is no link."""


class TalkingService:
    """Streams `ANSWER` word by word; the answer to a question with ``wait`` never ends."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.closed = 0
        self.pause = 0.0

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        self.asks.append(ask)
        call = next(iter(ask.calls.values()))
        last = str(call.body.get("messages", [{}])[-1].get("content", ""))
        if "refuse" in last:
            raise Refusal(Fault.TOO_BIG, "It does not fit: 3 GiB are missing")
        return Answer(
            msgspec.structs.replace(routing(), node="anna"),
            singly(self._play(endless="wait" in last)),
            self._close,
        )

    async def _close(self) -> None:
        self.closed += 1

    async def _play(self, *, endless: bool) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(chunk(reasoning_content="Let me think about it."))
        for word in ANSWER.split(" ") if not endless else ["An", "answer", "that"]:
            yield msgspec.json.encode(chunk(f"{word} "))
            if self.pause:
                await asyncio.sleep(self.pause)
        if endless:
            await asyncio.Event().wait()
        yield msgspec.json.encode(chunk(finish="stop"))
        yield msgspec.json.encode(usage_chunk(12, 96))


class Pulls:
    """Simulates a pull in a few steps."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()

    async def pull(self, name: str, *, insecure: bool = False) -> AsyncIterator[dict[str, Any]]:
        yield {"status": "pulling manifest"}
        yield {"status": "pulling", "digest": "sha256:1", "total": 4 * GIB, "completed": GIB}
        await self.goes_on.wait()
        yield {"status": "success"}


def cluster_of(given: AppServices) -> PlainCluster:
    """The double that is the services' cluster."""
    assert isinstance(given.cluster, PlainCluster)
    return given.cluster


def library_of(given: AppServices) -> PlainLibrary:
    """The double that is the services' library."""
    assert isinstance(given.library, PlainLibrary)
    return given.library


@contextlib.asynccontextmanager
async def services(*records: Record, service: Any = None, still: bool = False) -> AsyncIterator[AppServices]:
    """Yield the services over the fictitious cluster, with a monitor that has an hour of history."""
    cluster = PlainCluster(*(records or machines()))
    cluster.planned = replace(cluster.planned, plan=PLAN, reason="")
    monitor = monitor_of(cluster)
    _fill(monitor)
    folder = tempfile.TemporaryDirectory(prefix="sollold-scene-")
    keys = Keys(cluster, FakeCalls(cluster.me.node, {}), Path(folder.name) / "keys.json")

    async def findings() -> list[Any]:
        facts = Facts(cluster.me, cluster.live(), (), (), "", 100 * GIB, "/var/cache/sollold",
                      offline=monitor.offline())  # fmt: skip
        return examine(facts)

    given = parts(
        service or TalkingService(),
        library=library(),
        cluster=cluster,
        monitor=monitor,
        puller=Pulls(),
        findings=findings,
        keys=keys,
    )
    await monitor.start()
    await keys.start()
    if still and monitor._sampling is not None:
        # The fictitious values must not change.
        monitor._sampling.cancel()
    try:
        yield given
    finally:
        await keys.close()
        await monitor.close()
        folder.cleanup()


def _fill(monitor: Any) -> None:
    chance = random.Random(5)
    activity = monitor.activity
    for second in range(3600):
        wave = max(0.0, math.sin(second / 230) + 0.4 * math.sin(second / 31))
        tokens = 22 * wave * chance.uniform(0.8, 1.1)
        values = {
            ("", "tokens_per_second"): tokens,
            ("", "prompt_tokens_per_second"): tokens * 9,
            ("", "requests_per_second"): float(chance.random() < wave / 5),
            ("", "failed_per_second"): 0.0,
            ("", "active"): float(round(3 * wave)),
            ("", "waiting"): float(max(0, round(3 * wave) - 2)),
            ("", "first_token_seconds"): 0.4 + wave if chance.random() < wave / 5 else math.nan,
        }
        for node_device in monitor._view.me.devices:
            values[node_device.id, "granted_bytes"] = float(node_device.granted)
            values[node_device.id, "used_bytes"] = float(node_device.total - node_device.free)
        values["CUDA0", "utilization"] = min(1.0, 0.1 + 0.5 * wave)
        values["CUDA0", "temperature_celsius"] = 48 + 15 * wave
        monitor.history.add(values)
    for index in range(12):
        failed = index == 4
        activity.add_finished(
            FinishedRequest(
                id=f"{index:04x}",
                time=time.time() - 3000 + index * 240,
                path=("/api/chat", "/v1/chat/completions", "/v1/messages")[index % 3],
                model=("llama3.3:70b", "qwen2.5-coder:14b")[index % 2],
                node=("anna", "dora")[index % 2],
                backend="llama.cpp-distributed",
                outcome="error" if failed else "ok",
                error="the engine ran out of memory" if failed else "",
                prompt_tokens=120 + 37 * index,
                tokens=0 if failed else 80 + 13 * index,
                first_token=-1.0 if failed else 0.31 + index / 40,
                seconds=5.5 + index / 3,
                queue=0.1,
                load=0.0,
                resumed=1 if index == 7 else 0,
            )
        )
