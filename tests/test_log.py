"""Log lines in the journal's protocol and on a terminal, and messages to systemd."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold import log
from sollold.daemon import systemd


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level


def listen(path: Path) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    link.bind(str(path))
    link.settimeout(5)
    return link


def test_each_record_is_one_line_on_a_terminal(restored_logging: None) -> None:
    out = io.StringIO()
    log.set_up("info", out)
    logging.getLogger("sollold.agent").info("worker up", extra={"deployment": "d1"})
    logging.getLogger("sollold.agent").debug("not this")
    logging.getLogger("sollold").warning("look")
    first, second = out.getvalue().splitlines()
    assert first.endswith(" agent: worker up  (deployment=d1)")
    assert second.endswith(" warning: look")


FORGED = "pc\n12:00:00 cluster: node pc9 joined\x1b[31m\u202e"


def test_control_characters_in_names_and_paths_are_escaped(restored_logging: None) -> None:
    out = io.StringIO()
    log.set_up("info", out)
    logger = logging.getLogger("sollold.cluster")
    logger.info("node %s joined, term %d", FORGED, 5, extra={"model": FORGED})
    logger.info("file %(path)s", {"path": Path(FORGED)})
    try:
        raise OSError(FORGED)
    except OSError as error:
        logger.exception("failed: %s", error)
    lines = out.getvalue().split("\n")
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert "node pc\\n12:00:00 cluster: node pc9 joined\\x1b[31m\\u202e joined, term 5" in lines[0]
    assert not [line for line in lines if line.startswith("12:00:00")]


def test_the_journal_gets_control_characters_escaped(tmp_path: Path) -> None:
    with listen(tmp_path / "journal") as journal:
        handler = log.JournalHandler(str(tmp_path / "journal"))
        handler.emit(logging.LogRecord("sollold", logging.INFO, __file__, 7, "node %s", (FORGED,), None))
        handler.close()
        entry = journal.recv(65536)
    assert b"MESSAGE=node pc\\n12:00:00 cluster: node pc9 joined\\x1b[31m\\u202e\n" in entry


def test_the_journal_gets_fields_and_line_breaks_of_the_message(tmp_path: Path) -> None:
    with listen(tmp_path / "journal") as journal:
        handler = log.JournalHandler(str(tmp_path / "journal"))
        record = logging.LogRecord("sollold.agent", logging.ERROR, __file__, 7, "two\nlines", None, None)
        record.deployment = "d1"
        handler.emit(record)
        handler.close()
        entry = journal.recv(65536)
    assert b"MESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\n" in entry
    assert b"PRIORITY=3\n" in entry
    assert b"SOLLOLD_DEPLOYMENT=d1\n" in entry


def test_the_journal_is_used_only_if_stderr_is_its_stream(
    restored_logging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(tmp_path / "journal"), (tmp_path / "stream").open("w") as stream:
        monkeypatch.setattr(log, "JOURNAL", str(tmp_path / "journal"))
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)
        file = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino}")
        # A terminal started by systemd inherits the variables, but its stderr is not the journal.
        log.set_up("info")
        assert not isinstance(logging.getLogger().handlers[0], log.JournalHandler)
        stderr = os.dup(2)
        try:
            os.dup2(stream.fileno(), 2)
            log.set_up("info")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        assert isinstance(logging.getLogger().handlers[0], log.JournalHandler)


def test_notify_sends_readiness_and_status_to_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert systemd.notify(ready=True) is False
    with listen(tmp_path / "notify") as link:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert systemd.notify(ready=True, status="3 nodes\nall well") is True
        assert link.recv(4096) == b"READY=1\nSTATUS=3 nodes all well"
    assert systemd.notify(ready=True) is False


def test_the_watchdog_period_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd.watchdog_period() == 0
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert systemd.watchdog_period() == 30
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_period() == 0


async def receive(link: socket.socket) -> bytes:
    """The next datagram."""
    return await asyncio.to_thread(link.recv, 4096)


async def test_the_watchdog_is_notified_also_when_the_status_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    calls: list[int] = []

    def status() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("no file left")
        return f"all well {len(calls) // 1000}"

    # The socket does not exist at first.
    task = asyncio.create_task(systemd.keep_telling(status))
    try:
        await asyncio.wait([task], timeout=0.1)
        assert not task.done()
        calls.clear()
        with listen(tmp_path / "notify") as link:
            received = [await receive(link) for _ in range(6)]
        assert received.count(b"STATUS=all well 0") == 1
        assert received.count(b"WATCHDOG=1") == 5
    finally:
        task.cancel()


async def test_without_systemd_the_notifier_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    async with asyncio.timeout(5):
        await systemd.keep_telling(lambda: "nobody asks")


def test_notify_fails_quietly_without_free_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setattr(socket, "socket", fail)
    assert systemd.notify(watchdog=True) is False
