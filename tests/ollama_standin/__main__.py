"""``python -m tests.ollama_standin --port 11434 --model llama3.2:3b --speed 50``.

Like ``ollama serve``, it takes its address from ``OLLAMA_HOST`` if ``--port`` is not given.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

from tests.ollama_standin.server import Known, Standin


async def _serve(options: argparse.Namespace) -> None:
    text = {"text": options.text} if options.text else {}
    models = [Known(name, engine=options.engine, **text) for name in options.model or ["standin:latest"]]
    standin = Standin(
        models,
        speed=options.speed,
        load_seconds=options.load_seconds,
        parallel=options.parallel,
    )
    url = await standin.start(options.host, options.port)
    print(f"Ollama stand-in at {url}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await standin.close()


def main() -> None:
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
    parser = argparse.ArgumentParser(prog="tests.ollama_standin")
    parser.add_argument("serve", nargs="?", help="ignored; for compatibility with `ollama serve`")
    parser.add_argument("--host", default=host or "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(port))
    parser.add_argument("--model", action="append", help="name of a model; repeatable")
    parser.add_argument("--text", default="", help="the text of every answer")
    parser.add_argument("--speed", type=float, default=100.0, help="tokens per second")
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--engine", default="", help="URL of a llama-server that generates the answers")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
