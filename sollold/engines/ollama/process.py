"""An Ollama started and supervised by this daemon, on loopback since it has no authentication."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.process import GATHER_SECONDS, Process
from sollold.errors import system_reason
from sollold.settings.location import expanded

log = logging.getLogger("sollold.engines")

_START_SECONDS = 90.0
"""Timeout of a start, in seconds: Ollama listens at once, but looks for GPUs first."""
_POLL_SECONDS = 0.2


class OwnOllama:
    """Runs at most one Ollama process."""

    def __init__(
        self,
        binary: str,
        url: str,
        journal: Journal,
        log_dir: Path,
        environ: Mapping[str, str] = os.environ,
        store: str = "",
    ) -> None:
        """``binary``: path of the program; empty: search PATH. The port is taken from ``url``.

        ``store``: root of the model store; empty: ``$OLLAMA_MODELS``, or Ollama's default.
        """
        self._store = str(expanded(store)) if store else environ.get("OLLAMA_MODELS", "")
        self._binary = binary
        self._port = urlsplit(url).port or 11434
        self._journal = journal
        self._log_file = log_dir / "ollama.log"
        self._environ = environ
        self._process: Process | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.trouble = ""
        """Why the last start failed, as a sentence."""

    @property
    def started(self) -> bool:
        """Whether a process started here is running."""
        return self._process is not None and self._process.running

    @property
    def ended(self) -> bool:
        """Whether the process started here has exited by itself."""
        return self._process is not None and not self._process.running

    async def kill_leftovers(self) -> None:
        """Kill what an Ollama of an earlier run left behind; call it before `start`.

        If the daemon is killed, so is its Ollama, but not the runners that this has started: they would keep
        the memory of their models.
        """
        await asyncio.to_thread(self._journal.kill_leftovers)

    async def start(self, answers: Callable[[], Awaitable[bool]]) -> bool:
        """Start Ollama and wait until it ``answers``; return False on failure, see `trouble`."""
        await self.stop()
        self.trouble = ""
        binary = self._binary or await asyncio.to_thread(_binary)
        if binary and not await asyncio.to_thread(os.access, binary, os.X_OK):
            self.trouble = f"{binary} (ollama.binary) does not exist or can't be run."
            return False
        if not binary:
            self.trouble = (
                "ollama.manage is set, but there is no ollama binary; install it or set ollama.binary."
            )
            return False
        try:
            self._process = await Process.start(
                "ollama",
                [binary, "serve"],
                deployment="ollama",
                journal=self._journal,
                log_file=self._log_file,
                env=self.environment(),
                gather=GATHER_SECONDS,
            )
        except OSError as error:
            self.trouble = f"{binary} can't be started: {system_reason(error)}."
            return False
        log.info("started Ollama: %s", binary)
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            if not self._process.running:
                words = " ".join(self._process.last_lines()[-2:])
                self.trouble = f"Ollama exited right after its start: {words}"
                break
            if await answers():
                return True
            await asyncio.sleep(_POLL_SECONDS)
        else:
            self.trouble = (
                f"Ollama was started but did not answer within {_START_SECONDS:.0f} s; see {self._log_file}."
            )
        await self.stop()
        return False

    def environment(self) -> dict[str, str]:
        """Return the variables that are added to the daemon's own environment."""
        environment = {
            "OLLAMA_HOST": f"127.0.0.1:{self._port}",
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_NOPRUNE": "1",
        }
        environment["OLLAMA_KEEP_ALIVE"] = self._environ.get("OLLAMA_KEEP_ALIVE", "5m")
        if self._store:
            environment["OLLAMA_MODELS"] = self._store
        return environment

    def kill(self) -> None:
        """Kill it at once; the supervising loop restarts it."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Stop it if it runs."""
        if self._process is not None:
            process, self._process = self._process, None
            await process.stop()


def _binary() -> str:
    return shutil.which("ollama") or ""
