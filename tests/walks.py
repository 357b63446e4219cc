"""Count the code that a request executes: ``python -m tests.walks [-v]``.

Runs a daemon with the demo model and a real llama.cpp in this process. For a plan, a cold chat and a warm
chat it counts the files and functions of ``sollold`` that are called on the event loop until the response is
complete; ``-v`` lists them. Functions of periodic work (gossip, checks) are subtracted: they are recorded
before each request, over the longest period of that work.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import aiohttp

import sollold
from sollold.daemon.app import Daemon
from sollold.settings.load import load
from sollold.settings.paths import Places
from tests.doubles import free_port
from tests.found_llama import required_llama

ROOT = Path(sollold.__file__).parent
_IDLE_SECONDS = 17.0
"""Longer than the longest period of the daemon's periodic work."""
_WARM_CHATS = 4
"""Number of warm chats; only functions that all of them call are counted."""
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def entered(work: Callable[[], Awaitable[object]]) -> set[CodeType]:
    """The functions of sollold that are called while ``work`` runs."""
    called: set[CodeType] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            called.add(frame.f_code)

    sys.setprofile(profile)
    try:
        await work()
    finally:
        sys.setprofile(None)
    return {code for code in called if not code.co_name.startswith("<")}


async def main(verbose: bool) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        llama = required_llama()
        values = {
            "http.port": str(port),
            "http.host": "127.0.0.1",
            "cluster.port": str(free_port()),
            "cluster.host": "127.0.0.1",
            "cluster.mdns": "false",
            "models.folders": str(folder / "models"),
            "models.ollama_stores": str(folder / "ollama"),
            "models.huggingface": "false",
            "ollama.enabled": "false",
            "llama.server": str(llama.server),
            "llama.rpc_server": str(llama.worker),
        }
        loaded = load(environment={}, flags=[(key, value, key) for key, value in values.items()])
        places = Places(folder / "state", folder / "cache")
        places.make()
        daemon = Daemon(loaded, places, demo=True)
        await daemon.start(stack)
        session = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))

        async def ask(path: str, body: dict[str, Any]) -> None:
            async with session.post(path, json=body) as response:
                text = await response.text()
                assert response.status == 200, text

        async def idle() -> None:
            await asyncio.sleep(_IDLE_SECONDS)

        await until_ready(session)
        requests = {
            "plan": lambda: ask("/api/cluster/plan", {"model": "demo"}),
            "cold chat": lambda: ask("/v1/chat/completions", CHAT),
            "warm chat": lambda: ask("/v1/chat/completions", CHAT),
        }
        periodic: set[CodeType] = set()
        for name, work in requests.items():
            await asyncio.sleep(1.0)  # Lets the daemon finish work that the previous request left.
            periodic |= await entered(idle)
            # Repeated, because on a slow machine unrelated work may run during one of the chats.
            repeats = _WARM_CHATS if name == "warm chat" else 1
            codes = set.intersection(*[await entered(work) for _ in range(repeats)]) - periodic
            files = {code.co_filename for code in codes}
            print(f"{name}: {len(files)} files, {len(codes)} functions")
            if verbose:
                for file in sorted(files):
                    names = sorted(code.co_qualname for code in codes if code.co_filename == file)
                    print(f"  {Path(file).relative_to(ROOT)}: {', '.join(names)}")


async def until_ready(session: aiohttp.ClientSession) -> None:
    """Wait until the daemon has found llama.cpp and the demo model."""
    async with asyncio.timeout(60):
        while True:
            async with session.get("/api/cluster") as response:
                status = await response.json()
            async with session.get("/api/tags") as response:
                models = (await response.json())["models"]
            if models and status["nodes"][0].get("build"):
                return
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main("-v" in sys.argv[1:]))
