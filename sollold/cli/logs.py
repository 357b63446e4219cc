"""``sollold logs``: the daemon's journal on this machine, or the output of a model's engines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any
from urllib.parse import quote

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit
from sollold.cli.following import Follower, end_without_reader
from sollold.cli.service import journalctl
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient

_INTERVAL_SECONDS = 1.0
_NO_ENTRIES = b"-- No entries --"
_MAX_LINES = 2000
"""Maximum lines per response of a node; if more are written in a second, some are missed."""


def logs(options: argparse.Namespace) -> int:
    """Print the last lines of a model's engines, or without a model of this machine's journal."""
    if not options.model:
        return _journal(options)
    path = f"/api/cluster/logs/{quote(options.model)}?lines="
    daemon = client(options)
    if options.follow:
        return _follow(daemon, path, options)
    found = daemon.get(f"{path}{options.lines}")["logs"]
    if options.json:
        print_json(found)
        return Exit.DONE
    for log in found:
        print(harmless(f"==> {log['deployment']} on {log['node']}: {log['process'] or log['reason']} <=="))
        if log["text"]:
            print("\n".join(harmless(line) for line in log["text"].splitlines()))
        print()
    return Exit.DONE


def _follow(daemon: BlockingClient, path: str, options: argparse.Namespace) -> int:
    """Print new lines until Ctrl-C, with a title whenever the engine changes."""
    previous: dict[tuple[str, str, str], list[str]] = {}
    last = None
    follower = Follower()
    end_without_reader()
    while True:
        for log in follower.ask(lambda: daemon.get(f"{path}{_MAX_LINES}"))["logs"]:
            engine = (log["deployment"], log["node"], log["process"])
            lines = log["text"].splitlines()
            fresh = added(previous[engine], lines) if engine in previous else lines[-options.lines :]
            previous[engine] = lines
            if fresh and options.json:
                print(json.dumps({**log, "text": "\n".join(fresh)}))
            elif fresh:
                _print_fresh(log, fresh, titled=engine != last)
            last = engine if fresh else last
        sys.stdout.flush()
        time.sleep(_INTERVAL_SECONDS)


def _print_fresh(log: dict[str, Any], lines: list[str], *, titled: bool) -> None:
    if titled:
        print(harmless(f"==> {log['deployment']} on {log['node']}: {log['process']} <=="))
    print("\n".join(map(harmless, lines)))


def added(old: list[str], new: list[str]) -> list[str]:
    """The lines of ``new`` after those of ``old``, whose first lines may have been dropped."""
    dropped = next(dropped for dropped in range(len(old) + 1) if new[: len(old) - dropped] == old[dropped:])
    return new[len(old) - dropped :]


def _journal(options: argparse.Namespace) -> int:
    if options.node:
        print(
            "sollold: read another machine's journal on that machine (journalctl -u sollold); "
            "`sollold logs MODEL` reads a model's engines from anywhere",
            file=sys.stderr,
        )
        return Exit.USAGE
    words = [*journalctl(), "--no-pager", *(["-o", "json"] if options.json else [])]
    try:
        # Also before following: without an entry, journalctl would wait in silence.
        lines = 1 if options.follow else options.lines
        done = subprocess.run([*words, "-n", str(lines)], check=False, stdout=subprocess.PIPE)
        if done.returncode or done.stdout.strip() in (b"", _NO_ENTRIES):
            print(
                "sollold: the journal has nothing of the daemon that you may read; a daemon started by hand "
                "logs to its terminal, one in a container to the container's log",
                file=sys.stderr,
            )
            return Exit.FAILED
        if options.follow:
            words += ["-n", str(options.lines), "--follow"]
            return subprocess.run(words, check=False).returncode
        sys.stdout.buffer.write(done.stdout)
        return Exit.DONE
    except FileNotFoundError:
        print("sollold: there is no journalctl here; the daemon's output is its log", file=sys.stderr)
        return Exit.FAILED
