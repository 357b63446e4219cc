"""Finds llama.cpp: a ``llama-server`` and an RPC worker of the same build, with RPC support."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sollold.engines.llamacpp.exit_reason import exit_reason
from sollold.errors import system_words
from sollold.facts import dataclass
from sollold.machine.program import run_program
from sollold.settings.location import expanded, home_folder
from sollold.settings.schema import LlamaSettings

PACKAGED = Path("/usr/lib/sollold/llama.cpp/bin")
"""Install location of the Debian package's llama.cpp."""
_WORKERS = ("ggml-rpc-server", "rpc-server")
"""File names of the worker program, the current one first."""
_VERSION = re.compile(r"version: .*?(?:build )?(\d+)[, (]+(?:commit )?([0-9a-f]{7,40})")
DRAFT_MTP = "draft-mtp"
"""A speculation type that not every build supports."""
_ASK_SECONDS = 20.0
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class LlamaUnusable(Exception):
    """The llama.cpp at some path can't be used; the message says why."""


class LlamaSilent(LlamaUnusable):
    """It could not be run just now, on a machine that is overloaded or has a slow disk.

    Attributes:
        program: the file.
    """

    def __init__(self, program: Path, reason: str) -> None:
        super().__init__(f"{program} does not run: {reason}")
        self.program = program


@dataclass(frozen=True, slots=True)
class Llama:
    """A usable llama.cpp.

    Attributes:
        build: name as in the node's record: ``b11434``. Only equal builds are compatible.
        flags: options that ``llama-server`` supports, and `DRAFT_MTP` if it does.
        stamp: identifies the programs' files as they were inspected; empty: unknown.
    """

    server: Path
    worker: Path
    build: str
    flags: frozenset[str]
    stamp: tuple[int, ...] = ()

    def replaced(self) -> bool:
        """Return whether other files have taken the programs' places, or they are gone. Blocks."""
        return bool(self.stamp) and self.stamp != _stamp(self.server, self.worker)


def find(settings: LlamaSettings, cache: Path) -> tuple[Llama | None, list[LlamaUnusable]]:
    """Return the first usable llama.cpp, and why candidates before it were passed over.

    Searches the settings, GPU builds in the cache, PATH, ``~/llama.cpp``, the package's folder and finally
    CPU builds in the cache. Runs the programs and waits for them: call it off the loop.

    Raises:
        LlamaUnusable: the settings name one that can't be used.
    """
    if settings.server or settings.rpc_server:
        return _named(settings), []
    skipped: list[LlamaUnusable] = []
    for server, worker in _candidates(cache):
        try:
            return look_at(server, worker), skipped
        except LlamaUnusable as error:
            skipped.append(error)
    return None, skipped


def look_at(server: Path, worker: Path) -> Llama:
    """Inspect the programs at these paths.

    Raises:
        LlamaUnusable: they can't be used.
    """
    for program in (server, worker):
        if not _is_file(program) or not os.access(program, os.X_OK):
            raise LlamaUnusable(f"{program} does not exist, or the daemon's user may not run it")
    stamp = _stamp(server, worker)
    match = _VERSION.search(_ask(server, "--version"))
    if match is None:
        raise LlamaUnusable(f"{server} --version shows no build number")
    help_text = _ask(server, "--help")
    flags = frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_text)) | (
        {DRAFT_MTP} if DRAFT_MTP in help_text else set()
    )
    if "--rpc" not in flags:
        raise LlamaUnusable(f"{server} was built without RPC (-DGGML_RPC=ON)")
    if "--port" not in _ask(worker, "--help"):
        raise LlamaUnusable(f"{worker} does not run: it prints no help")
    number, commit = match.groups()
    # In a shallow clone the build number is always 1: then only the commit identifies the build.
    build = f"b{number}" if int(number) > 1 else f"b{number}-{commit}"
    return Llama(server, worker, build, flags, stamp)


def _stamp(*programs: Path) -> tuple[int, ...]:
    try:
        found = [program.stat() for program in programs]
    except OSError:
        return ()
    return tuple(fact for s in found for fact in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))


def _named(settings: LlamaSettings) -> Llama:
    if settings.server:
        server = expanded(settings.server)
        worker = expanded(settings.rpc_server) if settings.rpc_server else _worker_in(server.parent)
        if worker is None:
            raise LlamaUnusable(
                f"llama.server is {server}, but there is no ggml-rpc-server next to it: set llama.rpc_server"
            )
        return look_at(server, worker)
    worker = expanded(settings.rpc_server)
    return look_at(worker.parent / "llama-server", worker)


def _candidates(cache: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (server, worker) pairs; sharing a folder shows that they come from the same build."""
    built = sorted((cache / "llama.cpp").glob("b*/bin"), key=_age, reverse=True)
    # Our GPU builds come first. Our CPU builds come last: any other build is at least as good.
    folders = [folder for folder in built if not folder.parent.name.endswith("-cpu")]
    on_path = shutil.which("llama-server")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    folders += [home_folder() / "llama.cpp" / "build" / "bin", PACKAGED]
    folders += [folder for folder in built if folder.parent.name.endswith("-cpu")]
    for folder in folders:
        server = folder / "llama-server"
        worker = _worker_in(folder)
        if _is_file(server) and worker is not None:
            yield server, worker


def _age(built: Path) -> tuple[int, str]:
    """Sort key of builds in our cache (``b11434-cuda/bin``) by age, oldest first."""
    number, _, backend = built.parent.name.removeprefix("b").partition("-")
    return int(number) if number.isdecimal() else 0, backend


def _worker_in(folder: Path) -> Path | None:
    return next((folder / name for name in _WORKERS if _is_file(folder / name)), None)


def _is_file(path: Path) -> bool:
    """Return whether it is a file; False, too, if a parent folder is not accessible."""
    with contextlib.suppress(OSError):
        return path.is_file()
    return False


def _ask(program: Path, option: str) -> str:
    try:
        done = run_program([program, option], _ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, subprocess.TimeoutExpired) or error.errno in _PASSING:
            raise LlamaSilent(program, system_words(error)) from error
        raise LlamaUnusable(f"{program} does not run: {system_words(error)}") from error
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        raise LlamaUnusable(f"{program} {option}: {exit_reason(done.returncode, text.splitlines())}")
    return text
