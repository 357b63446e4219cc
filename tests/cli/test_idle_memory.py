"""Memory use of an idle daemon."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop
from aiohttp import connector

from sollold.daemon import heap
from sollold.daemon.heap import ReclaimableMemory
from sollold.daemon.late_certificates import LateContext, install
from sollold.tasks import cancel_and_wait
from tests.doubles import until


def test_certificates_are_loaded_at_the_first_use() -> None:
    own = connector._SSL_CONTEXT_VERIFIED
    try:
        install()
        late = connector._SSL_CONTEXT_VERIFIED
        assert isinstance(late, LateContext) and not late.cert_store_stats()["x509_ca"]
        assert late.verify_mode is ssl.CERT_REQUIRED and late.check_hostname
        assert (late.options, late.verify_flags) == (own.options, own.verify_flags)
        late.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="example.org")
        usual = ssl.create_default_context().cert_store_stats()
        assert late.cert_store_stats() == usual
    finally:
        connector._SSL_CONTEXT_VERIFIED = own


RARELY_USED = (
    *("pynvml", "rich", "jinja2", "tarfile", "difflib", "zipfile", "sollold.client", "statistics"),
    *("sollold.api.cluster.openapi", "prometheus_client"),
)
"""Modules that must not be imported before their first use."""


def test_the_daemon_does_not_import_rarely_used_modules() -> None:
    code = f"""
import sys, sollold.cli.main, sollold.cli.run, sollold.daemon.main
print(*[name for name in {RARELY_USED} if name in sys.modules])
"""
    assert _run(code) == []


MAPS = """\
1000-2000 r-xp 00000000 fe:01 77 /usr/lib/a library.so
2000-3000 r--p 00001000 fe:01 77 /usr/lib/a library.so
3000-4000 rw-p 00002000 fe:01 77 /usr/lib/a library.so
4000-5000 r--p 00000000 00:00 0 [vvar]
5000-6000 rw-p 00000000 00:00 0
6000-7000 r--s 00000000 fe:01 78 /models/weights.so.gguf
7000-8000 r--p 00000000 fe:01 79 /usr/lib/locale
ffff7000-ffff8000 r-xp 00000000 fe:01 80 /usr/lib/other.so.1.2
"""
WRITTEN = "2000-", "5000-"


def test_only_unmodified_pages_of_libraries_are_released(tmp_path: Path) -> None:
    def write_maps(maps: str) -> None:
        (tmp_path / "maps").write_text(maps)
        sizes = (
            f"{line}\nRss: 40 kB\nAnonymous: {8 * line.startswith(WRITTEN)} kB" for line in maps.splitlines()
        )
        (tmp_path / "smaps").write_text("\n".join(sizes))

    spare = ReclaimableMemory(tmp_path)
    first, second = (
        (0x1000, 0x2000, "/usr/lib/a library.so"),
        (0xFFFF7000, 0xFFFF8000, "/usr/lib/other.so.1.2"),
    )
    write_maps(MAPS)
    assert spare.unchanged() == set()
    assert spare.unchanged() == {first, second}
    # A new mapping waits for the next call. A mapping that is gone or replaced is never touched.
    write_maps(MAPS.replace("other.so.1.2", "new.so"))
    assert spare.unchanged() == {first}
    assert spare.unchanged() == {first, (*second[:2], "/usr/lib/new.so")}
    write_maps("")
    assert spare.unchanged() == set()


def test_library_pages_are_released_at_the_second_call_and_can_be_loaded_again() -> None:
    code = """
import hashlib, ssl
from pathlib import Path
from sollold.daemon.heap import ReclaimableMemory

def of_files():
    found = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").open() if line[0] in "RA")
    return int(found["Rss:"]) - int(found["Anonymous:"])

spare, before = ReclaimableMemory(), of_files()
spare.give_back()
looked = of_files()
spare.give_back()
after = of_files()
ssl.create_default_context()
print(before, looked, after, hashlib.sha256(b"abc").hexdigest()[:8])
"""
    before, looked, after, digest = _run(code)
    assert int(looked) > 0.9 * int(before) and int(after) < 0.7 * int(before)
    assert digest == "ba7816bf"


def _run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_idle_threads_of_the_loop_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_START_SECONDS", 0.05)
    monkeypatch.setattr(heap, "_PERIOD_SECONDS", 0.05)
    ended = 0

    class Pool:
        def end_idle_threads(self) -> None:
            nonlocal ended
            ended += 1

    async def main() -> int:
        trimming = asyncio.create_task(heap.trim_periodically([Pool()]))
        await until(lambda: ended)
        together, free = threading.Barrier(3, timeout=30), threading.Event()
        busy = [asyncio.create_task(asyncio.to_thread(free.wait, 60)) for _ in range(2)]
        await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(3)))
        before = ended
        await until(lambda: ended > before + 2)
        free.set()
        assert await asyncio.gather(*busy) == [True, True], "work goes on"
        await until(lambda: threading.active_count() <= started + 2)
        await cancel_and_wait(trimming)
        return ended

    started = threading.active_count()
    assert uvloop.run(main())
