"""The workers' tensors on disk, so that a second load over the network is quick.

``ggml-rpc-server -c`` writes each tensor over 10 MiB to a file named by its hash, and believes whatever it
finds under that name: a file cut short gives a model that answers nonsense. It never deletes one either.
So each worker gets a folder of its own with hard links to what is known to be whole, and what it wrote is
taken over only when its deployment was loaded to the end. A file that changed since is not offered again.

Files also come from `sollold.agent.cache_fill`, which makes them beside the worker's folder; they get their
name, and so come into it, when llama-server tells the hash.
"""

from __future__ import annotations

import contextlib
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

log = logging.getLogger("sollold.engines")

_SPARE = GIB
"""Bytes of the disk that the cache leaves free."""
_NAME = re.compile(r"^[0-9a-f]{16}$")


@dataclass(frozen=True, slots=True)
class _Known:
    """How a whole file looked when it was taken over: any write since would show.

    ``model``: digest of the model for which it came; ``tensor``: which of its tensors it is, where that is
    known.
    """

    size: int
    mtime: int
    model: str = field(default="", compare=False)
    tensor: str = field(default="", compare=False)


class TensorCache:
    """``folder/whole`` holds the files, ``folder/work/<deployment>/rpc`` each worker's links, ``…/fill`` what
    is being made for it.

    Its methods touch the disk: call them off the loop. A disk that fails costs the cache, nothing else.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._whole = folder / "whole"
        self._work = folder / "work"
        self._index = folder / "whole.json"
        self._limit = limit
        self._lock = threading.Lock()
        self._taken: set[str] = set()
        self._offered: dict[str, dict[str, _Known]] = {}
        self._tensors: dict[str, dict[str, str]] = {}

    def remove_leftovers(self) -> None:
        """Remove what workers of an earlier run wrote and nobody took over."""
        with self._lock:
            shutil.rmtree(self._work, ignore_errors=True)

    def make_folder(self, deployment: str, size: int) -> Path | None:
        """A folder for the worker of ``deployment`` (its ``LLAMA_CACHE``), which may write ``size`` bytes.

        None when the disk has no room for that: then the worker runs without.
        """
        with self._lock:
            try:
                folder = self._work / deployment / "rpc"
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._whole.mkdir(parents=True, exist_ok=True, mode=0o700)
                known = self._verified()
                if shutil.disk_usage(folder).free < size + _SPARE:
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
        """A folder for files that are made for a worker; None when it caches nothing.

        Raises:
            OSError: it can't be made.
        """
        with self._lock:
            if deployment not in self._offered:
                return None
            folder = self._work / deployment / "fill"
            folder.mkdir(exist_ok=True, mode=0o700)
            return folder

    def offered(self, deployment: str, digest: str) -> dict[str, Path]:
        """The tensors of the model that the worker of ``deployment`` finds already, and their files."""
        with self._lock:
            known = self._offered.get(deployment, {})
            folder, model = self._work / deployment / "rpc", digest[:DIGEST_LENGTH]
            return {
                one.tensor: folder / name for name, one in known.items() if one.model == model and one.tensor
            }

    def place(self, deployment: str, name: str, tensor: str, file: Path | None) -> int:
        """``name`` is the hash of ``tensor``: let the worker find ``file`` by it, if it has none yet.

        Returns:
            Bytes of what it finds by it now.

        Raises:
            OSError: it can't be put there.
        """
        with self._lock:
            if deployment not in self._offered or not _NAME.match(name):
                return 0
            place = self._work / deployment / "rpc" / name
            if file is not None and not place.exists():
                file.rename(place)
            self._tensors.setdefault(deployment, {})[name] = tensor
            return place.stat().st_size if place.exists() else 0

    def models(self) -> tuple[tuple[str, int], ...]:
        """(beginning of a model's digest, bytes of it that are kept), some of the latest."""
        with self._lock:
            try:
                known = self._read()
            except OSError:
                return ()
        sizes: dict[str, int] = {}
        for one in sorted(known.values(), key=lambda one: -one.mtime):
            if one.model:
                sizes[one.model] = sizes.get(one.model, 0) + one.size
        return tuple(sizes.items())[:MOST_CACHED]

    def keep(self, deployment: str, digest: str = "") -> None:
        """Every tensor of ``deployment`` has arrived: take over what its worker wrote. Once is enough.

        ``digest``: of its model.
        """
        with self._lock:
            folder = self._work / deployment / "rpc"
            if deployment in self._taken or not folder.is_dir():
                return
            self._taken.add(deployment)
            try:
                if shutil.disk_usage(folder).free < 256 * MIB:
                    # A full disk cuts files short without a word from the worker.
                    log.info("the tensors of %s are not cached: the disk is full", deployment)
                    return
                # A user may have emptied the cache meanwhile.
                self._whole.mkdir(parents=True, exist_ok=True, mode=0o700)
                known = self._verified()
                offered = self._offered.get(deployment, {})
                tensors = self._tensors.get(deployment, {})
                for name, one in known.items():
                    if not one.tensor and name in tensors and one.model == digest[:DIGEST_LENGTH]:
                        known[name] = replace(one, tensor=tensors[name])
                for file in folder.iterdir():
                    if not _NAME.match(file.name) or file.name in known or not file.stat().st_size:
                        continue
                    if offered.get(file.name, _look(file)) != _look(file):
                        continue  # It is not the worker's work, and somebody has written to it.
                    with contextlib.suppress(FileExistsError):
                        os.link(file, self._whole / file.name)
                        look = _look(self._whole / file.name)
                        known[file.name] = replace(
                            look, model=digest[:DIGEST_LENGTH], tensor=tensors.get(file.name, "")
                        )
                self._prune(known)
            except OSError as error:
                log.warning("the tensors of %s are not cached: %s", deployment, error)

    def remove_folder(self, deployment: str) -> None:
        """The worker is dead: remove its folder. What was taken over stays."""
        with self._lock:
            self._taken.discard(deployment)
            self._offered.pop(deployment, None)
            self._tensors.pop(deployment, None)
            shutil.rmtree(self._work / deployment, ignore_errors=True)

    def _verified(self) -> dict[str, _Known]:
        """The whole files. Others under their names are removed: cut short, or written to since."""
        known = self._read()
        for file in list(self._whole.iterdir()):
            if known.get(file.name) != _look(file):
                log.warning("removed the cached tensor %s: it changed on disk", file.name)
                known.pop(file.name, None)
                file.unlink(missing_ok=True)
        present = {file.name for file in self._whole.iterdir()}
        return {name: value for name, value in known.items() if name in present}

    def _prune(self, known: dict[str, _Known]) -> None:
        """Remove the files that were longest not read until the rest is within the limit; write the index."""
        total = sum(one.size for one in known.values())

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
        except (FileNotFoundError, msgspec.DecodeError):
            return {}

    def _write(self, known: dict[str, _Known]) -> None:
        fresh = self._index.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(known))
        fresh.replace(self._index)


def _look(file: Path) -> _Known:
    state = file.stat()
    return _Known(state.st_size, state.st_mtime_ns)
