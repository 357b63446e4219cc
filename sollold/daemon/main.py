"""The daemon as a process: locking its folders, handling signals, reporting why it can't start."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import logging
import os
import pwd
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import uvloop

from sollold.api.http.connections import raise_descriptor_limit
from sollold.cluster.net.identity import BadToken
from sollold.cluster.net.seeds import BadSeed
from sollold.daemon import loop_errors, systemd
from sollold.daemon.app import Daemon
from sollold.daemon.heap import use_one_arena
from sollold.daemon.stuck_threads import StuckThreads
from sollold.errors import system_reason
from sollold.settings.load import LoadedSettings
from sollold.settings.paths import Places, places
from sollold.settings.state_file import remove_unfinished

logger = logging.getLogger("sollold")


class StartError(Exception):
    """The daemon can't start; one line says why and what to do."""


def serve(loaded: LoadedSettings, *, reload: Callable[[], LoadedSettings], demo: bool = False) -> None:
    """Run until SIGTERM or SIGINT, or on a terminal until that is closed (SIGHUP).

    Args:
        loaded: the settings.
        reload: loads them again, on SIGHUP of a daemon that has no terminal.
        demo: if this machine has no model, write a small one.

    Raises:
        StartError: a port is taken, an address is not this machine's, a folder can't be written, or another
            daemon uses it.
    """
    raise_descriptor_limit()
    use_one_arena()
    folders = places(loaded.settings.node)
    with _locked(folders):
        stuck = StuckThreads()
        uvloop.run(_serve(loaded, folders, reload, demo, stuck))
        stuck.all_ended()


@contextmanager
def _locked(folders: Places) -> Iterator[None]:
    """Lock the state folder during the block."""
    try:
        folders.make()
        lock = os.open(folders.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(
            f"can't write {error.filename or folders.state}: {system_reason(error)}; "
            "set node.state_dir and node.cache_dir to other folders"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(
                f"another sollold uses the state folder {folders.state} (see `systemctl status sollold`). "
                "For a second one, choose other folders: --set node.state_dir=… --set node.cache_dir=…"
            ) from None
        remove_unfinished(folders.state)
        yield
    finally:
        os.close(lock)


async def _serve(
    loaded: LoadedSettings,
    folders: Places,
    reload: Callable[[], LoadedSettings],
    demo: bool,
    stuck: StuckThreads,
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(loop_errors.handle)
    # Closing the terminal is not a request to reload the settings.
    closed = (signal.SIGHUP,) if _has_terminal() else ()
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
            raise StartError(_describe(error, folders)) from error
        if not closed:
            loop.add_signal_handler(signal.SIGHUP, daemon.reload, reload)
        logger.info("%s", daemon.ready_line())
        # These objects stay: traversing them in every garbage collection would block the loop.
        gc.collect()
        gc.freeze()
        systemd.notify(ready=True, status=daemon.status())
        await stopping.wait()
        # A second signal ends the waiting for requests, but not the clean-up.
        stopping.clear()
        await daemon.leave(stopping)
        stuck.expect_end()
    # systemd shows the last status until the next start.
    systemd.notify(status="stopped")


def _has_terminal() -> bool:
    """Return whether this process ends with its terminal: it has one, and ``nohup`` is not in use."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _describe(error: OSError, folders: Places) -> str:
    """Describe the error without its number, with its file; for a full disk that is the state folder."""
    words = system_reason(error)
    place = error.filename
    if place is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        place = folders.state
    return f"{words}: {place}{_owner_hint(error)}" if place else words


def _owner_hint(error: OSError) -> str:
    """Return advice about a file of another user, such as one that root restored from a backup."""
    if not isinstance(error, PermissionError):
        return ""
    try:
        file = Path(error.filename)
        if file.stat().st_uid == os.geteuid():
            return ""
        user = pwd.getpwuid(os.geteuid()).pw_name
    except (OSError, KeyError):
        return ""
    return f"; it belongs to another user: sudo chown -R {user}: {shlex.quote(str(file.parent))}"
