from __future__ import annotations

import asyncio
import logging

import pytest

from sollold.turns import Turns


def test_a_fault_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns("the loop", logging.getLogger("sollold.test"))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with turns:
                raise OSError("no file left")
        with turns:
            raise OSError("no disk left")
        for _ in range(2):
            with turns:
                pass
    assert [record.message for record in caplog.records] == [
        "the loop failed and is tried again: OSError: no file left",
        "the loop failed and is tried again: OSError: no disk left",
        "the loop works again",
    ]


def test_a_cancellation_ends_the_loop() -> None:
    with pytest.raises(asyncio.CancelledError), Turns("the loop", logging.getLogger("sollold.test")):
        raise asyncio.CancelledError
