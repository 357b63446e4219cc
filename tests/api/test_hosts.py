"""Accepted host names, against DNS rebinding, and requests of pages of other sites."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import ClientSession

from sollold.api.http.cors import allowed
from sollold.api.http.hosts import Hosts
from sollold.settings.schema import HttpSettings
from tests.api.api_parts import PlainCluster, parts, record
from tests.api.conftest import Serve


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("127.0.0.1:11435", True),
        ("192.168.1.7", True),
        ("[::1]:11435", True),
        ("[fe80::1%eth0]:11435", True),
        ("8.8.8.8", True),
        ("localhost:11435", True),
        ("LOCALHOST.", True),
        ("app.localhost", True),
        ("anna:11435", True),
        ("ANNA", True),
        ("bert.local:11435", True),
        ("pc.lan", True),
        ("host.docker.internal:11435", True),
        ("pc.home.arpa", True),
        ("llm.example.com", True),
        ("a.wild.example", True),
        ("evil.example:11435", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("annaevil", False),
        ("x-local", False),
        ("wild.example.evil", False),
        ("127.0.0.1:11435.evil.example", False),
        ("[::1]evil.example", False),
        ("[localhost]", False),
        ("127.0.0.1%evil.example", False),
        ("2130706433", False),
        ("0x7f.1", False),
        ("", False),
        (".", False),
    ],
)
def test_accepted_hosts(host: str, accepted: bool) -> None:
    hosts = Hosts(("LLM.example.com", "*.wild.example"), lambda: ["Anna"])
    assert hosts.accepts(host) is accepted


@pytest.mark.parametrize("host", ["xn--bro-hoa.example", "BÜRO.example:11435", "x.xn--bro-hoa.example."])
def test_internationalized_names_match_in_punycode(host: str) -> None:
    assert Hosts(("*.büro.example", "Büro.example"), list).accepts(host)
    assert Hosts((), lambda: ["Büro"]).accepts("xn--bro-hoa") and Hosts((), lambda: ["büro"]).accepts("büro")
    assert not Hosts(("büro.example",), lambda: ["büro"]).accepts("xn--bro-hob.example")
    assert allowed("https://xn--bro-hoa.example", "pc", ("https://büro.example/",))


def test_a_star_accepts_any_name() -> None:
    assert Hosts(("*",), list).accepts("anything.example")


@pytest.mark.parametrize("path", ["/api/cluster/drain", "/v1/chat/completions", "/v1/messages", "/"])
async def test_a_rebound_name_is_refused_in_the_form_of_the_dialect(
    serve: Serve, http: ClientSession, path: str
) -> None:
    cluster = PlainCluster()
    url = await serve(parts(cluster=cluster))
    headers = {"Host": "evil.example:11435", "Origin": "http://evil.example:11435"}
    async with http.request("GET" if path == "/" else "POST", url + path, json={}, headers=headers) as answer:
        body = await answer.json()
        assert answer.status == 403
    error = body["error"]
    assert "evil.example:11435 is not allowed" in (error if isinstance(error, str) else error["message"])
    assert not cluster.asked
    if path == "/v1/messages":
        assert (body["type"], error["type"]) == ("error", "permission_error")


async def test_names_of_nodes_are_accepted(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(name="anna"))
    url = await serve(parts(cluster=cluster), hosts=("llm.example.com",))
    for host, status in (("anna:1", 200), ("llm.example.com", 200), ("bert:1", 403)):
        async with http.get(url + "/api/version", headers={"Host": host}) as answer:
            assert answer.status == status
    cluster.change(record(name="anna"), record(node="1" * 16, name="bert"))
    async with http.get(url + "/api/version", headers={"Host": "bert:1"}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("host", "forwarded", "status"),
    [
        ("evil.local:11435", "", 403),
        ("evil.local.", "", 403),
        ("anna.evil.local", "", 403),
        ("Anna.local:11435", "", 200),
        ("llm.local", "", 200),
        ("pc.lan", "", 200),
        ("evil.local:11435", "192.168.1.7", 200),
    ],
)
async def test_programs_on_the_machine_use_no_mdns_name_that_others_can_claim(
    serve: Serve,
    http: ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    forwarded: str,
    status: int,
) -> None:
    """A page under such a name, pointed at 127.0.0.1, would have all rights in a browser on the machine."""
    monkeypatch.setattr(socket, "gethostname", lambda: "anna.example.com")
    url = await serve(parts(cluster=PlainCluster(record(name="carl"))), hosts=("llm.local",))
    headers = {"Host": host, "Origin": f"http://{host}"} | ({"Via": forwarded} if forwarded else {})
    async with http.get(url + "/api/version", headers=headers) as answer:
        assert answer.status == status


@pytest.mark.parametrize(
    ("site", "mode", "destination", "origin", "status"),
    [
        ("cross-site", "no-cors", "image", "", 403),
        ("cross-site", "navigate", "iframe", "", 403),
        ("Cross-Site", "no-cors", "image", "", 403),
        ("cross-site", "navigate", "document", "", 200),
        ("cross-site", "cors", "empty", "null", 403),
        ("cross-site", "cors", "empty", "http://localhost:3000", 200),
        ("cross-site", "cors", "empty", "https://evil.example", 403),
        ("same-origin", "cors", "empty", "", 200),
        ("none", "navigate", "document", "", 200),
        ("", "", "", "", 200),
    ],
)
async def test_requests_of_pages_of_other_sites(
    serve: Serve, http: ClientSession, site: str, mode: str, destination: str, origin: str, status: int
) -> None:
    url = await serve(parts())
    names = ("Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Origin")
    sent = {
        name: value for name, value in zip(names, (site, mode, destination, origin), strict=True) if value
    }
    async with http.get(url + "/api/version", headers=sent) as answer:
        assert answer.status == status


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0"])
async def test_ollamas_default_origins_are_allowed(serve: Serve, http: ClientSession, host: str) -> None:
    url = await serve(parts())
    for scheme in ("http", "https"):
        async with http.get(url + "/api/version", headers={"Origin": f"{scheme}://{host}:3000"}) as answer:
            assert answer.status == 200
    assert {f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")} <= set(
        HttpSettings().cors_origins
    )


_LOCAL = "Host: localhost\r\n"


@pytest.mark.parametrize(
    ("target", "head", "status"),
    [
        ("/api/version", _LOCAL, 200),
        ("http://localhost/api/version", _LOCAL, 200),
        ("http://evil.example:11435/api/version", _LOCAL, 403),
        ("http://localhost/api/version", "Host: evil.example\r\n", 403),
        ("/api/version", _LOCAL + "Host: evil.example\r\n", 400),
        ("/api/version", "Host: evil.example\r\n" + _LOCAL, 400),
        ("/api/version", "", 400),
        ("/api/version", _LOCAL + "Origin: http://localhost\r\nOrigin: http://evil.example\r\n", 403),
        ("/api/version", _LOCAL + "Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n", 403),
    ],
)
async def test_conflicting_and_repeated_host_headers(
    serve: Serve, target: str, head: str, status: int
) -> None:
    url = await serve(parts())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    try:
        writer.write(f"GET {target} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode())
        async with asyncio.timeout(20):
            assert int((await reader.readline()).split()[1]) == status
    finally:
        writer.close()
