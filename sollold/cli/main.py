"""The entry point: parses the arguments, runs the command, turns errors into a line and an exit status."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import Any

from sollold.cli.exit import Exit
from sollold.cli.parser import read
from sollold.cli.signals import end_in_order
from sollold.cli.streams import forget_output, forgive, harmless
from sollold.errors import system_reason
from sollold.settings.fault import SettingsError

ROOMS = {
    "run": "run",
    "setup": "setup",
    "config": "config",
    "token": "token",
    "admit": "admission",
    "cluster": "admission",
    "invite": "admission",
    "join": "admission",
    "key": "key",
    "demo": "demo",
    "completion": "completion",
    "install": "install",
    "status": "status",
    "ps": "status",
    "models": "models",
    "plan": "plan",
    "route": "plan",
    "load": "load",
    "unload": "load",
    "chat": "chat",
    "pull": "pull",
    "copy": "models",
    "delete": "models",
    "drain": "load",
    "undrain": "load",
    "forget": "load",
    "push": "models",
    "show": "show",
    "nodes": "nodes",
    "version": "nodes",
    "top": "top",
    "events": "events",
    "logs": "logs",
    "bench": "bench",
    "support": "support",
    "dashboard": "dashboard",
    "scan": "scan",
    "doctor": "doctor",
}
"""The module of each command; its function of the command's name is called."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    forgive()
    try:
        try:
            return _run(words)
        finally:
            # So that a failure to write the rest is reported here, not at the interpreter's exit.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`sollold status | head`): nothing to say or to flush.
        forget_output()
        return Exit.DONE
    except OSError as error:
        # The last one occurs when the terminal was closed.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        if error.filename is None:
            forget_output()
        print(
            f"sollold: {system_reason(error)}: {error.filename or 'the output is incomplete'}",
            file=sys.stderr,
        )
        return Exit.FAILED


def _run(words: Sequence[str] | None) -> int:
    options = read(words)
    if words is None and options.command != "run":
        # Not when another program calls this function, and not for the daemon, which handles signals itself:
        # systemd expects them to end it while it starts.
        end_in_order()
    module = importlib.import_module(f"sollold.cli.{ROOMS[options.command]}")
    try:
        return _call(getattr(module, options.command), options)
    except SettingsError as error:
        print(f"sollold: {error}", file=sys.stderr)
        return Exit.USAGE
    except KeyboardInterrupt:
        return 130


def _call(command: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> int:
    if not options.asks:
        return int(_result(command(options)))
    from sollold.client.errors import ClientError, NodeSilent

    try:
        return int(_result(command(options)))
    except ClientError as error:
        print(f"sollold: {harmless(error.message)}{_download_hint(options, error.message)}", file=sys.stderr)
        return Exit.UNREACHABLE if isinstance(error, NodeSilent) else Exit.of(error.status)
    except UnicodeEncodeError:
        # Printed and piped text is replaced where needed, so only arguments can cause this.
        print("sollold: an argument is not valid text in this locale's encoding", file=sys.stderr)
        return Exit.USAGE
    except (LookupError, TypeError) as error:
        words = _why_not_understood(options, error)
        if not words:
            raise
        print(f"sollold: {harmless(words)}", file=sys.stderr)
        return Exit.FAILED


def _why_not_understood(options: argparse.Namespace, error: Exception) -> str:
    """Why the answer has not the expected form; empty if the node has this program's release, or is gone."""
    from sollold import __version__
    from sollold.cli.asking import client
    from sollold.client.errors import ClientError

    node = client(options, timeout=5.0)
    try:
        state = node.get("/api/cluster")
        release = next(str(member["release"]) for member in state["nodes"] if member["me"])
    except ClientError:
        return ""
    except (LookupError, TypeError, StopIteration):
        return f"what answers at {node.url} is not sollold: its answer lacks what a node sends"
    if release == __version__:
        return ""
    return (
        f"the node runs sollold {release}, and this program, {__version__}, does not understand its answer "
        f"({type(error).__name__}: {error}): use the same release, or --json"
    )


def _download_hint(options: argparse.Namespace, message: str) -> str:
    """Advice on how to get a missing model; empty if a similarly named one exists."""
    model = getattr(options, "model", "")
    if options.typed not in ("chat", "load", "bench") or message != f"model {model!r} not found":
        return ""
    import shlex  # seldom needed

    return f"; to download it: sollold pull {harmless(shlex.quote(model))}"


def _result(result: Any) -> Any:
    """A command's result; a coroutine is run first."""
    if not isinstance(result, CoroutineType):
        return result
    import asyncio  # few commands need it, and its import takes as long as asking a node

    return asyncio.run(result)
