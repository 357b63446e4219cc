"""Loops that log an error and try again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from sollold.retry import LogAndRetry


def test_a_repeated_error_and_its_end_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attempt = LogAndRetry("the loop", logging.getLogger("sollold.test"))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with attempt:
                raise OSError("no file left")
        with attempt:
            raise OSError("no disk left")
        for _ in range(2):
            with attempt:
                pass
    assert [record.message for record in caplog.records] == [
        "the loop failed and will be retried: OSError: no file left",
        "the loop failed and will be retried: OSError: no disk left",
        "the loop works again",
    ]


def test_a_cancellation_is_not_suppressed() -> None:
    with pytest.raises(asyncio.CancelledError), LogAndRetry("the loop", logging.getLogger("sollold.test")):
        raise asyncio.CancelledError
