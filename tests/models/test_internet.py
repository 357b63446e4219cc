"""Requests to the internet use the proxy of the environment; other requests don't."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from sollold.cluster.net.certificate_authority import Subject, authority_pem, issue
from sollold.engines.install.find import Llama
from sollold.models.transfer import resolver
from sollold.models.transfer.internet import Internet, Unreachable, redirected
from sollold.models.transfer.remote_header import RemoteError, RemoteHeaders
from tests.daemons import Cluster
from tests.gguf.size import Size
from tests.gguf.writer import write
from tests.http_double import HttpDouble
from tests.http_proxy import HttpProxy
from tests.models.hub_double import HubDouble

SECRET = b"s" * 32
NAME = "hf.co/org/Tiny-GGUF:Q4_K_M"
TIMEOUT = aiohttp.ClientTimeout(total=20)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write(tmp_path / "tiny-Q4_K_M.gguf", "llama", Size(layers=3)).read_bytes()


@asynccontextmanager
async def hub_behind_a_proxy(
    content: bytes, tls: ssl.SSLContext | None = None, login: str = ""
) -> AsyncIterator[tuple[HttpProxy, int]]:
    """Run a hub that only the proxy can resolve, as ``hub.test``. Yields the proxy and its port."""
    hub = HubDouble("org/Tiny-GGUF", {"tiny-Q4_K_M.gguf": content})
    target = urlsplit(await hub.start(tls))
    proxy = HttpProxy((target.hostname or "", target.port or 0), login)
    try:
        yield proxy, await proxy.start()
    finally:
        await proxy.close()
        await hub.close()


@asynccontextmanager
async def internet(environ: dict[str, str], trust: ssl.SSLContext | None = None) -> AsyncIterator[Internet]:
    access = Internet(environ, trust)
    try:
        yield access
    finally:
        await access.close()


async def test_the_hub_is_reached_through_the_proxy_with_its_password(content: bytes) -> None:
    async with hub_behind_a_proxy(content, login="anna:a b") as (proxy, port):
        environ = {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": f"http://anna:a%20b@127.0.0.1:{port}"}
        async with internet(environ) as access:
            assert (await RemoteHeaders(access).read(NAME)).model.layers == 3
            assert set(proxy.asked) == {"GET hub.test"}
            assert not access.trouble()


async def test_https_uses_a_connect_tunnel_of_the_proxy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pem").write_bytes(issue(SECRET, Subject(("hub.test",), ()), datetime.now(UTC)))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "pem")
    trust = ssl.create_default_context(cadata=authority_pem(SECRET))
    async with hub_behind_a_proxy(content, tls, login="anna:b") as (proxy, port):
        environ = {"HF_ENDPOINT": "https://hub.test", "HTTPS_PROXY": f"http://anna:b@127.0.0.1:{port}"}
        async with internet(environ, trust) as access:
            assert (await RemoteHeaders(access).read(NAME)).model.layers == 3
        assert set(proxy.asked) == {"CONNECT hub.test:443"}
        async with internet({**environ, "HTTPS_PROXY": f"127.0.0.1:{port}"}, trust) as access:
            with pytest.raises(RemoteError, match="asks for a user and a password"):
                await RemoteHeaders(access).read(NAME)
        async with internet(environ) as access:
            with pytest.raises(RemoteError, match="its certificate is not trusted"):
                await RemoteHeaders(access).read(NAME)


async def test_an_unreachable_proxy_is_named_in_the_error_and_by_doctor(content: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environ = {"HF_ENDPOINT": "https://hub.test", "HTTPS_PROXY": f"http://anna:secret@127.0.0.1:{port}"}
    through = f"the proxy http://127.0.0.1:{port} (HTTPS_PROXY)"
    message = f"hub.test can't be reached through {through}: Connection refused"
    async with internet(environ) as access:
        with pytest.raises(RemoteError) as caught:
            await RemoteHeaders(access).read(NAME)
        assert str(caught.value) == message
        [(what, fix)] = access.trouble()
        assert what.startswith("the last download from hub.test failed at ") and what.endswith(message)
        assert "Environment=HTTPS_PROXY=" in fix and "secret" not in what + fix
        async with hub_behind_a_proxy(content) as (_, port):
            access.environ = {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": f"127.0.0.1:{port}"}
            await RemoteHeaders(access).read(NAME)
        assert not access.trouble()


async def test_without_a_proxy_doctor_shows_how_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with internet({"HF_ENDPOINT": "http://nowhere.invalid"}) as access:
        with pytest.raises(RemoteError, match=r"nowhere\.invalid can't be reached: "):
            await RemoteHeaders(access).read(NAME)
        assert "if it needs a proxy, set it" in access.trouble()[0][1]
        monkeypatch.setattr("sollold.models.transfer.internet._REMEMBER_SECONDS", 0.0)
        assert not access.trouble(), "old failures are not reported"


async def test_the_login_of_a_mirror_is_in_no_message(content: bytes) -> None:
    mirror = HubDouble("org/Other-GGUF", {"tiny-Q4_K_M.gguf": content})
    url = (await mirror.start()).replace("://", "://anna:my-secret@")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://anna:my-secret@127.0.0.1:{server.getsockname()[1]}"
    try:
        for endpoint in (url, closed):
            async with internet({"HF_ENDPOINT": endpoint}) as access:
                with pytest.raises(RemoteError) as caught:
                    await RemoteHeaders(access).read(NAME)
                shown = f"{caught.value} {access.trouble()}"
                assert "127.0.0.1" in shown and "secret" not in shown
    finally:
        await mirror.close()


class Redirects(HttpDouble):
    """Redirects requests, or answers them if there is no target.

    Attributes:
        location: target of the redirects; empty: answer.
        tokens: the ``Authorization`` header of each request.
    """

    def __init__(self, location: str = "") -> None:
        self.location = location
        self.tokens: list[str | None] = []

    async def start(self) -> int:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        return urlsplit(await self.serve(app)).port or 0

    async def _answer(self, request: web.Request) -> web.Response:
        self.tokens.append(request.headers.get("Authorization"))
        if self.location:
            return web.Response(status=302, headers={"Location": self.location})
        return web.Response(text="here")


async def test_a_redirect_chooses_its_own_proxy_and_drops_the_token() -> None:
    target, mirror = Redirects(), Redirects("http://files.test/x")
    proxy = HttpProxy(("127.0.0.1", await target.start()))
    port = await proxy.start()
    first = f"http://127.0.0.1:{await mirror.start()}/a"
    async with internet({"HTTP_PROXY": f"http://127.0.0.1:{port}"}) as access:
        async with access.get(first, TIMEOUT, {"Authorization": "Bearer secret"}) as answer:
            assert await answer.text() == "here"
        # The loopback URL was requested directly, the other one through the proxy.
        assert proxy.asked == ["GET files.test"]
        assert (mirror.tokens, target.tokens) == (["Bearer secret"], [None])
        mirror.location = first
        with pytest.raises(Unreachable, match="redirects more than 10 times"):
            async with access.get(first, TIMEOUT):
                pass
    for close in (proxy.close, mirror.close, target.close):
        await close()


@pytest.mark.parametrize(
    ("before", "location"),
    [
        ("https://hub.test/a", "http://files.test/a"),
        ("https://hub.test/a", "https://127.0.0.1/a"),
        ("http://hub.test/a", "http://169.254.169.254/latest/meta-data"),
        ("http://hub.test/a", "http://[::1]:11435/api/tags"),
        ("http://hub.test/a", "http://[::ffff:10.0.0.1]/"),
        ("http://hub.test/a", "//localhost:11434/"),
        ("http://hub.test/a", "http://2130706433/"),
        ("http://hub.test/a", "http://127.1:11435/"),
        ("http://hub.test/a", "http://0x7f000001/"),
        ("http://hub.test/a", "http://0/"),
        ("http://hub.test/a", "http://LOCALHOST./"),
        ("http://hub.test/a", "http://127.0.0.1./"),
        ("http://hub.test/a", "http://nas.home.arpa/"),
        ("http://hub.test/a", "http://router.local/"),
        ("http://hub.test/a", "file:///etc/passwd"),
        ("http://hub.test/a", "http://[/"),
    ],
)
def test_redirects_from_the_internet_to_local_addresses_are_refused(before: str, location: str) -> None:
    with pytest.raises(Unreachable, match="it redirects to"):
        redirected(before, location, None)


def test_a_mirror_on_the_lan_may_redirect_within_the_lan() -> None:
    assert redirected("http://192.168.1.2/a", "http://192.168.1.3/b", None)[0] == "http://192.168.1.3/b"
    assert redirected("https://hub.test/a", "/b", {"Authorization": "x"})[1] == {"Authorization": "x"}
    assert redirected("https://hub.test/a", "https://cdn.test/b", {"Authorization": "x"})[1] == {}


@pytest.mark.parametrize(
    ("mirror_at", "followed"),
    [("8.8.8.8", False), ("127.0.0.1", True)],
    ids=["a server on the internet", "a mirror on the LAN"],
)
async def test_a_redirect_to_a_name_with_a_local_address(
    monkeypatch: pytest.MonkeyPatch, mirror_at: str, followed: bool
) -> None:
    target = Redirects()
    mirror = Redirects(f"http://files.test:{await target.start()}/x")
    port = await mirror.start()
    addresses = {"hub.test": iter(["127.0.0.1", mirror_at]), "files.test": iter(["127.0.0.1"])}

    def getaddrinfo(host: str, port: int, *arguments: int, flags: int) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses[host]), port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with internet({}) as access:
        if followed:
            async with access.get(f"http://hub.test:{port}/a", TIMEOUT) as answer:
                assert await answer.text() == "here"
        else:
            with pytest.raises(Unreachable, match=r"hub\.test redirects to it, but it is in a local network"):
                async with access.get(f"http://hub.test:{port}/a", TIMEOUT):
                    pass
            assert not target.tokens
    for close in (mirror.close, target.close):
        await close()


@pytest.mark.parametrize("answers", [False, True])
async def test_a_lookup_without_an_answer_is_repeated_once_and_ends_soon(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    server, ended, calls = Redirects(), threading.Event(), []
    port = await server.start()

    def getaddrinfo(host: str, port: int, *arguments: int, flags: int) -> list[object]:
        calls.append(host)
        if len(calls) == 1 or not answers:
            ended.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(resolver, "_ATTEMPT_SECONDS", 0.1)
    try:
        async with internet({}) as access, asyncio.timeout(10):
            if answers:
                async with access.get(f"http://hub.test:{port}/a", TIMEOUT) as answer:
                    assert await answer.text() == "here"
            else:
                with pytest.raises(Unreachable, match="no DNS server answers; check"):
                    async with access.get(f"http://hub.test:{port}/a", TIMEOUT):
                        pass
        assert len(calls) == 2
    finally:
        ended.set()
        await server.close()


@pytest.mark.llama
@pytest.mark.cluster
async def test_a_daemon_uses_the_proxy_only_for_the_hub(
    content: bytes, tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    async with hub_behind_a_proxy(content) as (proxy, port):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        with Cluster(2, tmp_path / "nodes", llama, loopback=True) as cluster:
            await asyncio.to_thread(cluster.together)
            for node in cluster:
                reply = await asyncio.to_thread(node.ask, "POST", "/api/pull", {"model": NAME})
                assert reply.lines[-1] == {"status": "success"}
            fetched = len(proxy.asked)
            assert set(proxy.asked) == {"GET hub.test"}
            chat = {"model": NAME, "prompt": "a", "options": {"num_predict": 2}}
            reply = await asyncio.to_thread(cluster[1].ask, "POST", "/api/generate", chat)
            assert reply.status == 200, reply.body
            # The second node copied the files from the first.
            assert len(proxy.asked) == fetched
            await proxy.close()
            reply = await asyncio.to_thread(
                cluster[0].ask, "POST", "/api/cluster/plan", {"model": "hf.co/org/Other:Q4_0"}
            )
            assert f"through the proxy http://127.0.0.1:{port} (HTTP_PROXY)" in reply.body.decode()
            found = await asyncio.to_thread(cluster[0].ask, "GET", "/api/doctor")
            assert f"through the proxy http://127.0.0.1:{port}" in found.body.decode()


async def test_a_host_name_that_can_not_be_encoded_is_reported() -> None:
    async with internet({}) as access:
        with pytest.raises(Unreachable, match="can't be reached"):
            async with access.get("http://hub..test/file", TIMEOUT):
                pass


async def test_an_interrupted_response_is_reported(content: bytes) -> None:
    class Breaks(HttpDouble):
        async def start(self) -> str:
            app = web.Application()
            app.router.add_get("/", self._answer)
            return await self.serve(app)

        async def _answer(self, request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse(headers={"Content-Length": "100"})
            await answer.prepare(request)
            await answer.write(b"a")
            assert request.transport is not None
            request.transport.abort()
            return answer

    server = Breaks()
    url = await server.start()
    async with internet({}) as access:
        with pytest.raises(Unreachable, match=r"^127.0.0.1:\d+ broke off: "):
            async with access.get(url, TIMEOUT) as answer:
                await answer.read()
    await server.close()
