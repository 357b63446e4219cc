"""Floor 5: builds the parts, starts and stops them in order. The only file that knows them all."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import uvloop
from aiohttp import web

from sollold import __version__, log, notify
from sollold.places import Places, places
from sollold.settings import Loaded, SettingsError, differences

logger = logging.getLogger("sollold")

LIVE_KEYS = frozenset({"log.level"})
"""Settings that a reload changes at once; the others need a restart and are named."""
STATUS_SECONDS = 5.0


class StartError(Exception):
    """The daemon can't start; one line says why and what to do."""


def serve(loaded: Loaded, *, reload: Callable[[], Loaded], demo: bool = False) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        loaded: the settings in force.
        reload: reads them anew, on SIGHUP.
        demo: with no model on this machine, write a small one.

    Raises:
        StartError: a port is taken, a folder can't be written, another daemon has it.
    """
    folders = places(loaded.settings.node)
    with _owned(folders):
        uvloop.run(_serve(loaded, folders, reload, demo))


@contextmanager
def _owned(folders: Places) -> Iterator[None]:
    """The state folder is this daemon's alone within the block."""
    try:
        folders.make()
        lock = os.open(folders.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(
            f"can't write {error.filename or folders.state}: {error.strerror}; "
            "name other folders with node.state_dir and node.cache_dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(
                f"another sollold runs with the state folder {folders.state}; `systemctl status sollold` "
                "may know it. For a second one name another folder: --set node.state_dir=…"
            ) from None
        yield
    finally:
        os.close(lock)
