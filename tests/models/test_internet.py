"""What comes from the internet comes through the proxy that the environment names, and nothing else does."""

from __future__ import annotations

import asyncio
import socket
import ssl
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
    """A hub that only the proxy can find, as hub.test; the proxy and its port."""
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
    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust or True))

    made = Internet(environ, session)
    try:
        yield made
    finally:
        await made.close()


async def test_the_hub_is_asked_through_the_proxy_with_its_password(content: bytes) -> None:
    async with hub_behind_a_proxy(content, login="anna:a b") as (proxy, port):
        environ = {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": f"http://anna:a%20b@127.0.0.1:{port}"}
        async with internet(environ) as there:
            assert (await RemoteHeaders(there).read(NAME)).model.layers == 3
            assert set(proxy.asked) == {"GET hub.test"}
            assert not there.trouble()


async def test_https_goes_through_a_tunnel_of_the_proxy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pem").write_bytes(issue(SECRET, Subject(("hub.test",), ()), datetime.now(UTC)))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "pem")
    trust = ssl.create_default_context(cadata=authority_pem(SECRET))
    async with hub_behind_a_proxy(content, tls, login="anna:b") as (proxy, port):
        environ = {"HF_ENDPOINT": "https://hub.test", "HTTPS_PROXY": f"http://anna:b@127.0.0.1:{port}"}
        async with internet(environ, trust) as there:
            assert (await RemoteHeaders(there).read(NAME)).model.layers == 3
        assert set(proxy.asked) == {"CONNECT hub.test:443"}
        async with internet({**environ, "HTTPS_PROXY": f"127.0.0.1:{port}"}, trust) as there:
            with pytest.raises(RemoteError, match="asks for a user and a password"):
                await RemoteHeaders(there).read(NAME)
        async with internet(environ) as there:
            with pytest.raises(RemoteError, match="its certificate is not trusted"):
                await RemoteHeaders(there).read(NAME)


async def test_a_proxy_that_does_not_answer_is_named_also_for_doctor(content: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environ = {"HF_ENDPOINT": "https://hub.test", "HTTPS_PROXY": f"http://anna:secret@127.0.0.1:{port}"}
    through = f"the proxy http://127.0.0.1:{port} (HTTPS_PROXY)"
    words = f"hub.test can't be reached through {through}: Connection refused"
    async with internet(environ) as there:
        with pytest.raises(RemoteError) as caught:
            await RemoteHeaders(there).read(NAME)
        assert str(caught.value) == words
        [(what, fix)] = there.trouble()
        assert what.startswith("the last download from hub.test failed at ") and what.endswith(words)
        assert "Environment=HTTPS_PROXY=" in fix and "secret" not in what + fix
        async with hub_behind_a_proxy(content) as (_, port):
            there.environ = {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": f"127.0.0.1:{port}"}
            await RemoteHeaders(there).read(NAME)
        assert not there.trouble()


async def test_without_a_proxy_doctor_tells_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with internet({"HF_ENDPOINT": "http://nowhere.invalid"}) as there:
        with pytest.raises(RemoteError, match=r"nowhere\.invalid can't be reached: "):
            await RemoteHeaders(there).read(NAME)
        assert "if it needs a proxy, set it" in there.trouble()[0][1]
        monkeypatch.setattr("sollold.models.transfer.internet._REMEMBERED", 0.0)
        assert not there.trouble(), "what was wanted long ago"


class Redirects(HttpDouble):
    """Sends callers elsewhere and keeps what they showed."""

    def __init__(self, to: str = "") -> None:
        self.to = to
        self.shown: list[str | None] = []

    async def start(self) -> int:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        return urlsplit(await self.serve(app)).port or 0

    async def _answer(self, request: web.Request) -> web.Response:
        self.shown.append(request.headers.get("Authorization"))
        if self.to:
            return web.Response(status=302, headers={"Location": self.to})
        return web.Response(text="here")


async def test_a_redirect_has_its_own_way_and_the_token_stays_behind() -> None:
    target, mirror = Redirects(), Redirects("http://files.test/x")
    proxy = HttpProxy(("127.0.0.1", await target.start()))
    port = await proxy.start()
    first = f"http://127.0.0.1:{await mirror.start()}/a"
    async with internet({"HTTP_PROXY": f"http://127.0.0.1:{port}"}) as there:
        async with there.get(first, TIMEOUT, {"Authorization": "Bearer secret"}) as answer:
            assert await answer.text() == "here"
        # This machine was asked directly, the internet through the proxy.
        assert proxy.asked == ["GET files.test"]
        assert (mirror.shown, target.shown) == (["Bearer secret"], [None])
        mirror.to = first
        with pytest.raises(Unreachable, match="redirects more than 10 times"):
            async with there.get(first, TIMEOUT):
                pass
    for end in (proxy.close, mirror.close, target.close):
        await end()


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
def test_nobody_outside_leads_inside(before: str, location: str) -> None:
    with pytest.raises(Unreachable, match="it redirects to"):
        redirected(before, location, None)


def test_a_mirror_of_the_network_may_lead_anywhere_there() -> None:
    assert redirected("http://192.168.1.2/a", "http://192.168.1.3/b", None)[0] == "http://192.168.1.3/b"
    assert redirected("https://hub.test/a", "/b", {"Authorization": "x"})[1] == {"Authorization": "x"}
    assert redirected("https://hub.test/a", "https://cdn.test/b", {"Authorization": "x"})[1] == {}


@pytest.mark.llama
@pytest.mark.cluster
async def test_a_daemon_uses_the_proxy_for_the_hub_and_for_nothing_else(
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
            # The second node took the files from the first.
            assert len(proxy.asked) == fetched
            await proxy.close()
            reply = await asyncio.to_thread(
                cluster[0].ask, "POST", "/api/cluster/plan", {"model": "hf.co/org/Other:Q4_0"}
            )
            assert f"through the proxy http://127.0.0.1:{port} (HTTP_PROXY)" in reply.body.decode()
            found = await asyncio.to_thread(cluster[0].ask, "GET", "/api/doctor")
            assert f"through the proxy http://127.0.0.1:{port}" in found.body.decode()


async def test_what_breaks_off_says_so(content: bytes) -> None:
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
    async with internet({}) as there:
        with pytest.raises(Unreachable, match=r"^127.0.0.1:\d+ broke off: "):
            async with there.get(url, TIMEOUT) as answer:
                await answer.read()
    await server.close()
