"""How well the pool shares 200 requests over Ollamas of speed 1, 1 and ½: ``python -m tests.bench.pool``.

Three daemons with a stand-in Ollama each; all requests go to the first daemon. The best schedule there can be
gives each Ollama requests in proportion to its speed, from first to last without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tests.ollama_standin import Known, Standin

SPEEDS = (1.0, 1.0, 0.5)
WORDS = 20
GOAL = 1.10
_HTTP, _NODES = 28635, 28735


@contextlib.asynccontextmanager
async def cluster(folder: Path, urls: list[str]) -> AsyncIterator[None]:
    """A daemon for each Ollama."""
    started = []
    try:
        for index, url in enumerate(urls):
            home = folder / str(index)
            home.mkdir()
            seeds = [f"127.0.0.1:{_NODES}"] if index else []
            settings = home / "sollold.toml"
            settings.write_text(
                f'[node]\nname = "{index}"\nstate_dir = "{home}/state"\ncache_dir = "{home}/cache"\n'
                f'[http]\nhost = "127.0.0.1"\nport = {_HTTP + index}\n'
                f'[cluster]\nhost = "127.0.0.1"\nport = {_NODES + index}\nmdns = false\ndoor = "open"\n'
                f'seeds = {json.dumps(seeds)}\n[ollama]\nurl = "{url}"\n'
                f"[models]\nhuggingface = false\nollama_stores = [{json.dumps(str(home / 'none'))}]\n"
                "[llama]\nbuild = false\n"
            )
            command = [sys.executable, "-m", "sollold", "run", "--config", str(settings)]
            with (home / "log").open("wb") as log:
                environment = {**os.environ, "HOME": str(home)}
                started.append(
                    await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
                )
        yield
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                await asyncio.wait_for(process.wait(), 15)
            except TimeoutError:
                process.kill()
                await process.wait()


async def known(session: aiohttp.ClientSession) -> None:
    """Wait until the first daemon sees all endpoints."""
    for _ in range(200):
        with contextlib.suppress(aiohttp.ClientError, ValueError):
            async with session.get(f"http://127.0.0.1:{_HTTP}/api/tags") as answer:
                models = (await answer.json())["models"]
                if models and len(models[0].get("nodes", ())) == len(SPEEDS):
                    return
        await asyncio.sleep(0.2)
    raise SystemExit("the daemons did not find each other's Ollamas")


async def run(requests: int, at_once: int, seconds: float) -> tuple[float, float, Counter[str]]:
    """Seconds taken, the best possible, and how many each node answered."""
    text = "word " * WORDS
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for speed in SPEEDS:
            standin = Standin([Known("pool:latest", text=text)], speed=WORDS / seconds * speed)
            urls.append(await standin.start())
            stack.push_async_callback(standin.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sollold-bench-"))
        await stack.enter_async_context(cluster(Path(folder), urls))
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout, connector=connector))
        await known(session)
        turns = asyncio.Semaphore(at_once)
        nodes: Counter[str] = Counter()

        async def one(number: int) -> None:
            body = {"model": "pool", "prompt": f"question {number}", "stream": False}
            async with turns:
                async with session.post(f"http://127.0.0.1:{_HTTP}/api/generate", json=body) as answer:
                    told = await answer.json()
                    if answer.status != 200:
                        raise SystemExit(f"a request failed: {told}")
                    nodes[told.get("_routing", {}).get("node", "?")] += 1

        # Each Ollama has answered once: its speed is known, as it is in a pool that is in use.
        for _ in range(2):
            await asyncio.gather(*(one(-k) for k in range(2 * len(SPEEDS))))
        nodes.clear()
        begun = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(requests)))
        return time.perf_counter() - begun, best(requests, seconds), nodes


def best(requests: int, seconds: float) -> float:
    """The shortest time in which whole requests can be done by Ollamas of these speeds."""
    low = requests * seconds / sum(SPEEDS)
    while sum(math.floor(low * speed / seconds + 1e-9) for speed in SPEEDS) < requests:
        low = min((math.floor(low * speed / seconds + 1e-9) + 1) * seconds / speed for speed in SPEEDS)
    return low


async def table(requests: int, seconds: float) -> bool:
    """Whether the goal is met, however many requests come at once."""
    all_met = True
    print(f"{'at once':>8} {'best s':>8} {'pool s':>8} {'ratio':>6} {'goal':>6}  {'':6}  requests by node")
    for at_once in (requests, 16):
        taken, ideal, nodes = await run(requests, at_once, seconds)
        met = taken / ideal <= GOAL
        all_met = all_met and met
        shares = ", ".join(f"{node}: {count}" for node, count in sorted(nodes.items()))
        print(
            f"{at_once:>8} {ideal:>8.2f} {taken:>8.2f} {taken / ideal:>6.2f} {GOAL:>6.2f}"
            f"  {'met   ' if met else 'MISSED'}  {shares}",
            flush=True,
        )
    return all_met


def main() -> int:
    """Exit status 1 when the goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.pool", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.25, help="a request at an Ollama of speed 1")
    options = parser.parse_args()
    return int(not asyncio.run(table(options.requests, options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
