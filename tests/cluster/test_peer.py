from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest
from aiohttp import web

from sollold.cluster.net.identity import tls_name
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import HTTP, PortTaken, RpcServer, caller
from tests.cluster.shells import IDS, Pair
from tests.doubles import until


@dataclass(frozen=True, slots=True)
class Sum:
    left: int
    right: int = 0


@dataclass(frozen=True, slots=True)
class Total:
    total: int
    caller: str


async def add(caller: str, request: Sum) -> Total:
    if request.left < 0:
        raise PeerError("", "negative numbers are not for me", transport=False)
    if request.left == 99:
        raise ValueError("a bug")
    return Total(request.left + request.right, caller)


async def test_a_call_returns_its_result_and_names_its_caller(pair: Pair) -> None:
    pair.peers[0].method("add", Sum, add)
    await pair.start()
    assert await pair.calls[1].call(IDS[0], "add", Sum(1, 2), Total, timeout=3) == Total(3, IDS[1])
    assert await pair.calls[0].call(IDS[0], "add", Sum(1, 2), Total, timeout=3) == Total(3, IDS[0])


async def test_a_call_made_while_the_connections_are_closed_succeeds(pair: Pair) -> None:
    """A node that changes to another cluster closes its connections and goes on."""
    pair.peers[0].method("add", Sum, add)
    await pair.start()
    await pair.calls[1].call(IDS[0], "add", Sum(1, 2), Total, timeout=3)
    closing = asyncio.create_task(pair.calls[1].close())
    await asyncio.sleep(0)
    assert await pair.calls[1].call(IDS[0], "add", Sum(1, 2), Total, timeout=3) == Total(3, IDS[1])
    await closing


async def test_refusals_and_exceptions_reach_the_caller(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    for server in pair.peers:
        server.method("add", Sum, add)
    await pair.start()
    for calls in pair.calls:
        with pytest.raises(PeerError, match="not for me") as refused:
            await calls.call(IDS[0], "add", Sum(-1), Total, timeout=3)
        assert not refused.value.transport
        with caplog.at_level(logging.ERROR), pytest.raises(PeerError, match="add failed: a bug") as failed:
            await calls.call(IDS[0], "add", Sum(99), Total, timeout=3)
        assert not failed.value.transport
        assert f"the call add of pc-{pair.calls.index(calls)} failed" in caplog.text
        caplog.clear()


async def test_invalid_requests_and_results_are_refused(pair: Pair) -> None:
    pair.peers[0].method("add", Sum, add)
    await pair.start()
    with pytest.raises(PeerError, match="is invalid"):
        await pair.calls[1].call(IDS[0], "add", {"left": "one"}, Total, timeout=3)
    with pytest.raises(PeerError, match="is invalid"):
        await pair.calls[1].call(IDS[0], "add", Sum(1), Sum, timeout=3)
    async with pair.calls[1].stream(IDS[0], "POST", "/call/add", data=b"\xc1rubbish") as answer:
        assert answer.status == 400
    assert (await pair.calls[1].call(IDS[0], "add", Sum(1), Total, timeout=3)).total == 1


async def test_a_call_times_out(pair: Pair) -> None:
    done = asyncio.Event()

    async def slow(caller: str, request: Sum) -> Total:
        await asyncio.sleep(0.3)
        done.set()
        return Total(0, caller)

    pair.peers[0].method("slow", Sum, slow)
    await pair.start()
    with pytest.raises(PeerError, match=r"^pc-0 did not answer slow within") as caught:
        await pair.calls[1].call(IDS[0], "slow", Sum(1), Total, timeout=0.1)
    assert not caught.value.transport, "the call may still complete"
    await asyncio.wait_for(done.wait(), 5)


@pytest.mark.parametrize("callee", [0, 1])
async def test_a_call_is_completed_although_its_caller_gives_up(pair: Pair, callee: int) -> None:
    """Whether it is a call to another node or to oneself."""
    completed = asyncio.Event()

    async def slow(caller: str, request: Sum) -> Total:
        await asyncio.sleep(0.3)
        completed.set()
        return Total(0, caller)

    pair.peers[callee].method("slow", Sum, slow)
    await pair.start()
    with pytest.raises(PeerError, match=r"did not answer slow within 0\.1 s"):
        await pair.calls[0].call(IDS[callee], "slow", Sum(1), Total, timeout=0.1)
    await asyncio.wait_for(completed.wait(), 3)


async def test_a_call_to_oneself_ends_with_the_server(pair: Pair) -> None:
    async def endless(caller: str, request: Sum) -> Total:
        await asyncio.Event().wait()
        raise AssertionError

    pair.peers[0].method("endless", Sum, endless)
    await pair.start()
    call = asyncio.create_task(pair.calls[0].call(IDS[0], "endless", Sum(1), Total, timeout=60))
    await asyncio.sleep(0.05)
    await pair.peers[0].close()
    with pytest.raises(PeerError, match="this node stops"):
        await call


async def test_a_node_evicted_right_after_its_handshake_is_refused(pair: Pair) -> None:
    await pair.start()
    assert pair.peers[0]._protocol(HTTP, IDS[1]) is not None
    pair.peers[0]._identity.refused.add(IDS[1])
    assert pair.peers[0]._protocol(HTTP, IDS[1]) is None


async def test_a_call_to_an_unreachable_node_fails(pair: Pair) -> None:
    pair.where[IDS[0]] = [("127.0.0.1", 1)]
    with pytest.raises(PeerError, match="nothing listens there") as caught:
        await pair.calls[1].call(IDS[0], "add", Sum(1), Total, timeout=3)
    assert caught.value.transport


async def test_a_stream_flows_chunk_by_chunk_in_both_directions(pair: Pair) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"X-Peer": caller(request)})
        await answer.prepare(request)
        async for chunk in request.content.iter_any():
            await answer.write(chunk.upper())
        return answer

    pair.peers[0].route("POST", "/echo", echo)
    await pair.start()
    first_answered = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.wait_for(
            first_answered.wait(), 5
        )  # the first chunk is answered before the second is sent
        yield b"two"

    async with pair.calls[1].stream(IDS[0], "POST", "/echo?x=1", data=chunks()) as answer:
        assert answer.headers["X-Peer"] == IDS[1]
        assert await answer.content.readexactly(3) == b"ONE"
        first_answered.set()
        assert await answer.content.readexactly(3) == b"TWO"


