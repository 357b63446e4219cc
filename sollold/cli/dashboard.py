"""``sollold dashboard``: print the dashboard's address, and open it if there is a desktop."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit


def dashboard(options: argparse.Namespace) -> int:
    """Print the address; open a browser if there is a desktop and ``--print`` was not given."""
    daemon = client(options, timeout=5.0)
    daemon.get("/api/version")
    if options.json:
        print_json({"url": daemon.url})
        return Exit.DONE
    print(daemon.url)
    opener = shutil.which("xdg-open")
    if opener and not options.print and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        subprocess.Popen(
            [opener, daemon.url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Exit.DONE
