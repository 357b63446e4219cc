"""A llama-server without a cluster, to compare answers and times with."""

from __future__ import annotations

import contextlib
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sollold.engines.install.find import Llama
from tests.daemons import until
from tests.doubles import free_port

_LOAD_SECONDS = 120.0


@contextlib.contextmanager
def single_server(llama: Llama, model: Path, *arguments: str) -> Iterator[str]:
    """Run a llama-server with the whole model, and yield its URL once it is ready.

    Raises:
        AssertionError: it was not ready in time.
    """
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(llama.server), "-m", str(model), "--port", url.rpartition(":")[2], *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    try:
        until(is_ready, "llama-server is ready", _LOAD_SECONDS, 0.02)
        yield url
    finally:
        process.kill()
        process.wait()
