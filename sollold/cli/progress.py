"""Progress displays for long operations: loading a model, draining a node."""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sollold.cli.asking import console
from sollold.cli.on_screen import on_screen
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError

_INTERVAL_SECONDS = 0.5
_DELAY_SECONDS = 0.4
"""Delay before a bar is shown, in seconds; a loaded model responds sooner."""
_STATUS_SECONDS = 3.0
"""Timeout of a status request, in seconds; Ctrl-C waits for it."""
_MAX_POLLS = 10
"""Status requests after which a drain should be visible."""


class Waiting:
    """A bar on the terminal that can be ended once."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    @property
    def over(self) -> bool:
        """Whether the bar has been ended."""
        return self._end is None

    def end(self) -> None:
        """Remove the bar. May be called again."""
        end, self._end = self._end, None
        if end is not None:
            end()


@contextlib.contextmanager
def loading(daemon: BlockingClient, model: str) -> Iterator[Waiting]:
    """Show a bar for the load of ``model`` on standard error, until the block ends or `end` is called.

    If Ctrl-C ends the block during the load, say that the load continues.
    """
    waiting = _bar(daemon, model) if sys.stderr.isatty() else Waiting(lambda: None)
    try:
        yield waiting
    except (KeyboardInterrupt, SystemExit):
        loaded = waiting.over
        waiting.end()
        if not loaded and _loads(daemon, model):
            undo = f"sollold unload --force {shlex.quote(model)}"
            print(harmless(f"sollold: the load of {model} continues; to cancel it: {undo}"), file=sys.stderr)
        raise
    finally:
        waiting.end()


def _bar(daemon: BlockingClient, model: str) -> Waiting:
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(daemon, model, done), daemon=True)
    watcher.start()

    def end() -> None:
        done.set()
        watcher.join()

    return Waiting(end)


def _watch(daemon: BlockingClient, model: str, done: threading.Event) -> None:
    if done.wait(_DELAY_SECONDS):
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with on_screen(Progress(*columns, console=console(stderr=True), transient=True)) as bar:
        task = bar.add_task(model, total=None)
        while not done.is_set():
            for deployment in _loads(daemon, model):
                words = f"{model}: {deployment['state']} on {deployment['node_name']}"
                bar.update(task, description=words, total=1.0, completed=deployment["progress"])
            done.wait(_INTERVAL_SECONDS)


def _loads(daemon: BlockingClient, model: str) -> list[dict[str, Any]]:
    """The deployments of ``model``, with any tag, that are loading."""
    name = model.split(":")[0]
    try:
        deployments = daemon.get("/api/cluster", timeout=_STATUS_SECONDS)["deployments"]
    except ClientError:
        return []
    loads = [d for d in deployments if d["state"] in ("starting", "loading")]
    return [load for load in loads if load["model"].split(":")[0] == name]


def emptied(daemon: BlockingClient, name: str) -> bool:
    """Wait until the draining node (name or id) is empty, printing what is left; False if it can't be."""
    try:
        return _emptied(daemon, name)
    except (KeyboardInterrupt, SystemExit):
        undo = f"sollold undrain {shlex.quote(name)}"
        print(harmless(f"sollold: {name} continues to drain; to cancel that: {undo}"), file=sys.stderr)
        raise


def _emptied(daemon: BlockingClient, name: str) -> bool:
    printed = ""
    # It may be another node than the one asked, which learns of it a moment later.
    polls = _MAX_POLLS
    while True:
        state = daemon.get("/api/cluster")
        node = next((n for n in state["nodes"] if name in (n["name"], n["node"])), None)
        if node is not None and node["draining"]:
            polls = 0
        elif not polls:
            return False
        else:
            polls -= 1
            time.sleep(_INTERVAL_SECONDS)
            continue
        if node["empty"]:
            return True
        words = _remaining_work(state, node["node"])
        if words != printed:
            print(harmless(words), file=sys.stderr)
            printed = words
        time.sleep(_INTERVAL_SECONDS)


def _remaining_work(state: dict[str, Any], node: str) -> str:
    """What a draining node is still doing."""
    own = [d for d in state["deployments"] if d["node"] == node]
    requests = sum(d["active"] + d["waiting"] for d in own)
    lent = [
        d
        for d in state["deployments"]
        if d["node"] != node and any(placed["node"] == node for placed in d["placed"])
    ]
    words = f"draining: {requests} requests under way"
    if lent:
        words += f", layers of {', '.join(sorted({d['model'] for d in lent}))} in use by other nodes"
    return words
