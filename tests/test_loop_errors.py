"""Handling of the event loop's error reports."""

from __future__ import annotations

import logging

import pytest
import uvloop

from sollold.daemon.loop_errors import handle

CLOSED = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"


@pytest.mark.parametrize(
    ("message", "error", "logged"),
    [
        ("Fatal error on SSL protocol", RuntimeError(CLOSED), False),
        ("Fatal error on SSL protocol", ValueError("what nobody expected"), True),
        ("Task exception was never retrieved", RuntimeError(CLOSED), True),
    ],
)
def test_errors_of_closed_tls_connections_are_not_logged(
    caplog: pytest.LogCaptureFixture, message: str, error: Exception, logged: bool
) -> None:
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(handle)
    with caplog.at_level(logging.WARNING):
        loop.call_exception_handler({"message": message, "exception": error})
    loop.close()
    assert bool(caplog.records) is logged
