"""A local daemon that a program starts for itself, and that ends with the program."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sollold.client.discovery import HERE
from sollold.client.errors import ClientError
from sollold.client.http import Client
from sollold.machine.child_guard import guarded

log = logging.getLogger("sollold.client")

_PING_SECONDS = 2.0
_START_SECONDS = 60.0
_BUILD_SECONDS = 3600.0
_STOP_SECONDS = 20.0
_STEP_SECONDS = 0.25
_POLL_SECONDS = 0.05


class DaemonProcess:
    """``sollold run`` as a child process, if no local daemon runs. ``backends``: workers' ``host:port``."""

    def __init__(self, backends: Sequence[str] = (), *, url: str = HERE, words: Sequence[str] = ()) -> None:
        """``words``: additional arguments for ``sollold run``."""
        self._backends = tuple(backends)
        self._url = url
        self._words = tuple(words)
        # Not asyncio's, which belongs to one event loop: the program may use several, one after another.
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._starter = 0

    def __getstate__(self) -> dict[str, Any]:
        # Another process may use the daemon, but does not stop it.
        return {**vars(self), "_process": None, "_log": None}

    @property
    def ended(self) -> bool:
        """Whether a daemon was started here and has ended by itself, for example killed for memory."""
        return self._starter == os.getpid() and self._process is not None and self._process.poll() is not None

    async def ensure(self) -> None:
        """Ensure that a local daemon runs and its llama.cpp is ready.

        Raises:
            ClientError: it could not be started; includes the end of its log.
        """
        if await self._answers():
            if self.ended:
                self._process = None  # another one has taken its place
            return
        # The first requests may be concurrent, but only one daemon can have the port: no await in between.
        if self._process is None or self._process.poll() is not None:
            self._start()
        await self._wait()

    async def stop(self) -> None:
        """Stop the daemon, if it was started here."""
        if self._starter != os.getpid():
            # In a forked child: the daemon belongs to the parent.
            self._process = self._log = None
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            deadline = time.monotonic() + _STOP_SECONDS
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                await asyncio.sleep(_POLL_SECONDS)
        if self._log is not None:
            self._log.unlink(missing_ok=True)

    def _start(self) -> None:
        self._starter = os.getpid()
        if self._log is not None:
            self._log.unlink(missing_ok=True)
        file, name = tempfile.mkstemp(prefix="sollold-", suffix=".log")
        self._log = Path(name)
        words = [sys.executable, "-m", "sollold", "run", *self._words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if self._backends:
            words += ["--set", "llama.allow_plain_workers=on"]
            environment["RPC_BACKENDS"] = ",".join(self._backends)
        log.info("no daemon on this machine: starting one (`sollold run`), its log is %s", name)
        try:
            self._process = subprocess.Popen(
                guarded(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(file)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        began, reported = loop.time(), ""
        limit = _START_SECONDS
        async with Client(self._url, timeout=_PING_SECONDS) as client:
            while True:
                if self._process is None or self._process.poll() is not None:
                    raise ClientError(f"the daemon could not be started:\n{self._last_lines()}")
                with contextlib.suppress(ClientError):
                    cluster = await client.get("/api/cluster")
                    me = next(node for node in cluster["nodes"] if node["me"])
                    if me["build"]:
                        log.info("daemon ready, llama.cpp %s", me["build"])
                        return
                    limit = _BUILD_SECONDS
                    if me["setup"] != reported:
                        reported = me["setup"]
                        log.info("setting llama.cpp up: %s", reported)
                if loop.time() - began > limit:
                    raise ClientError(f"no daemon was ready within {limit:g} s:\n{self._last_lines()}")
                await asyncio.sleep(_STEP_SECONDS)

    async def _answers(self) -> bool:
        try:
            async with Client(self._url, timeout=_PING_SECONDS) as client:
                await client.get("/api/version")
        except ClientError:
            return False
        return True

    def _last_lines(self) -> str:
        with contextlib.suppress(OSError):
            if self._log is not None:
                return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])
        return ""
