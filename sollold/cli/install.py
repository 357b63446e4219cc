"""``sollold install --user``: a systemd user service, for installations by pipx, uv or pip."""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sollold.cli.exit import Exit
from sollold.cli.service import unit_file
from sollold.settings.state_file import write_whole

_MARK = "# Written by `sollold install --user`."
_UNIT = """\
{mark}
[Unit]
Description=sollold: run large language models across the machines of a LAN
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command} run
ExecReload=/bin/kill -HUP $MAINPID
ExecReload={command} config --check
WatchdogSec=60
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2
TimeoutStopSec=90
KillMode=mixed
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


def install(options: argparse.Namespace) -> int:
    """Write the unit and start it or say how to; or remove it."""
    if os.geteuid() == 0:
        print(
            "sollold: root has the Debian package for this (apt install ./sollold_*.deb); "
            "`install --user` is for a user's own service",
            file=sys.stderr,
        )
        return Exit.USAGE
    file = unit_file()
    if file.exists() and not file.read_text(errors="replace").startswith(_MARK):
        print(f"sollold: {file} was not written by this command and is left alone", file=sys.stderr)
        return Exit.FAILED
    if options.remove:
        return _remove(file)
    command = Path(sys.argv[0]).absolute() if Path(sys.argv[0]).name == "sollold" else None
    found = str(command or shutil.which("sollold") or "")
    if not found:
        print(
            "sollold: the command sollold is not in PATH; try `pipx ensurepath`",
            file=sys.stderr,
        )
        return Exit.FAILED
    file.parent.mkdir(parents=True, exist_ok=True)
    # Follow a link, as used by people who keep such files elsewhere; and never write half a file.
    write_whole(file.resolve(), unit(found).encode())
    print(f"wrote {file}")
    if options.now:
        _systemctl("daemon-reload")
        if _systemctl("enable", "--now", "sollold"):
            return Exit.FAILED
        print("started: see `sollold status`")
    else:
        print("start it, now and at every login:\n  systemctl --user daemon-reload")
        print("  systemctl --user enable --now sollold")
    print("to start it with the machine, without a login:")
    print(f"  sudo loginctl enable-linger {getpass.getuser()}")
    return Exit.DONE


def unit(command: str) -> str:
    """The text of the unit. ``command``: the program's path; systemd's specifiers in it are escaped."""
    escaped = command.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"').replace("$", "$$")
    return _UNIT.format(mark=_MARK, command=f'"{escaped}"' if " " in escaped else escaped)


def _remove(file: Path) -> int:
    if not file.exists():
        print("there is no such service")
        return Exit.DONE
    _systemctl("disable", "--now", "sollold")
    file.unlink()
    _systemctl("daemon-reload")
    print(f"removed {file}; settings, models and state are left")
    return Exit.DONE


def _systemctl(*words: str) -> int:
    try:
        return subprocess.run(["systemctl", "--user", *words], check=False, timeout=120).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"sollold: systemctl --user {' '.join(words)}: {error}", file=sys.stderr)
        return 1
