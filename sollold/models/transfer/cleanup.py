"""Restores, removes or reports what interrupted downloads have left in the folder for pulled models.

No folder is removed that contains a file which downloads don't create. All but `abandoned_in` blocks: call it
in a thread.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

from sollold.models.stores.patient_read import read_patiently
from sollold.models.stores.scan_result import Problem
from sollold.models.transfer.fetched_folder import OWN_FILES
from sollold.models.transfer.partial_file import OLD, PARTS, read_notes
from sollold.units import bytes_text, seconds_text

log = logging.getLogger("sollold.models")

_KEY = re.compile(r"[0-9a-f]{32}")
_LINKING = re.compile(r"\.[A-Za-z0-9._-]+-[0-9a-f]{12}\.new")
_DISK_SECONDS = 3.0
_DAY = 86400.0
"""Seconds for which a folder is left alone after its last change: a download may be under way."""


def sweep(own: Path, now: float) -> None:
    """Restore a model that was being replaced when the daemon was killed; remove useless leftovers.

    ``now``: seconds since the epoch. Never raises `OSError`: what can't be restored or removed stays.
    """
    for folder in _folders(own / PARTS):
        if folder.name.endswith(OLD):
            place = own / folder.name.removesuffix(OLD)
            if not place.exists():
                _restore(folder, place)
            else:
                _remove(folder, now)
        elif _KEY.fullmatch(folder.name) and not _resumable(folder):
            _remove(folder, now)
    for folder in _folders(own):
        if _LINKING.fullmatch(folder.name):
            _remove(folder, now)


async def abandoned_in(own: Path, now: float) -> list[Problem]:
    """Return the same as `abandoned`; nothing if the disk does not respond, which is reported elsewhere."""
    try:
        return await read_patiently(partial(abandoned, own, now), own, _DISK_SECONDS)
    except LookupError:
        return []


def abandoned(own: Path, now: float) -> list[Problem]:
    """Return the resumable downloads that have not been continued for a day."""
    found = []
    for folder in _folders(own / PARTS):
        age = now - _last_change(folder)
        notes = read_notes(folder)
        if not _KEY.fullmatch(folder.name) or notes is None or not any(notes.done) or age < _DAY:
            continue
        size = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file())
        problem = f"{bytes_text(size)} of {notes.model or 'a model'} have been in {folder} for "
        problem += f"{seconds_text(age)}: "
        fix = f"rm -r {shlex.quote(str(folder))}"
        if notes.model:
            fix = f"sollold pull {shlex.quote(notes.model)}   (or: {fix})"
        found.append(Problem(f"{problem}its download was interrupted.", fix))
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _restore(folder: Path, place: Path) -> None:
    try:
        folder.rename(place)
    except OSError as error:
        log.warning("%s can't be put back as %s: %s", folder, place, error)
    else:
        log.warning("put back %s, which was being replaced when the daemon ended", place)


def _remove(folder: Path, now: float) -> None:
    try:
        foreign = [path.name for path in folder.iterdir() if not _is_own(path)]
        if foreign or now - _last_change(folder) < _DAY:
            return
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is no longer needed but can't be removed: %s", folder, error)
    else:
        log.info("removed %s, left by an interrupted download", folder)


def _is_own(path: Path) -> bool:
    return path.name in OWN_FILES or (path.suffix == ".gguf" and (path.is_symlink() or path.is_file()))


def _resumable(folder: Path) -> bool:
    notes = read_notes(folder)
    return notes is not None and any(notes.done)


def _last_change(folder: Path) -> float:
    """Return when a folder or a file in it last changed, in seconds since the epoch; infinity if unknown."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return float("inf")