async def test_disconnecting_ends_the_handler(pair: Pair) -> None:
    ended = asyncio.Event()

    async def forever(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        try:
            while True:
                await answer.write(b"x")
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    pair.peers[0].route("GET", "/forever", forever)
    await pair.start()
    async with pair.calls[1].stream(IDS[0], "GET", "/forever") as answer:
        assert await answer.content.readany()
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_call_is_retried_on_a_broken_reused_connection_but_not_on_a_new_one(pair: Pair) -> None:
    arrived: list[int] = []
    breaks: list[bool] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        arrived.append(id(request.transport))
        if breaks.pop(0):
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(5)
        return web.Response(body=msgspec.msgpack.encode(Total(3, IDS[1])))

    pair.peers[0].route("POST", "/call/sum", answer)
    await pair.start()

    async def ask() -> Total:
        return await pair.calls[1].call(IDS[0], "sum", Sum(1, 2), Total, timeout=3)

    breaks += [False, True, False]
    assert await ask() == await ask() == Total(3, IDS[1])
    assert arrived[0] == arrived[1] and len(arrived) == 3

    await pair.calls[1].close()
    breaks += [True]
    with pytest.raises(PeerError, match="the connection to pc-0 broke"):
        await ask()
    assert len(arrived) == 4


async def test_a_dead_node_ends_its_streams_at_once(pair: Pair) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await asyncio.sleep(60)
        return answer

    pair.peers[0].route("GET", "/silent", silent)
    await pair.start()

    async def read() -> None:
        async with pair.calls[1].stream(IDS[0], "GET", "/silent") as answer:
            await answer.content.readany()

    reading = asyncio.create_task(read())
    await until(lambda: pair.calls[1]._streams)
    pair.calls[1].drop_node(IDS[0])
    with pytest.raises(PeerError, match="the connection to pc-0 broke"):
        await asyncio.wait_for(reading, 5)
    assert not pair.calls[1]._streams


async def test_a_call_to_a_node_that_dies_ends_at_once(pair: Pair) -> None:
    async def never(caller: str, request: Sum) -> Total:
        await asyncio.sleep(60)
        return Total(0, caller)

    pair.peers[0].method("never", Sum, never)
    pair.peers[0].method("add", Sum, add)
    await pair.start()
    calls = [
        asyncio.create_task(pair.calls[1].call(IDS[0], "never", Sum(1), Total, timeout=60)) for _ in range(2)
    ]
    await until(lambda: len(pair.calls[1]._unanswered.get(IDS[0], ())) == 2)
    pair.calls[1].drop_node(IDS[0])
    pair.calls[1].drop_node(IDS[0])
    for call in calls:
        with pytest.raises(PeerError, match="is gone") as gone:
            await asyncio.wait_for(call, 5)
        assert not gone.value.transport, "the call may still complete"
    assert not pair.calls[1]._unanswered
    assert (await pair.calls[1].call(IDS[0], "add", Sum(1), Total, timeout=3)).total == 1
    assert not pair.calls[1]._unanswered


async def test_a_port_in_use_is_named(pair: Pair) -> None:
    await pair.start()
    port = pair.where[IDS[0]][0][1]
    with pytest.raises(PortTaken, match=f"port {port}/TCP .* is in use"):
        await RpcServer(pair.reach[1]._identity).start("127.0.0.1", port)
    with pytest.raises(OSError, match=r"cluster\.host"):
        await RpcServer(pair.reach[1]._identity).start("192.0.2.77", 0)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00rubbish" * 100])
async def test_connections_without_tls_are_dropped(pair: Pair, sent: bytes) -> None:
    pair.peers[0].method("add", Sum, add)
    await pair.start()
    reader, writer = await asyncio.open_connection(*pair.where[IDS[0]][0])
    writer.write(sent)
    if sent:
        assert b"HTTP" not in await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert (await pair.calls[1].call(IDS[0], "add", Sum(1), Total, timeout=3)).total == 1


async def test_a_caller_without_certificate_or_protocol_is_refused(pair: Pair) -> None:
    await pair.start()
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    bare.set_alpn_protocols([HTTP])
    member = pair.reach[1].context("something-else")
    for context in (bare, member):
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            reader, writer = await asyncio.open_connection(
                *pair.where[IDS[0]][0], ssl=context, server_hostname=tls_name(IDS[0])
            )
            writer.write(b"POST /call/add HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            try:
                await asyncio.wait_for(reader.readexactly(1), 10)
            finally:
                writer.close()
