"""Requests between nodes. The body is sent without a copy."""

from __future__ import annotations

import msgspec
import pytest

from sollold.serving.protocol import EngineRequest, read_request, request_parts


@pytest.mark.parametrize("body", [b"", b'{"a": 1}', b"x" * 1_000_000])
async def test_a_request_round_trips(body: bytes) -> None:
    request = EngineRequest("id", "d", "/v1/chat/completions", body, client="body", age=1.5, keep_alive=-1.0)
    head, sent = request_parts(request)
    assert sent is body
    assert msgspec.msgpack.decode(head + sent, type=EngineRequest) == request
    assert await read_request(head + sent) == request
    assert await read_request(msgspec.msgpack.encode(request)) == request


@pytest.mark.parametrize("raw", [b"", b"\xc0", b"\x81\xa4body" + b"\xc6\x00\x10\x00\x00" + b"x" * 2**20])
async def test_an_invalid_request_is_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        await read_request(raw)
