"""What the event loop reports."""

from __future__ import annotations

import logging

import pytest
import uvloop

from sollold.daemon.loop_errors import handle

CLOSED = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"


@pytest.mark.parametrize(
    ("message", "error", "told"),
    [
        ("Fatal error on SSL protocol", RuntimeError(CLOSED), False),
        ("Fatal error on SSL protocol", ValueError("what nobody expected"), True),
        ("Task exception was never retrieved", RuntimeError(CLOSED), True),
    ],
)
def test_a_connection_that_was_given_up_is_no_error(
    caplog: pytest.LogCaptureFixture, message: str, error: Exception, told: bool
) -> None:
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(handle)
    with caplog.at_level(logging.WARNING):
        loop.call_exception_handler({"message": message, "exception": error})
    loop.close()
    assert bool(caplog.records) is told
