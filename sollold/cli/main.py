"""The entry point: reads the words, runs the command, turns faults into one line and an exit status."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sollold.cli.exit import Exit
from sollold.cli.parser import parser
from sollold.settings import SettingsError

ROOMS = {
    "run": "run",
    "setup": "setup",
    "config": "config",
    "token": "token",
    "demo": "demo",
    "completion": "completion",
    "status": "status",
    "ps": "status",
    "models": "models",
    "plan": "plan",
    "route": "plan",
    "load": "load",
    "unload": "load",
    "chat": "chat",
    "pull": "models",
    "copy": "models",
    "delete": "models",
    "drain": "load",
    "scan": "scan",
    "doctor": "doctor",
}
"""The module that holds each command; its function of the command's name is called."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(words)
    module = importlib.import_module(f"sollold.cli.{ROOMS[options.command]}")
    try:
        return _call(getattr(module, options.command), options)
    except SettingsError as error:
        print(f"sollold: {error}", file=sys.stderr)
        return Exit.USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`sollold status | head`): nothing to say, nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE


def _call(command: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> int:
    if "node" not in options:
        return int(_result(command(options)))
    from sollold.client.http import ClientError

    try:
        return int(_result(command(options)))
    except ClientError as error:
        print(f"sollold: {error.message}", file=sys.stderr)
        return Exit.of(error.status)


def _result(made: Any) -> Any:
    """What a command gave, or what it gives when it is run."""
    return asyncio.run(made) if asyncio.iscoroutine(made) else made
