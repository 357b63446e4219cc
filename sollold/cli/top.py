"""``sollold top``: a live view of nodes, models, requests and events, controlled by keys."""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sollold.cli.asking import client, console
from sollold.cli.exit import Exit
from sollold.cli.on_screen import on_screen
from sollold.cli.status import deployment_table, faults, headline, node_table
from sollold.client.errors import ClientError
from sollold.units import seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sollold.client.blocking import BlockingClient

_INTERVAL_SECONDS = 1.0
VIEWS = {"a": "all", "n": "nodes", "m": "models", "r": "requests", "e": "events"}
"""Keys, and the view that each selects."""
HELP = "q quit  a all  n nodes  m models  r requests  e events  space pause"
_HISTORY_SECONDS = 60
_FEW_EVENTS, _MANY_EVENTS = 5, 30
"""Events shown in the overview, and in their own view."""
_STEPS = "▁▂▃▄▅▆▇█"


def top(options: argparse.Namespace) -> int:
    """Show the live view until ``q`` or Ctrl-C."""
    daemon = client(options, timeout=5.0)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("sollold: top needs a terminal; use `sollold status --watch` in a pipe", file=sys.stderr)
        return Exit.USAGE
    from rich.live import Live

    view, paused, state = "all", False, _fetch(daemon)
    with _keys(), on_screen(Live(console=console(), screen=True, auto_refresh=False)) as screen:
        while True:
            screen.update(frame(state, view, paused=paused), refresh=True)
            key = _pressed(_INTERVAL_SECONDS)
            if key in ("q", "\x03", "\x04"):
                return Exit.DONE
            if key == " ":
                paused = not paused
            view = VIEWS.get(key, view)
            if not paused and not key:
                try:
                    state = _fetch(daemon)
                except ClientError as error:
                    state = {**state, "lost": error.message}


def _fetch(daemon: BlockingClient) -> dict[str, Any]:
    """The cluster's status with its speed over the last minute, and its last events."""
    state: dict[str, Any] = daemon.get("/api/cluster")
    history = daemon.get(f"/api/cluster/history?seconds={_HISTORY_SECONDS}&step=1")
    events = [event for _, event in daemon.events(f"/api/cluster/events?last={_MANY_EVENTS}", stall=5.0)]
    return {**state, "speeds": history["total"]["tokens_per_second"], "events": events}


def frame(state: dict[str, Any], view: str, *, paused: bool) -> RenderableType:
    """Render one screen."""
    from rich.console import Group
    from rich.text import Text

    # The keys come first, since the rest may be longer than the screen.
    keys = Text(f"{HELP}{'  (paused)' if paused else ''}", style="dim")
    parts: list[RenderableType] = [Text(headline(state), style="bold"), keys, Text()]
    if state.get("lost"):
        parts += [Text(f"{state['lost']} (the figures are old)", style="red"), Text()]
    parts += [Text(speed_line(state["speeds"])), Text()]
    if view in ("all", "nodes"):
        parts += [node_table(state), Text()]
    if view in ("all", "models"):
        placeholder = Text("no model is loaded", style="dim")
        parts += [deployment_table(state) if state["deployments"] else placeholder]
        parts += [*(Text(words, style="red") for words in faults(state)), Text()]
    if view in ("all", "requests"):
        parts += [_requests(state), Text()]
    if view in ("all", "events"):
        latest = state["events"][-(_FEW_EVENTS if view == "all" else _MANY_EVENTS) :]
        parts += [
            Text(f"{clock(event['time'])}  {event['message']}", style="dim") for event in reversed(latest)
        ]
    return Group(*parts)


def speed_line(speeds: list[float | None]) -> str:
    """Current tokens per second of the cluster, with a sparkline of the last minute."""
    numbers = [speed or 0.0 for speed in speeds[-_HISTORY_SECONDS:]]
    # An average, since the current second is incomplete.
    current = sum(numbers[-5:]) / max(1, len(numbers[-5:]))
    peak = max([1.0, *numbers])
    curve = "".join(_STEPS[round(number / peak * (len(_STEPS) - 1))] for number in numbers[::2])
    return f"{current:.1f} tokens/s  {curve}"


def clock(seconds: float) -> str:
    """The time of day in the local time zone, with the date unless it is today."""
    moment = time.localtime(seconds)
    today = moment[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", moment)


def _requests(state: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    from sollold.cli.fitting import Fitting

    rows = state["requests"]
    if not rows:
        return Text("no requests under way through this node", style="dim")
    titles = ("request", "model", "node", "state", "for")
    table = Fitting(titles, right=("for",), whole=titles[2:], spare=("request", "node"))
    for row in rows:
        table.add_row(row["path"], row["model"], row["node"], row["stage"], seconds_text(row["seconds"]))
    return table


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Read single keys without echo within the block."""
    import termios
    import tty

    attributes = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)


def _pressed(seconds: float) -> str:
    """Wait up to ``seconds`` for a key; empty if none was pressed."""
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], remaining)
        if ready:
            return sys.stdin.read(1)
    return ""
