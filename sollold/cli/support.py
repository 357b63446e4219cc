"""``sollold support``: write an archive for a bug report, without secrets."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sollold.cli.asking import client, print_json
from sollold.cli.exit import Exit
from sollold.cli.own_version import own_version
from sollold.cli.service import journalctl
from sollold.client.errors import ClientError, NodeSilent
from sollold.settings.document import in_force
from sollold.settings.fault import SettingsError
from sollold.settings.load import load

_MAX_LINES = 5000
"""Maximum journal lines in the archive."""


def support(options: argparse.Namespace) -> int:
    """Write ``sollold-support-TIME.tar.gz`` (or the named file), and print its path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    default = f"sollold-support-{stamp}.tar.gz"
    file = Path(options.output or default)
    if file.is_dir():
        file /= default
    daemon = client(options)
    silent: list[ClientError] = []

    def asked(ask: Callable[[str], Any], path: str) -> Any:
        if silent:
            raise silent[0]
        try:
            return ask(path)
        except ClientError as error:
            if isinstance(error, NodeSilent):
                silent.append(error)  # each further question would take as long
            raise

    parts: dict[str, Callable[[], str]] = {
        "version.txt": _versions,
        "settings.toml": _settings,
        "journal.txt": _journal,
        "cluster.json": lambda: _json(asked(daemon.get, "/api/cluster")),
        "doctor.json": lambda: _json(asked(daemon.get, "/api/doctor")),
        "models.json": lambda: _json(asked(daemon.get, "/api/tags")),
        "events.txt": lambda: asked(daemon.text, "/api/cluster/events?last=1000"),
        "metrics.txt": lambda: asked(daemon.text, "/metrics"),
    }
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, make in parts.items():
            try:
                text = make()
            except (ClientError, OSError, SettingsError, subprocess.SubprocessError) as error:
                text = f"not available: {error}\n"
            part = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"sollold-support-{stamp}/{name}")
            entry.size, entry.mtime, entry.mode = len(part), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(part))
    _write(file, data.getvalue())
    if options.json:
        print_json({"file": str(file)})
        return Exit.DONE
    print(file)
    print(
        "It holds versions, settings without secrets, the journal, the cluster's state and the names of your "
        "models and machines; no prompts and no answers. Look through it before you share it.",
        file=sys.stderr,
    )
    return Exit.DONE


def _write(file: Path, data: bytes) -> None:
    """Write the archive atomically: never leave a partial file, or lose the previous one.

    Raises:
        OSError: it can't be written, for example on a full disk.
    """
    target = file.resolve()
    is_pipe = target.exists() and not target.is_file()
    temporary = target if is_pipe else target.with_name(f"{target.name}.new")
    try:
        with temporary.open("wb") as out:
            out.write(data)
        if not is_pipe:
            temporary.replace(target)
    except OSError as error:
        error.filename = str(file)
        if not is_pipe:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _versions() -> str:
    lines = [
        f"sollold {own_version()}",
        f"Python {platform.python_version()}",
        f"{platform.system()} {platform.release()} {platform.machine()}",
    ]
    release = Path("/etc/os-release")
    return "\n".join(lines) + "\n" + (release.read_text() if release.exists() else "")


def _settings() -> str:
    """The effective settings as in a settings file; `in_force` omits secrets."""
    found = load(skip_unreadable=True)
    return "\n".join(f"{key} = {value}  # {source}" for key, value, source in in_force(found)) + "\n"


def _journal() -> str:
    words = [*journalctl(), "-n", str(_MAX_LINES), "--no-pager", "-o", "short-iso-precise"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout or done.stderr
