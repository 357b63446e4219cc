"""``sollold events``: the cluster's events, one per line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, NoReturn

from sollold.cli.asking import client
from sollold.cli.exit import Exit
from sollold.cli.following import Follower, end_without_reader
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError


def events(options: argparse.Namespace) -> int:
    """Print the last events, and with ``--follow`` new ones until Ctrl-C."""
    daemon = client(options)
    if options.follow:
        _follow(daemon, as_json=options.json)
    printed = False
    for _, event in daemon.events("/api/cluster/events"):
        _print(event, as_json=options.json)
        printed = True
    if not printed and not options.json:
        print("no events since this node started", file=sys.stderr)
    return Exit.DONE


def _follow(daemon: BlockingClient, *, as_json: bool) -> NoReturn:
    end_without_reader()
    follower = Follower()
    query = ""
    while True:
        error = None
        # Asked separately, since the stream may stay silent for long.
        follower.ask(lambda: daemon.get("/health"))
        try:
            for _, event in daemon.events(f"/api/cluster/events?follow=1{query}", stall=3600):
                _print(event, as_json=as_json)
                sys.stdout.flush()
                query = f"&after={event['id']}"
        except ClientError as lost:
            error = lost
        follower.lost(error)


def _print(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(event))
    else:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        print(harmless(f"{stamp}  {event['kind']:<18} {event['message']}"))
