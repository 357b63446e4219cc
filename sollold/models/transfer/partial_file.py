"""Incomplete downloads on disk: filled part by part, resumable, moved into place only when complete.

They stay in a hidden subfolder of the folder for pulled models until every part is there and the check has
passed; then that subfolder is renamed. A part counts only once its bytes are on the disk. Blocks: call it in
a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from sollold.facts import dataclass
from sollold.models.transfer.fetched_folder import NOTES, merge_foreign
from sollold.models.transfer.file_digest import digest_between, sha256_between
from sollold.undecodable import UNDECODABLE
from sollold.units import bytes_text

PART = 8 << 20
"""Size of a part, in bytes: the most that an interruption loses per connection."""
PARTS = ".parts"
"""Subfolder for incomplete downloads in the folder for pulled models."""
OLD = ".old"
"""Suffix of a model's folder in `PARTS` while it is being replaced."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file to download: its local name, its size in bytes, and its sha256 if known."""

    name: str
    size: int
    sha256: str = ""


class PartialFileError(Exception):
    """The received data is not what was announced, or there is no room; the message says which."""


def slug(name: str, digest: str) -> str:
    """Return the folder name for a model, readable and unique by content."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:120]}-{digest[:12]}"


class PartialFile:
    """One model's files during a download. `write` and `finish_part` may run in several threads."""

    def __init__(
        self, folder: Path, key: str, items: tuple[Item, ...], part: int = PART, *, model: str = ""
    ) -> None:
        """Prepare a download without touching the disk.

        ``folder``: the folder for pulled models. ``key``: identifies the content; an earlier attempt with the
        same key is resumed. ``model``: its name, for users who find the leftovers.
        """
        self.model = model
        self.items = items
        self.part = part
        self.folder = folder / PARTS / key
        self._own = folder
        self._files: dict[int, int] = {}
        self._notes_lock = threading.Lock()
        self._stopped = threading.Event()
        self._done: dict[int, set[int]] = {index: set() for index in range(len(items))}
        self.measure = ""
        """The node that verified the parts."""

    def open(self) -> None:
        """Create or open the files.

        Raises:
            PartialFileError: there is not enough room.
            OSError: they can't be created.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read_notes()
        for index, item in enumerate(self.items):
            if not _has_size(self.folder / item.name, item.size):
                self._done[index] = set()
        needed = sum(item.size for item in self.items) - self.completed
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only succeeds if nothing was received yet
            raise PartialFileError(
                f"it needs {bytes_text(needed)}, and the disk of {self._own} has {bytes_text(free)} free; "
                "free some space there and pull it again"
            )
        for index, item in enumerate(self.items):
            path = self.folder / item.name
            self._files[index] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._files[index], item.size)

    def stop(self) -> None:
        """Stop a `verify` or digest in another thread: hundreds of gigabytes take minutes."""
        self._stopped.set()

    def close(self) -> None:
        """Close the files; completed parts stay for the next attempt."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    @property
    def total(self) -> int:
        """Size of all files, in bytes."""
        return sum(item.size for item in self.items)

    @property
    def completed(self) -> int:
        """Size of all completed parts, in bytes."""
        return sum(self.completed_of(index) for index in range(len(self.items)))

    def completed_of(self, index: int) -> int:
        """Return the size of one file's completed parts, in bytes."""
        # Called many times a second, so parts are not summed one by one: a large model has tens of thousands.
        done, size = self._done[index], self.items[index].size
        short = -size % self.part if (size - 1) // self.part in done else 0
        return len(done) * self.part - short

    def span(self, index: int, part: int) -> tuple[int, int]:
        """Return the offsets of a part's first byte and of the byte after its last."""
        return part * self.part, min((part + 1) * self.part, self.items[index].size)

    def missing(self) -> list[tuple[int, int]]:
        """Return (file, part) of all missing parts, in order."""
        return [
            (index, part)
            for index, item in enumerate(self.items)
            for part in range(-(-item.size // self.part))
            if part not in self._done[index]
        ]

    def unproved(self) -> list[tuple[int, int]]:
        """Return (file, part) of the completed parts of files without a known sha256, in order."""
        return [
            (index, part)
            for index, item in enumerate(self.items)
            for part in (() if item.sha256 else sorted(self._done[index]))
        ]

    def forget(self, index: int, part: int) -> None:
        """Discard a completed part, so that it is fetched again."""
        with self._notes_lock:
            self._done[index].discard(part)
            self._write_notes()

    def write(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes to one file at an offset.

        Raises:
            OSError: writing failed, for example because the disk is full.
        """
        write_all(self._files[index], offset, data)

    def finish_part(self, index: int, part: int) -> None:
        """Sync a part whose bytes have all been written to the disk, and record it."""
        os.fdatasync(self._files[index])
        with self._notes_lock:
            self._done[index].add(part)
            self._write_notes()

    def digest_of(self, index: int, part: int, key: str) -> str:
        """Return `digest_between` of a part's bytes on the disk.

        Raises:
            OSError: they can't be read.
        """
        return digest_between(self._files[index], *self.span(index, part), key, self._stopped.is_set)

    def verify(self, check: Callable[[Path], str]) -> None:
        """Verify the files, and discard them if they are wrong. ``check`` returns a fault, or "".

        Raises:
            PartialFileError: the files are wrong.
            OSError: they can't be read, or `stop` was called; they are kept.
        """
        fault = ""
        for index, item in enumerate(self.items):
            if item.sha256 and self._sha256(index, item.size) != item.sha256:
                fault = fault or f"{item.name} does not have the expected sha256"
        fault = fault or check(self.folder)
        if fault:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise PartialFileError(f"{fault}; the download was discarded, pull it again")

    def link(self, paths: tuple[str, ...]) -> None:
        """Fill the folder with hard links to complete files instead of a download; then only `settle` it.

        Raises:
            OSError: the file system has no hard links, or does not allow one to these files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for item, path in zip(self.items, paths, strict=True):
            link = self.folder / item.name
            link.unlink(missing_ok=True)
            link.hardlink_to(Path(path).resolve())

    def settle(self, name: str, small_files: dict[str, bytes], replaces: Path | None = None) -> Path:
        """Move all files into place under ``name`` at once, with ``small_files`` (name → content).

        ``replaces``: folder of an older version, which is removed; it is restored on failure. A user's files
        in it are kept.

        Returns the folder.

        Raises:
            OSError: the files can't be moved into place.
        """
        self.close()
        for file, content in small_files.items():
            # Without its card on disk, a model would appear under another name after a power cut.
            with (self.folder / file).open("wb") as small:
                small.write(content)
                small.flush()
                os.fsync(small.fileno())
        _sync(self.folder)
        place = self._own / name
        older = replaces or place
        if older != place:
            merge_foreign(place, self.folder)
        if older.exists():
            # Named so that it can be restored after a kill in between (`sollold.models.transfer.cleanup`).
            old = self.folder.with_name(f"{name}{OLD}")
            merge_foreign(old, self.folder)
            older.rename(old)
            try:
                self.folder.rename(place)
            except OSError:
                old.rename(older)
                raise
            merge_foreign(old, place)
        else:
            self.folder.rename(place)
        # Only now: until here a killed download can resume with everything received.
        (place / NOTES).unlink(missing_ok=True)
        _sync(self._own)
        return place

    def _sha256(self, index: int, size: int) -> str:
        return sha256_between(self._files[index], 0, size, self._stopped.is_set)

    def _write_notes(self) -> None:
        notes = Notes(
            self.part,
            [(i.name, i.size) for i in self.items],
            [sorted(d) for d in self._done.values()],
            self.measure,
            self.model,
        )
        new = self.folder / f"{NOTES}.new"
        new.write_bytes(msgspec.json.encode(notes))
        new.replace(self.folder / NOTES)

    def _read_notes(self) -> None:
        notes = read_notes(self.folder)
        if notes is None:
            return
        if notes.part == self.part and notes.items == [(item.name, item.size) for item in self.items]:
            self._done = {index: set(done) for index, done in enumerate(notes.done)}
            self.measure = notes.measure


@dataclass(frozen=True, slots=True)
class Notes:
    """The record of a download: numbers of the completed parts of each item, of ``part`` bytes each.

    ``measure``: the node that verified them; ``model``: name of the model.
    """

    part: int
    items: list[tuple[str, int]]
    done: list[list[int]]
    measure: str = ""
    model: str = ""


def read_notes(folder: Path) -> Notes | None:
    """Return the record of a download, or None if there is none that can be read."""
    try:
        return msgspec.json.decode((folder / NOTES).read_bytes(), type=Notes)
    except (OSError, *UNDECODABLE):
        return None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def write_all(handle: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data`` to an open file, starting at ``offset``. Blocks.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
