"""Returns the command that lets the daemon read a file, and gives nobody any other access."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
from pathlib import Path


def whoami() -> str:
    """Return the name of the user that the daemon runs as."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def permission_hint(path: Path, root: Path) -> str:
    """Return a command line that lets the daemon read ``path`` in the models folder ``root``.

    Folders above ``root`` are only made traversable: a home contains more than models. If the system has
    access lists, only the daemon's user gets access.
    """
    parents = list(root.absolute().parents)[::-1]
    closed = next((k for k, folder in enumerate(parents) if not os.access(folder, os.X_OK)), len(parents))
    # Anything below a closed folder is invisible from here: it may be closed as well.
    traversed, target = parents[closed:], root
    if not traversed:
        candidates = [root, *(folder for folder in reversed(path.parents) if root in folder.parents), path]
        target = next((candidate for candidate in candidates if not _readable(candidate)), path)
    if shutil.which("setfacl"):
        user = shlex.quote(whoami().removeprefix("user "))
        passing, reading = f"sudo setfacl -m u:{user}:x", f"sudo setfacl -R -m u:{user}:rX"
    else:
        passing, reading = "sudo chmod o+x", "sudo chmod -R o+rX"
    steps = [f"{passing} {shlex.join(map(str, traversed))}"] if traversed else []
    return " && ".join([*steps, f"{reading} {shlex.quote(str(target))}"])


def _readable(path: Path) -> bool:
    try:
        return os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
    except OSError:
        return False
