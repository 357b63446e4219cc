"""Cost of the Python client compared with the `ollama` package: import, and a blocking call.

``python -m tests.bench.client``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ollama

from sollold.client.sync_wrapper import OllamaPool
from tests.doubles import free_port

_IMPORTS = {"nothing": "pass", "sollold": "import sollold.client.sync_wrapper", "ollama": "import ollama"}
_IMPORT_TIMES, _CALLS = 9, 200
_GOAL = 0.15
_MODEL = "bench:latest"
_MESSAGES = [{"role": "user", "content": "Hi"}]


def _import_seconds(code: str, cache: str) -> tuple[float, float]:
    """Return the least wall-clock and CPU seconds that an interpreter takes for ``code`` alone."""
    timed = f"import time; a, b = time.perf_counter(), time.process_time()\n{code}\n"
    timed += "print(time.perf_counter() - a, time.process_time() - b)"
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    found = []
    for _ in range(_IMPORT_TIMES):
        done = subprocess.run(
            [sys.executable, "-c", timed], capture_output=True, text=True, check=True, env=environment
        )
        found.append([float(number) for number in done.stdout.split()])
    return min(seconds[0] for seconds in found), min(seconds[1] for seconds in found)


@contextmanager
def _server() -> Iterator[str]:
    """Run an Ollama double that answers immediately and yield its URL."""
    port = free_port()
    words = [sys.executable, "-m", "tests.ollama_standin", "--port", str(port), "--model", _MODEL]
    words += ["--speed", "1e9", "--text", "Hello! How can I help you today?"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _median_ms(call: Callable[[], object]) -> float:
    for _ in range(20):
        call()
    spent = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent) * 1000


def main() -> None:
    print(f"{'import of':>12} {'best ms':>9} {'CPU ms':>8} {'goal ms':>8}")
    with tempfile.TemporaryDirectory() as cache:
        for name, code in _IMPORTS.items():
            clock, processor = _import_seconds(code, cache)
            goal = f"{1000 * _GOAL:8.0f}" if name == "sollold" else ""
            print(f"{name:>12} {1000 * clock:9.1f} {1000 * processor:8.1f} {goal}")
    with _server() as url, OllamaPool(url) as pool:
        theirs = ollama.Client(url)
        calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "chat, whole": (
                lambda: pool.chat(_MODEL, _MESSAGES),
                lambda: theirs.chat(_MODEL, _MESSAGES),
            ),
            "chat, stream": (
                lambda: list(pool.chat(_MODEL, _MESSAGES, stream=True)),
                lambda: list(theirs.chat(_MODEL, _MESSAGES, stream=True)),
            ),
        }
        print(f"\n{'blocking':>12} {'sollold ms':>11} {'ollama ms':>10}")
        for name, (ours, other) in calls.items():
            print(f"{name:>12} {_median_ms(ours):11.2f} {_median_ms(other):10.2f}")


if __name__ == "__main__":
    main()
