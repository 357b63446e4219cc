"""``sollold logs``: the daemon's journal on this machine, or what a model's engines wrote."""

from __future__ import annotations

import argparse
import subprocess
import sys
from urllib.parse import quote

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit
from sollold.cli.streams import harmless


def logs(options: argparse.Namespace) -> int:
    """The last lines; without a model: of the service's journal on this machine."""
    if not options.model:
        return _journal(options)
    path = f"/api/cluster/logs/{quote(options.model)}?lines={options.lines}"
    found = client(options).get(path)["logs"]
    if options.json:
        print_json(found)
        return Exit.DONE
    for log in found:
        print(harmless(f"==> {log['deployment']} on {log['node']}: {log['process'] or log['reason']} <=="))
        if log["text"]:
            print("\n".join(harmless(line) for line in log["text"].splitlines()))
        print()
    return Exit.DONE


def _journal(options: argparse.Namespace) -> int:
    if options.node:
        print(
            "sollold: another machine's journal is read there (journalctl -u sollold); "
            "`sollold logs MODEL` reads a model's engines from anywhere",
            file=sys.stderr,
        )
        return Exit.USAGE
    words = ["journalctl", "-u", "sollold", "-n", str(options.lines), "--no-pager"]
    if options.json:
        words += ["-o", "json"]
    try:
        return subprocess.run(words, check=False).returncode
    except FileNotFoundError:
        print("sollold: there is no journalctl here; the daemon's output is its log", file=sys.stderr)
        return Exit.FAILED
