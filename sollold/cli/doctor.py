"""``sollold doctor``: what is wrong and the one command that mends it."""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
from typing import Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.client.http import ClientError
from sollold.settings import load


async def doctor(options: argparse.Namespace) -> int:
    """Ask the daemon; if it does not answer, look for why."""
    try:
        async with client(options) as daemon:
            found = (await daemon.get("/api/doctor"))["findings"]
    except ClientError as error:
        if error.status or options.node:
            raise
        found = [{"grade": "problem", "what": error.message, "mend": ""}, *_why_silent()]
    if options.json:
        print_json(found)
    else:
        _show(found)
    return Exit.FAILED if any(finding["grade"] == "problem" for finding in found) else Exit.DONE


def _show(found: list[dict[str, Any]]) -> None:
    out = console()
    if not found:
        out.print("nothing is wrong", style="green")
    for finding in found:
        problem = finding["grade"] == "problem"
        out.print("problem" if problem else "notice ", style="red" if problem else "yellow", end="  ")
        out.print(finding["what"])
        if finding["mend"]:
            out.print(f"         → {finding['mend']}", style="bold")


def _why_silent() -> list[dict[str, Any]]:
    """Why no daemon answers on this machine."""
    http = load(skip_unreadable=True).settings.http
    found = []
    if shutil.which("systemctl"):
        words = ["systemctl", "is-active", "sollold"]
        state = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        if state == "failed":
            found.append(_problem("the service has failed", "journalctl -u sollold -n 30"))
        elif state in ("inactive", "unknown", ""):
            found.append(_problem("the service is not started", "sudo systemctl enable --now sollold"))
    with socket.socket() as link:
        link.settimeout(2)
        if link.connect_ex(("127.0.0.1", http.port)) == 0:
            what = f"something else listens on port {http.port}"
            found.append(_problem(what, f"sudo ss -ltnp 'sport = :{http.port}'"))
    return found


def _problem(what: str, mend: str) -> dict[str, Any]:
    return {"grade": "problem", "what": what, "mend": mend}
