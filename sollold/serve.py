"""Floor 5: the daemon as a process: a lock on its folders, signals, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

import uvloop

from sollold import notify
from sollold.cluster.identity import BadToken
from sollold.cluster.seeds import BadSeed
from sollold.daemon import Daemon
from sollold.places import Places, places
from sollold.settings import Loaded

logger = logging.getLogger("sollold")


class StartError(Exception):
    """The daemon can't start; one line says why and what to do."""


def serve(loaded: Loaded, *, reload: Callable[[], Loaded], demo: bool = False) -> None:
    """Run until SIGTERM or SIGINT; on a terminal until that is closed, too (SIGHUP).

    Args:
        loaded: the settings in force.
        reload: reads them anew, on SIGHUP of a daemon that has no terminal.
        demo: with no model on this machine, write a small one.

    Raises:
        StartError: a port is taken, an address is not this machine's, a folder can't be written, another
            daemon has it.
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


async def _serve(loaded: Loaded, folders: Places, reload: Callable[[], Loaded], demo: bool) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Who closes the terminal does not ask for the settings to be read again.
    closed = (signal.SIGHUP,) if _on_a_terminal() else ()
    for number in (signal.SIGTERM, signal.SIGINT, *closed):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        try:
            daemon = Daemon(loaded, folders, demo=demo)
            await daemon.start(stack)
        except (BadToken, BadSeed) as error:
            raise StartError(str(error)) from error
        except OSError as error:
            logger.debug("the start failed", exc_info=error)
            raise StartError(_in_words(error)) from error
        if not closed:
            loop.add_signal_handler(signal.SIGHUP, daemon.reload, reload)
        notify.notify(ready=True, status=daemon.status())
        await stopping.wait()
        # A second signal ends the waiting for requests, not the cleaning up.
        stopping.clear()
        await daemon.leave(stopping)


def _on_a_terminal() -> bool:
    """Whether this process ends with its terminal: it has one, and nobody said otherwise (``nohup``)."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _in_words(error: OSError) -> str:
    """Without the number; with the file, if it is about one."""
    words = error.strerror or str(error)
    return f"{words}: {error.filename}" if error.filename else words
