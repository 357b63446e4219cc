"""Distribution of 200 requests over Ollamas of speed 1, 1 and ½: ``python -m tests.bench.pool``.

Three daemons have an Ollama double each, and all requests go to the first daemon. The optimal schedule gives
each Ollama requests in proportion to its speed without pauses.
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
    """Run a daemon for each Ollama."""
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


async def wait_for_endpoints(session: aiohttp.ClientSession) -> None:
    """Wait until the first daemon sees all endpoints."""
    for _ in range(200):
        with contextlib.suppress(aiohttp.ClientError, ValueError):
            async with session.get(f"http://127.0.0.1:{_HTTP}/api/tags") as answer:
                models = (await answer.json())["models"]
                if models and len(models[0].get("nodes", ())) == len(SPEEDS):
                    return
        await asyncio.sleep(0.2)
    raise SystemExit("the daemons did not find each other's Ollamas")


async def run(requests: int, concurrency: int, seconds: float) -> tuple[float, float, Counter[str]]:
    """Return the seconds taken, the seconds of the optimal schedule, and the number of answers by node."""
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
        await wait_for_endpoints(session)
        turns = asyncio.Semaphore(concurrency)
        nodes: Counter[str] = Counter()

        async def send(number: int) -> None:
            body = {"model": "pool", "prompt": f"question {number}", "stream": False}
            async with turns:
                async with session.post(f"http://127.0.0.1:{_HTTP}/api/generate", json=body) as answer:
                    reply = await answer.json()
                    if answer.status != 200:
                        raise SystemExit(f"a request failed: {reply}")
                    nodes[reply.get("_routing", {}).get("node", "?")] += 1

        # Let each Ollama answer once, so that its speed is known as in a pool in use.
        for _ in range(2):
            await asyncio.gather(*(send(-k) for k in range(2 * len(SPEEDS))))
        nodes.clear()
        begun = time.perf_counter()
        await asyncio.gather(*(send(number) for number in range(requests)))
        return time.perf_counter() - begun, best(requests, seconds), nodes


def best(requests: int, seconds: float) -> float:
    """Return the shortest possible time of ``requests`` on Ollamas of these speeds."""
    low = requests * seconds / sum(SPEEDS)
    while sum(math.floor(low * speed / seconds + 1e-9) for speed in SPEEDS) < requests:
        low = min((math.floor(low * speed / seconds + 1e-9) + 1) * seconds / speed for speed in SPEEDS)
    return low


async def table(requests: int, seconds: float) -> bool:
    """Print the table and return whether the goal is met for every concurrency."""
    all_met = True
    print(f"{'at once':>8} {'best s':>8} {'pool s':>8} {'ratio':>6} {'goal':>6}  {'':6}  requests by node")
    for concurrency in (requests, 16):
        taken, ideal, nodes = await run(requests, concurrency, seconds)
        met = taken / ideal <= GOAL
        all_met = all_met and met
        shares = ", ".join(f"{node}: {count}" for node, count in sorted(nodes.items()))
        print(
            f"{concurrency:>8} {ideal:>8.2f} {taken:>8.2f} {taken / ideal:>6.2f} {GOAL:>6.2f}"
            f"  {'met   ' if met else 'MISSED'}  {shares}",
            flush=True,
        )
    return all_met


def main() -> int:
    """Return exit status 1 if the goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.pool", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.25, help="a request at an Ollama of speed 1")
    options = parser.parse_args()
    return int(not asyncio.run(table(options.requests, options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
