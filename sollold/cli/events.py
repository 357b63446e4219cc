"""``sollold events``: what happens in the cluster, a line each."""

from __future__ import annotations

import argparse
import json
import sys
import time

from sollold.cli.asking import client
from sollold.cli.exit import Exit
from sollold.cli.streams import harmless


def events(options: argparse.Namespace) -> int:
    """The last events, and with ``--follow`` those that come until Ctrl-C."""
    path = "/api/cluster/events" + ("?follow=1" if options.follow else "")
    told = False
    try:
        for _, item in client(options).events(path, stall=3600):
            if options.json:
                print(json.dumps(item))
            else:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["time"]))
                print(harmless(f"{when}  {item['kind']:<18} {item['message']}"))
            sys.stdout.flush()
            told = True
    except KeyboardInterrupt:
        if not options.follow:
            raise
    if not told and not options.json:
        print("nothing has happened since this node started", file=sys.stderr)
    return Exit.DONE
