"""``sollold doctor``: list problems, and how to fix them."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import textwrap
from typing import Any

from sollold.cli.asking import client, console, here, named, print_json
from sollold.cli.exit import Exit
from sollold.cli.service import journalctl, systemctl
from sollold.client.errors import ClientError, NodeSilent
from sollold.settings.fault import SettingsError
from sollold.settings.load import load

_MARGIN = 9


def doctor(options: argparse.Namespace) -> int:
    """Ask the daemon; if it does not respond, find out why."""
    try:
        found = client(options).get("/api/doctor")["findings"]
    except ClientError as error:
        hung = isinstance(error, NodeSilent)
        if named(options) or (error.status and not hung):
            raise  # another machine was asked: problems of this one are not the reason
        found = [_problem(error.message, _fix())] if hung else [_problem(error.message, ""), *_why_silent()]
    if options.json:
        print_json(found)
    else:
        _show(found)
    return Exit.FAILED if any(finding["grade"] == "problem" for finding in found) else Exit.DONE


def _show(found: list[dict[str, Any]]) -> None:
    out = console()
    if not found:
        out.print("no problems found", style="green")
    for finding in found:
        problem = finding["grade"] == "problem"
        first, *rest = textwrap.wrap(
            finding["what"], max(20, out.width - _MARGIN), break_long_words=False, break_on_hyphens=False
        )
        out.print(f"{finding['grade']:{_MARGIN}}", style="red" if problem else "yellow", end="")
        out.print(first, soft_wrap=True)
        for line in rest:
            out.print(f"{'':{_MARGIN}}{line}", soft_wrap=True)
        if finding["fix"]:
            # On one line of any length, so that it can be copied.
            out.print(f"{'→ ':>{_MARGIN + 2}}{finding['fix']}", style="bold", soft_wrap=True)


def _why_silent() -> list[dict[str, Any]]:
    """Explain why no daemon responds on this machine."""
    found = []
    loaded, active = _service()
    control = " ".join(systemctl())
    as_root = "" if "--user" in control else "sudo "
    log = f"{as_root}{' '.join(journalctl())} -n 30"
    if active == "failed":
        found.append(_problem("the service has failed", log))
    elif active in ("activating", "reloading"):
        # With Restart=on-failure a service that can't start is rarely "failed".
        found.append(_problem("the service is starting, or keeps failing and restarting", log))
    elif active in ("active", "deactivating"):
        text = "the service runs but does not answer: hung, stopping, or on another address or port"
        found.append(_problem(text, log))
    elif loaded == "loaded":
        found.append(_problem("the service is not started", f"{as_root}{control} enable --now sollold"))
    elif loaded in ("", "not-found"):
        # Without systemd, or for root, there is no service of a user.
        by_user = "sollold install --user --now; or, in this terminal: " if loaded and os.geteuid() else ""
        text = "the sollold service is not installed on this machine"
        found.append(_problem(text, f"{by_user}sollold run"))
    else:
        text = f"the service can't be started: systemd reports its unit as {loaded}"
        found.append(_problem(text, f"{control} status sollold"))
    try:
        load(skip_unreadable=True)
    except SettingsError as error:
        found.append(_problem(str(error), f"correct it, then {as_root}{control} restart sollold"))
    host, port = here()
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        text = f"the program that listens on port {port} is not a sollold node"
        found.append(_problem(text, f"sudo ss -ltnp 'sport = :{port}'"))
    return found


def _fix() -> str:
    """How to restart a daemon that accepts connections but does not respond."""
    _, active = _service()
    if not active or active == "inactive":
        return "end its process, and start it again"
    control = " ".join(systemctl())
    return f"{control} restart sollold" if "--user" in control else f"sudo {control} restart sollold"


def _service() -> tuple[str, str]:
    """systemd's LoadState and ActiveState of the service; empty without systemd."""
    words = [*systemctl(), "show", "sollold.service", "--property=LoadState,ActiveState"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    states = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return states.get("LoadState", ""), states.get("ActiveState", "")


def _problem(text: str, fix: str) -> dict[str, Any]:
    return {"grade": "problem", "what": text, "fix": fix}
