"""Files on their way to the disk: filled part by part, resumed after any end, in place only when whole.

They lie in a hidden folder of our own folder until every part is there and the check has passed; then that
folder is renamed. A part counts only after its bytes are on the disk. Blocks: call it in a thread.
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
from sollold.models.stores.safe_read import UNDECODABLE
from sollold.models.transfer.file_digest import digest_between, sha256_between
from sollold.units import bytes_text

PART = 8 << 20
"""Bytes of a part: what an interruption loses at the most, for each connection."""
PARTS = ".parts"
"""The folder, in our own, of what is on its way."""
OLD = ".old"
"""Ending of a model's folder in there that is being replaced."""
NOTES = "parts.json"


@dataclass(frozen=True, slots=True)
class Item:
    """A file to be fetched: under which name it is kept, its bytes, and its sha256 if that is known."""

    name: str
    size: int
    sha256: str = ""


class PartialFileError(Exception):
    """What came is not what was promised, or there is no room; the message says which."""


def slug(name: str, digest: str) -> str:
    """The folder's name for a model, readable and never two models' at once."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:120]}-{digest[:12]}"


class PartialFile:
    """One model's files while they come. `write` and `finish_part` may run in several threads."""

    def __init__(
        self, folder: Path, key: str, items: tuple[Item, ...], part: int = PART, *, model: str = ""
    ) -> None:
        """``folder``: our own folder. ``key``: tells the content; an earlier attempt of it is continued.

        ``model``: its name, for people who find what is left.
        """
        self.model = model
        self.items = items
        self.part = part
        self.folder = folder / PARTS / key
        self._own = folder
        self._files: dict[int, int] = {}
        self._noting = threading.Lock()
        self._stopped = threading.Event()
        self._done: dict[int, set[int]] = {index: set() for index in range(len(items))}
        self.measure = ""
        """The node by whose word the parts were checked."""

    def open(self) -> None:
        """Make or find the files.

        Raises:
            PartialFileError: there is not enough room.
            OSError: they can't be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._recall()
        left = sum(item.size for item in self.items) - self.completed
        free = shutil.disk_usage(self.folder).free
        if left > free:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where nothing has come yet
            raise PartialFileError(
                f"it needs {bytes_text(left)}, and the disk of {self._own} has {bytes_text(free)} free; "
                "free some space there and pull it again"
            )
        for index, item in enumerate(self.items):
            path = self.folder / item.name
            self._files[index] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if os.fstat(self._files[index]).st_size != item.size:
                self._done[index] = set()
                os.ftruncate(self._files[index], item.size)

    def stop(self) -> None:
        """End a `verify` in another thread: a hundred gigabytes take minutes."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of the files; what has come stays for the next attempt."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)

    @property
    def completed(self) -> int:
        """Bytes of the parts that are there."""
        return sum(self.completed_of(index) for index in range(len(self.items)))

    def completed_of(self, index: int) -> int:
        """Bytes of one file's parts that are there."""
        # Asked many times a second, so not part by part: a big model has tens of thousands of them.
        done, size = self._done[index], self.items[index].size
        short = -size % self.part if (size - 1) // self.part in done else 0
        return len(done) * self.part - short

    def span(self, index: int, part: int) -> tuple[int, int]:
        """First byte, and the one after the last, of a part."""
        return part * self.part, min((part + 1) * self.part, self.items[index].size)

    def missing(self) -> list[tuple[int, int]]:
        """(file, part) of all that is not there yet, in order."""
        return [
            (index, part)
            for index, item in enumerate(self.items)
            for part in range(-(-item.size // self.part))
            if part not in self._done[index]
        ]

    def unproved(self) -> list[tuple[int, int]]:
        """(file, part) of what is there of files whose sha256 was not promised, in order."""
        return [
            (index, part)
            for index, item in enumerate(self.items)
            for part in (() if item.sha256 else sorted(self._done[index]))
        ]

    def forget(self, index: int, part: int) -> None:
        """What is there of a part is wrong: it is to be fetched again."""
        with self._noting:
            self._done[index].discard(part)
            self._note()

    def write(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes where they belong.

        Raises:
            OSError: the disk is full, say.
        """
        write_all(self._files[index], offset, data)

    def finish_part(self, index: int, part: int) -> None:
        """All bytes of a part were written: bring them to the disk and note it."""
        os.fdatasync(self._files[index])
        with self._noting:
            self._done[index].add(part)
            self._note()

    def digest_of(self, index: int, part: int, key: str) -> str:
        """`digest_between` over a part's bytes on the disk.

        Raises:
            OSError: they can't be read.
        """
        return digest_between(self._files[index], *self.span(index, part), key, self._stopped.is_set)

    def verify(self, check: Callable[[Path], str]) -> None:
        """See that what came is what was promised; else throw it away. ``check`` gives a fault, or "".

        Raises:
            PartialFileError: it is not.
            OSError: it can't be read, or `stop` was called; what came stays.
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

    def settle(self, name: str, beside: dict[str, bytes]) -> Path:
        """Put all in place under ``name`` at once, with the small files ``beside`` it; gives the folder."""
        self.close()
        for file, content in beside.items():
            # Without its card a model would be there under another name after a power cut.
            with (self.folder / file).open("wb") as small:
                small.write(content)
                small.flush()
                os.fsync(small.fileno())
        _sync(self.folder)
        place = self._own / name
        if place.exists():
            # Named so that what is killed in between can be put back (`sollold.models.transfer.cleanup`).
            old = self.folder.with_name(f"{name}{OLD}")
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
            try:
                self.folder.rename(place)
            except OSError:
                old.rename(place)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(place)
        # Only now: until here a fetch that was killed goes on with all that has come.
        (place / NOTES).unlink(missing_ok=True)
        _sync(self._own)
        return place

    def _sha256(self, index: int, size: int) -> str:
        return sha256_between(self._files[index], 0, size, self._stopped.is_set)

    def _note(self) -> None:
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

    def _recall(self) -> None:
        notes = read_notes(self.folder)
        if notes is None:
            return
        if notes.part == self.part and notes.items == [(item.name, item.size) for item in self.items]:
            self._done = {index: set(done) for index, done in enumerate(notes.done)}
            self.measure = notes.measure


@dataclass(frozen=True, slots=True)
class Notes:
    """What is there of a fetch: the numbers of the parts of each item that are done, of ``part`` bytes each.

    ``measure``: the node by whose word they were checked; ``model``: whose files they are.
    """

    part: int
    items: list[tuple[str, int]]
    done: list[list[int]]
    measure: str = ""
    model: str = ""


def read_notes(folder: Path) -> Notes | None:
    """The notes of a fetch, None when there are none that can be read."""
    try:
        return msgspec.json.decode((folder / NOTES).read_bytes(), type=Notes)
    except (OSError, *UNDECODABLE):
        return None


def write_all(handle: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data`` to an open file, from ``offset`` on. Blocks.

    Raises:
        OSError: the disk is full, say.
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
