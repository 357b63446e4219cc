"""The workers' tensors on disk, which make a second load over the network fast.

``ggml-rpc-server -c`` writes each tensor over 10 MiB to a file named by its hash, and trusts any file of that
name: a truncated file makes the model generate nonsense. It never deletes one either. So each worker gets a
folder of its own with hard links to files known to be complete, and its new files are taken over only once
its deployment has loaded completely. A file that has changed since is not offered again.

Files also come from `sollold.agent.cache_fill`, which creates them beside the worker's folder; they are moved
into it under their hash when llama-server sends the hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import threading
from dataclasses import field, replace
from pathlib import Path

import msgspec

from sollold.cluster.gossip.record import DIGEST_LENGTH, MOST_CACHED
from sollold.facts import dataclass
from sollold.settings.schema import GIB, MIB
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.engines")

_SPARE_BYTES = GIB
"""Bytes of disk space that the cache leaves free."""
_NAME = re.compile(r"^[0-9a-f]{16}$")


@dataclass(frozen=True, slots=True)
class _Known:
    """State of a complete file when it was taken over, by which later writes are detected.

    ``model``: digest of the model it belongs to; ``tensor``: name of the tensor, if known.
    """

    size: int
    mtime: int
    model: str = field(default="", compare=False)
    tensor: str = field(default="", compare=False)


class TensorCache:
    """``folder/whole`` holds the files, ``folder/work/<deployment>/rpc`` a worker's links, ``…/fill`` files
    that are being created for it.

    Its methods block: call them off the loop. If the disk fails, only caching is lost. Of several daemons
    with the same folder only the first uses it: they would delete each other's files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._lock_handle: int | None = None
        """The file whose lock makes this process the only one that uses the folder; never closed."""
        self._shared = False
        """Whether another process was found to use the folder."""
        self._whole = folder / "whole"
        self._work = folder / "work"
        self._index = folder / "whole.json"
        self._limit = limit
        self._lock = threading.Lock()
        self._kept_deployments: set[str] = set()
        self._offered: dict[str, dict[str, _Known]] = {}
        self._tensors: dict[str, dict[str, tuple[str, int]]] = {}
        """Deployment → name of a file → name and size in bytes of the tensor that its head asked for."""

    def remove_leftovers(self) -> None:
        """Delete what an earlier run's workers wrote and was not taken over."""
        with self._lock:
            self._own()

    def _own(self) -> bool:
        """Return whether this process alone uses the folder; if it begins to, remove leftovers."""
        if self._lock_handle is not None:
            return True
        handle = -1
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if handle >= 0:
                os.close(handle)
            if not self._shared:
                text = (
                    "workers cache no tensors: another sollold uses %s; set node.cache_dir to another folder"
                )
                log.warning(text, self._folder)
            self._shared = True
            return False
        except OSError as error:
            # A file system without locks, or a fault that the next operation reports.
            log.debug("%s can't be locked: %s", self._folder, error)
        self._lock_handle, self._shared = handle, False
        shutil.rmtree(self._work, ignore_errors=True)
        return True

    def make_folder(self, deployment: str, size: int) -> Path | None:
        """Create the ``LLAMA_CACHE`` for the worker of ``deployment``, which may write ``size`` bytes.

        Returns None if the disk is too full, or another daemon uses the cache: then the worker runs without.
        """
        with self._lock:
            if not self._own():
                return None
            try:
                folder = self._work / deployment / "rpc"
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._whole.mkdir(parents=True, exist_ok=True, mode=0o700)
                known = self._verified()
                if shutil.disk_usage(folder).free < size + _SPARE_BYTES:
                    log.info("the worker of %s caches no tensors: the disk is too full", deployment)
                    shutil.rmtree(folder.parent, ignore_errors=True)
                    return None
                for name in known:
                    os.link(self._whole / name, folder / name)
                self._offered[deployment] = known
                return folder.parent
            except OSError as error:
                log.warning("no cache for the worker of %s: %s", deployment, error)
                shutil.rmtree(self._work / deployment, ignore_errors=True)
                return None

    def fill_folder(self, deployment: str) -> Path | None:
        """Create the folder for files prepared for a worker; None if the worker has no cache.

        Raises:
            OSError: it can't be created.
        """
        with self._lock:
            if deployment not in self._offered:
                return None
            folder = self._work / deployment / "fill"
            folder.mkdir(exist_ok=True, mode=0o700)
            return folder

    def offered(self, deployment: str, digest: str) -> dict[str, Path]:
        """Return the model's tensors that the worker of ``deployment`` has already, with their files."""
        with self._lock:
            known = self._offered.get(deployment, {})
            folder, model = self._work / deployment / "rpc", digest[:DIGEST_LENGTH]
            return {
                entry.tensor: folder / name
                for name, entry in known.items()
                if entry.model == model and entry.tensor
            }

    def place(self, deployment: str, name: str, tensor: str, size: int, file: Path | None) -> int:
        """Give the worker ``file`` as ``name``, the hash of ``tensor``, unless it has that already.

        A file of this name that does not have the tensor's ``size`` in bytes is deleted from the cache.

        Returns:
            Size in bytes of the file that the worker finds now; 0 without one.

        Raises:
            OSError: the file can't be moved.
        """
        with self._lock:
            if deployment not in self._offered or not _NAME.match(name):
                return 0
            path = self._work / deployment / "rpc" / name
            if path.exists() and path.stat().st_size != size:
                log.warning("removed the cached tensor %s: it is incomplete", name)
                path.unlink()
                (self._whole / name).unlink(missing_ok=True)
                self._offered[deployment].pop(name, None)
            if file is not None and not path.exists():
                file.rename(path)
            self._tensors.setdefault(deployment, {})[name] = tensor, size
            return path.stat().st_size if path.exists() else 0

    def models(self) -> tuple[tuple[str, int], ...]:
        """Return (digest prefix of a model, bytes cached of it) for the most recent models."""
        with self._lock:
            try:
                known = self._read() if self._own() else {}
            except OSError:
                return ()
        sizes: dict[str, int] = {}
        for entry in sorted(known.values(), key=lambda entry: -entry.mtime):
            if entry.model:
                sizes[entry.model] = sizes.get(entry.model, 0) + entry.size
        return tuple(sizes.items())[:MOST_CACHED]

    def keep(self, deployment: str, digest: str = "") -> None:
        """Take over the files of the worker of ``deployment``, all of whose tensors have arrived. Idempotent.

        ``digest``: digest of its model.
        """
        with self._lock:
            folder = self._work / deployment / "rpc"
            if deployment in self._kept_deployments or not folder.is_dir():
                return
            self._kept_deployments.add(deployment)
            try:
                if shutil.disk_usage(folder).free < 256 * MIB:
                    # On a full disk the worker truncates files silently.
                    log.info("the tensors of %s are not cached: the disk is full", deployment)
                    return
                # A user may have emptied the cache meanwhile.
                self._whole.mkdir(parents=True, exist_ok=True, mode=0o700)
                known = self._verified()
                offered = self._offered.get(deployment, {})
                tensors = self._tensors.get(deployment, {})
                for name, entry in known.items():
                    if not entry.tensor and name in tensors and entry.model == digest[:DIGEST_LENGTH]:
                        known[name] = replace(entry, tensor=tensors[name][0])
                for file in folder.iterdir():
                    if not _NAME.match(file.name) or file.name in known or not file.stat().st_size:
                        continue
                    if offered.get(file.name, _state_of(file)) != _state_of(file):
                        continue  # We offered this file, and it has been written to.
                    tensor, size = tensors.get(file.name, ("", 0))
                    if size and file.stat().st_size != size:
                        log.warning("the tensor %s is not cached: its file is incomplete", file.name)
                        continue  # The disk or a quota was full for a moment.
                    with contextlib.suppress(FileExistsError):
                        os.link(file, self._whole / file.name)
                        state = _state_of(self._whole / file.name)
                        known[file.name] = replace(state, model=digest[:DIGEST_LENGTH], tensor=tensor)
                self._prune(known)
            except OSError as error:
                log.warning("the tensors of %s are not cached: %s", deployment, error)

    def remove_folder(self, deployment: str) -> None:
        """Delete the folder of a worker that has ended. Files that were taken over stay."""
        with self._lock:
            self._kept_deployments.discard(deployment)
            self._offered.pop(deployment, None)
            self._tensors.pop(deployment, None)
            shutil.rmtree(self._work / deployment, ignore_errors=True)

    def _verified(self) -> dict[str, _Known]:
        """Return the complete files. Others are deleted: truncated, or modified since."""
        known = self._read()
        for file in list(self._whole.iterdir()):
            if known.get(file.name) != _state_of(file):
                log.warning("removed the cached tensor %s: it changed on disk", file.name)
                known.pop(file.name, None)
                file.unlink(missing_ok=True)
        present = {file.name for file in self._whole.iterdir()}
        return {name: value for name, value in known.items() if name in present}

    def _prune(self, known: dict[str, _Known]) -> None:
        """Delete the least recently read files until the rest is within the limit; write the index."""
        total = sum(entry.size for entry in known.values())

        def used(name: str) -> float:
            state = (self._whole / name).stat()
            return max(state.st_atime, state.st_mtime)

        for name in sorted(known, key=used):
            if total <= self._limit:
                break
            (self._whole / name).unlink(missing_ok=True)
            total -= known.pop(name).size
        self._write(known)

    def _read(self) -> dict[str, _Known]:
        try:
            return msgspec.json.decode(self._index.read_bytes(), type=dict[str, _Known])
        except (FileNotFoundError, *UNDECODABLE):
            return {}

    def _write(self, known: dict[str, _Known]) -> None:
        fresh = self._index.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(known))
        fresh.replace(self._index)


def _state_of(file: Path) -> _Known:
    state = file.stat()
    return _Known(state.st_size, state.st_mtime_ns)
