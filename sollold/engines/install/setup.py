"""Sets up llama.cpp: finds it, or builds the pinned version into the cache.

Two processes that start at once build only once: the second waits for the first. A build stays in a
temporary folder until it is complete and tested, then it is renamed into place, so an interrupted build is
never found. What it leaves behind is removed by the next build.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from sollold import __version__
from sollold.engines.install.build import NEEDED_BYTES, TAG, Build
from sollold.engines.install.build_step import Cancelled, SetupFailed, Steps
from sollold.engines.install.find import PACKAGED, Llama, LlamaSilent, LlamaUnusable, find, look_at
from sollold.engines.install.toolchain import (
    CPU,
    PORTABLE,
    BuildBackend,
    backends,
    for_gpu,
    missing,
    portable,
)
from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.retry import LogAndRetry
from sollold.settings.schema import GIB, MIB, LlamaSettings
from sollold.units import bytes_text

log = logging.getLogger("sollold.engines")

LOOK_SECONDS = 60.0
BUILD_AFTER = 10
"""Searches after which a failed build is retried; the number doubles after each failure."""
_LOCK_SECONDS = 0.3
_FULL_BYTES = 64 * MIB
"""Free bytes at or below which the disk counts as full: a compiler's last output was larger."""
_NO_MEMORY = re.compile(
    r"\bKilled\b|signal 9\b|virtual memory exhausted|out of memory|Cannot allocate memory", re.IGNORECASE
)
"""Output of compilers and their drivers when memory runs out."""
_RELEASE = f"sollold {__version__}"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the set-up.

    Attributes:
        stage: ``finding``, ``waiting``, ``fetching``, ``configuring``, ``building``, ``checking``, ``ready``.
        fraction: fraction of the whole, 0.0 to 1.0.
        message: a short sentence for users, as in the record's ``setup``.
    """

    stage: str
    fraction: float
    message: str


async def set_up(settings: LlamaSettings, cache: Path, tell: Callable[[Progress], None]) -> Llama:
    """Find or build llama.cpp; ``tell`` is called on the loop. Cancelling kills the build's processes.

    Raises:
        SetupFailed: there is none and it can't be built; the message says why and what to do.
    """
    loop = asyncio.get_running_loop()

    def tell_loop(progress: Progress) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, progress)

    setup = Setup(settings, cache, tell_loop)
    work = asyncio.ensure_future(asyncio.to_thread(setup.run))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        setup.cancel()
        await asyncio.gather(work, return_exceptions=True)
        raise


async def persist(
    settings: LlamaSettings,
    cache: Path,
    tell: Callable[[Progress], None],
    failed: Callable[[SetupFailed], None],
) -> Llama:
    """Repeat `set_up` until it succeeds; ``failed`` is called with the reason of each failure.

    The network may come up, or somebody may install what is missing, after the daemon's start, so it searches
    every minute. Building occupies all cores for minutes, so builds are retried at growing intervals.
    """
    searches = BUILD_AFTER
    while True:
        try:
            return await set_up(settings, cache, tell)
        except SetupFailed as error:
            failed(error)
        except Exception as error:
            log.exception("the set-up of llama.cpp failed")
            failed(SetupFailed(f"internal error: {error or type(error).__name__}"))
        retrying = LogAndRetry("the search for llama.cpp", log)
        for _ in range(searches):
            await asyncio.sleep(LOOK_SECONDS)
            with retrying, contextlib.suppress(SetupFailed):
                return await set_up(replace(settings, build=False), cache, _ignore_progress)
        searches *= 2


def _ignore_progress(progress: Progress) -> None:
    """Ignore the progress of a repeated search."""


class Setup:
    """One set-up; `run` blocks, `cancel` is thread-safe.

    Args:
        cache: the daemon's cache folder; builds are in ``cache/llama.cpp``.
    """

    def __init__(self, settings: LlamaSettings, cache: Path, tell: Callable[[Progress], None]) -> None:
        self._settings = settings
        self._cache = cache
        self._callback = tell
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._steps: Steps | None = None
        self._skipped: list[LlamaUnusable] = []
        self._has_fallback = False
        """A usable one exists: a failed build is then recorded, so that not every start repeats it."""

    @property
    def _folder(self) -> Path:
        return self._cache / "llama.cpp"

    @property
    def log_file(self) -> Path:
        """Log of the last build."""
        return self._folder / "build.log"

    def cancel(self) -> None:
        """Stop soon: `run` then raises `Cancelled`."""
        self._cancelled.set()
        with self._lock:
            if self._steps is not None:
                self._steps.cancel()

    def run(self) -> Llama:
        """Find or build llama.cpp.

        Raises:
            SetupFailed: there is none and it can't be built.
            Cancelled: `cancel` was called.
        """
        self._tell("finding", 0.0, "looking for llama.cpp")
        found = self._find()
        if silent := self._silent():
            # Building it again would take many minutes, on a machine that is slow already.
            if found is None:
                raise SetupFailed(f"{silent}; it is tried again every minute")
        elif found is None:
            found = self._build_once(backends, self._find)
        elif (better := self._worth_building(found)) is not None:
            found = self._build_beside(found, better)
        self._tell("ready", 1.0, "ready")
        log.info("llama.cpp %s: %s", found.build, found.server)
        return found

    def run_portable(self, gpu: str = "", architectures: str = "") -> Llama:
        """Build for a package or image: runs on any processor of this architecture; not used on this machine.

        Args:
            gpu: name of a GPU backend to build as well.
            architectures: that GPU's architectures; empty: the usual ones.

        Raises:
            SetupFailed: it can't be built.
            Cancelled: `cancel` was called.
        """
        toolkit = for_gpu(gpu) if gpu else None
        if gpu and toolkit is None:
            raise SetupFailed(f"llama.cpp can't be built for {gpu}: its toolkit isn't installed here")
        backend = portable(toolkit, architectures)

        def existing() -> Llama | None:
            return self._find_portable(backend)

        found = existing() or self._build_once(lambda: [backend], existing)
        self._tell("ready", 1.0, "ready")
        return found

    def _worth_building(self, found: Llama) -> BuildBackend | None:
        """Return the backend to build for although ``found`` works: if that is our earlier release, which
        is incompatible with the other nodes' builds, or CPU-only while a GPU toolkit is installed.
        """
        if not self._settings.build or self._settings.server or self._settings.rpc_server or missing():
            return None
        best = next((backend for backend in backends() if not _failed(self._folder, backend)), None)
        folder = found.server.parent
        own_build = folder == PACKAGED or folder.parent.parent == self._folder
        old = folder.parent.parent == self._folder and not folder.parent.name.startswith(f"{TAG}-")
        alone = folder == PACKAGED or folder.parent.name.endswith(f"-{CPU.name}")
        if not own_build or best is None:
            return None
        if best is CPU:
            # Without its toolkit a GPU is better served by the old build.
            return CPU if old and alone else None
        return best if old or alone else None

    def _build_beside(self, found: Llama, better: BuildBackend) -> Llama:
        """Build; use ``found`` if that fails. A failed build is retried only after an upgrade."""
        log.info("using %s; building %s for %s, which is better", found.server, TAG, better.name)

        self._has_fallback = True

        def existing() -> Llama | None:
            current = self._find()
            return current if current != found else None

        try:
            return self._build_once(lambda: [better], existing)
        except SetupFailed as error:
            retry = "at the next start"
            if _failed(self._folder, better):
                retry = f"after an upgrade, or once you remove {_failure(self._folder, better)}"
            log.warning("%s; using %s instead; the build will be retried %s", error, found.server, retry)
            return found

    def _find_portable(self, backend: BuildBackend) -> Llama | None:
        programs = _build_folder(self._folder, backend) / "bin"
        try:
            return look_at(programs / "llama-server", programs / "ggml-rpc-server")
        except LlamaUnusable:
            return None

    def _find(self) -> Llama | None:
        try:
            found, skipped = find(self._settings, self._cache)
        except LlamaUnusable as error:
            raise SetupFailed(f"the configured llama.cpp can't be used: {error}") from error
        self._skipped = skipped
        return found

    def _silent(self) -> str:
        """Return why a build of our own could not be run just now; empty if none was silent."""
        own = (e for e in self._skipped if isinstance(e, LlamaSilent) and self._folder in e.program.parents)
        return str(next(own, ""))

    def _build_once(
        self, wanted: Callable[[], list[BuildBackend]], existing: Callable[[], Llama | None]
    ) -> Llama:
        if not self._settings.build:
            why = f" ({'; '.join(map(str, self._skipped))})" if self._skipped else ""
            raise SetupFailed(
                f"no usable llama.cpp found{why} and llama.build is off: "
                "install one, set llama.server, or turn llama.build on"
            )
        for unusable in self._skipped:
            log.info("llama.cpp skipped: %s", unusable)
        if absent := missing():
            raise SetupFailed(f"llama.cpp can't be built without {' and '.join(absent)}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                # Another process may have built it since the search: its processes use the files already.
                if (found := existing()) is not None:
                    return found
                return self._build(wanted)
        except OSError as error:
            fault = system_reason(error)
            raise SetupFailed(f"llama.cpp can't be built in {self._folder}: {fault}") from error

    def _build(self, wanted: Callable[[], list[BuildBackend]]) -> Llama:
        for stale in self._folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if (free := shutil.disk_usage(self._folder).free) < NEEDED_BYTES:
            raise SetupFailed(
                f"building llama.cpp needs {NEEDED_BYTES / GIB:.0f} GiB in {self._folder}, "
                f"but {free / GIB:.1f} GiB are free: free some space or set node.cache_dir"
            )
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=self._folder))
        try:
            with self.log_file.open("wb") as output:
                return self._compile(work, output, wanted())
        finally:
            with self._lock:
                self._steps = None
            shutil.rmtree(work, ignore_errors=True)

    def _compile(self, work: Path, output: BinaryIO, wanted: list[BuildBackend]) -> Llama:
        steps = Steps(output, self.log_file)
        with self._lock:
            self._steps = steps
        self._check()
        build = Build(work, steps, self._settings.jobs, self._tell)
        source = build.fetch()
        for backend in wanted:
            try:
                return self._install(build.compile(source, backend), backend)
            except SetupFailed as error:
                if fault := self._disk_full(error) or _memory_full(error):
                    # Not the backend's fault: don't record the failure or fall back to another backend.
                    raise SetupFailed(fault) from error
                if backend is not CPU or self._has_fallback:
                    _failure(self._folder, backend).write_text(f"{_RELEASE}\n{error}\n", encoding="utf-8")
                if backend is wanted[-1]:
                    raise
                log.warning("%s; trying the next backend", error)
        raise AssertionError("unreachable: something is always wanted")

    def _disk_full(self, error: SetupFailed) -> str:
        """Return the error message if the build failed because the disk became full, else an empty string."""
        free = shutil.disk_usage(self._folder).free
        if free > _FULL_BYTES and os.strerror(errno.ENOSPC) not in str(error):
            return ""
        return (
            f"the disk became full while building llama.cpp in {self._folder} ({bytes_text(free)} are free "
            f"there): free some space or set node.cache_dir. {error}"
        )

    def _install(self, built: Path, backend: BuildBackend) -> Llama:
        """Test the build, then rename it into place."""
        from sollold.engines.install.self_test import self_test  # rarely needed; keeps an idle daemon small

        self._tell("checking", 0.99, "testing the build")
        try:
            look_at(built / "llama-server", built / "ggml-rpc-server")
            self_test(built, built.parent.parent, self._check)
        except LlamaUnusable as error:
            raise SetupFailed(f"llama.cpp was built for {backend.name} but does not run: {error}") from error
        target = _build_folder(self._folder, backend)
        # Only an unusable build can be here: a usable one would have been found.
        shutil.rmtree(target, ignore_errors=True)
        built.parent.rename(target)
        return look_at(target / "bin" / "llama-server", target / "bin" / "ggml-rpc-server")

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock shared by all processes that use this cache."""
        waited = False
        with (self._folder / "lock").open("a+b") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    pass
                if not waited:
                    file.seek(0)
                    pid = file.read(20).decode("ascii", "replace").strip() or "unknown"
                    self._tell("waiting", 0.0, f"another process (pid {pid}) is building llama.cpp")
                    waited = True
                if self._cancelled.wait(_LOCK_SECONDS):
                    raise Cancelled
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield

    def _tell(self, stage: str, fraction: float, message: str) -> None:
        self._callback(Progress(stage, fraction, message))


def _memory_full(error: SetupFailed) -> str:
    """Return the error message if the build failed because memory ran out, else an empty string."""
    if not _NO_MEMORY.search(str(error)):
        return ""
    return f"memory ran out while building llama.cpp: close other programs or lower llama.jobs. {error}"


def _failure(folder: Path, backend: BuildBackend) -> Path:
    """Path of the file that records a failed build of this backend, so that not every start retries it."""
    return folder / f"{TAG}-{backend.name}.failed"


def _failed(folder: Path, backend: BuildBackend) -> bool:
    """Return whether this build failed here under this release; another release may succeed."""
    try:
        return _failure(folder, backend).read_text(encoding="utf-8").startswith(f"{_RELEASE}\n")
    except (OSError, UnicodeDecodeError):
        return False


def _build_folder(folder: Path, backend: BuildBackend) -> Path:
    """Path of a build. Portable builds have names that `find` ignores."""
    packed = backend.name.startswith(PORTABLE)
    return folder / (f"{backend.name}-{TAG}" if packed else f"{TAG}-{backend.name}")
