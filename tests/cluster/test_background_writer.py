"""Background writes to the state folder while the disk is full."""

from __future__ import annotations

import asyncio
import errno

import pytest

from sollold.cluster.net import state_file
from sollold.cluster.net.state_file import BackgroundWriter
from tests.doubles import until


class Disk:
    """Stores values, or raises ``fault``."""

    def __init__(self) -> None:
        self.fault: Exception | None = OSError(errno.ENOSPC, "No space left on device")
        self.attempts = 0
        self.kept: list[int] = []

    def write(self, value: int) -> None:
        self.attempts += 1
        if self.fault is not None:
            raise self.fault
        self.kept.append(value)


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("can't start new thread")]
)
async def test_a_failed_write_is_retried_until_it_succeeds(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state_file, "RETRY_SECONDS", 0.01)
    caplog.set_level("INFO")
    disk = Disk()
    disk.fault = fault
    writer = BackgroundWriter("the keyring", lambda: 7, disk.write)
    writer.request()
    await until(lambda: disk.attempts > 2)
    disk.fault = None
    await until(lambda: disk.kept == [7])
    await until(lambda: "the keyring can be written again" in caplog.text)
    attempts = disk.attempts
    await asyncio.sleep(0.05)
    assert disk.attempts == attempts, "the value is not written twice"
    assert caplog.text.count("can't be written") == 1, "one fault is logged once"
    await writer.close()


async def test_a_new_value_is_tried_at_once_and_closing_does_not_wait_for_space() -> None:
    disk = Disk()
    writer = BackgroundWriter("the keyring", lambda: 7, disk.write)
    writer.request()
    await until(lambda: disk.attempts == 1)
    writer.request()
    await until(lambda: disk.attempts == 2)
    async with asyncio.timeout(2):
        await writer.close()
    assert disk.attempts == 3, "closing tries once more"
