"""``sollold pull``, and the download before ``run MODEL`` if no node has the model."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.cli.on_screen import on_screen
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError


def pull(options: argparse.Namespace) -> int:
    """Fetch a model, with a bar per file."""
    daemon = client(options)
    try:
        if options.json:
            for step in _steps(daemon, options.model):
                print_json(step, line=True)
        else:
            _show(_steps(daemon, options.model), stderr=False)
    except (KeyboardInterrupt, SystemExit):
        retry = f"sollold pull {shlex.quote(options.model)}"
        print(
            harmless(f"sollold: stopped; the downloaded part is kept, resume with: {retry}"), file=sys.stderr
        )
        raise
    return Exit.DONE


def pull_missing(daemon: BlockingClient, model: str) -> None:
    """Fetch ``model`` if no node has it, with progress on standard error.

    Raises:
        ClientError: no source has it, or this caller may not fetch it.
    """
    try:
        daemon.post("/api/show", {"model": model})
        return
    except ClientError as error:
        # The message may suggest a similar name that was meant instead.
        if error.status != 404 or error.message != f"model {model!r} not found":
            return
        missing = error.message
    print(f"sollold: no node has {harmless(model)} yet, so it is downloaded", file=sys.stderr)
    try:
        _show(_steps(daemon, model), stderr=True)
    except ClientError as error:
        raise ClientError(f"{missing}, and could not be downloaded: {error.message}", error.status) from None


def _steps(daemon: BlockingClient, model: str) -> Iterator[dict[str, Any]]:
    return daemon.stream("/api/pull", {"model": model})


def print_steps(steps: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Print a line per step of a pull or push."""
    last = ""
    for step in steps:
        if step.get("status") != last:
            last = step.get("status", "")
            print(harmless(last), file=out, flush=True)


def _show(steps: Iterator[dict[str, Any]], *, stderr: bool) -> None:
    """Show a bar per file on a terminal, else a line per step."""
    out = sys.stderr if stderr else sys.stdout
    if not out.isatty():
        print_steps(steps, out)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with on_screen(Progress(*columns, console=console(stderr=stderr))) as bar:
        tasks = {}
        last = ""
        for step in steps:
            digest = step.get("digest", "")
            if not digest:
                if step.get("status") != last:
                    last = step.get("status", "")
                    bar.console.print(last)
                continue
            if digest not in tasks:
                tasks[digest] = bar.add_task(step.get("status", digest[:19]), total=step.get("total"))
            bar.update(tasks[digest], completed=step.get("completed", 0), total=step.get("total"))
