"""Authorization over HTTP: local programs, API keys by scope, other machines; the errors of each dialect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anthropic
import ollama
import openai
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import make_mocked_request

from sollold.api.http.access import INFERENCE, MODELS, PUBLIC, SECRET, scope_of
from sollold.api.http.application import build_app
from sollold.api.http.client_address import address_of, networks
from sollold.cluster.admission.keyring import KeyringMember
from sollold.cluster.gossip.record import WaitingMachine
from sollold.control.admission import Invite
from sollold.control.keys import Keys, Scope
from sollold.control.member_pass import MemberPasses
from sollold.control.secret_change import Rolled
from sollold.settings.schema import HttpSettings
from tests.api.api_parts import (
    CHAT,
    REMOTE,
    TRUSTED_PROXIES,
    PlainCluster,
    ScriptedService,
    chunk,
    parts,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.docs.pages import routes
from tests.doubles import FakeView, record
from tests.models.fakes import FakeCalls


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[Keys]:
    store = Keys(FakeView(record("0" * 16)), FakeCalls("0" * 16, {}), tmp_path / "keys.json")
    await store.start()
    yield store
    await store.close()


REQUESTS = [
    ("GET", "/api/tags", None, Scope.INFER),
    ("GET", "/v1/models", None, Scope.INFER),
    ("GET", "/api/cluster", None, Scope.INFER),
    ("POST", "/api/chat", CHAT, Scope.INFER),
    ("POST", "/v1/api/chat", CHAT, Scope.INFER),
    ("POST", "/api/show", {"model": "demo"}, Scope.INFER),
    ("POST", "/api/cluster/plan", {"model": "demo"}, Scope.INFER),
    ("POST", "/api/generate", {"model": "demo", "keep_alive": 0}, Scope.MODELS),
    ("POST", "/api/chat", {"model": "demo", "messages": [], "keep_alive": "0s"}, Scope.MODELS),
    ("POST", "/api/generate", {"model": "demo", "keep_alive": 5, "stream": False}, Scope.INFER),
    ("POST", "/api/cluster/load", {"model": "demo"}, Scope.MODELS),
    ("POST", "/api/cluster/unload", {"model": "demo"}, Scope.MODELS),
    ("DELETE", "/api/delete", {"model": "demo"}, Scope.MODELS),
    ("POST", "/api/pull", {"model": "demo"}, Scope.MODELS),
    ("POST", "/api/copy", {"source": "demo", "destination": "x"}, Scope.MODELS),
    ("POST", "/v1/api/pull", {"model": "demo"}, Scope.MODELS),
    ("POST", "/api/cluster/drain", {"node": "alpha"}, Scope.ADMIN),
    ("POST", "//api//cluster/drain/", {"node": "alpha"}, Scope.ADMIN),
    ("POST", "/api/cluster/scan", {}, Scope.ADMIN),
    ("GET", "/api/cluster/keys", None, Scope.ADMIN),
    ("POST", "/api/cluster/keys", {"name": "x"}, Scope.ADMIN),
]


@pytest.mark.parametrize(("method", "path", "body", "needed"), REQUESTS)
async def test_scope_that_each_route_needs(
    serve: Serve, http: ClientSession, keys: Keys, method: str, path: str, body: Any, needed: Scope
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    cluster = PlainCluster()
    url = await serve(parts(service, cluster=cluster, keys=keys), trusted_proxies=TRUSTED_PROXIES)

    async def status(headers: dict[str, str]) -> int:
        async with http.request(method, url + path, json=body, headers=headers) as answer:
            await answer.read()
            assert (answer.status == 401) == ("WWW-Authenticate" in answer.headers)
            return answer.status

    assert await status({}) not in (401, 403), "local programs need no key"
    assert (await status(REMOTE) == 401) == (needed is not Scope.INFER), "open until the first key"
    cluster.asked.clear()
    secrets = {scope: (await keys.create(scope, scope))[1] for scope in Scope}
    assert await status(REMOTE) == 401, "a key is required once one exists"
    assert not cluster.asked
    for scope, secret in secrets.items():
        for header in (
            {"Authorization": f"Bearer {secret}"},
            {"X-Api-Key": secret, "Authorization": "Bearer ollama"},
        ):
            got = await status(REMOTE | header)
            assert (got == 403) == (not scope.includes(needed)) and got != 401
    await keys.revoke(Scope.ADMIN)
    assert await status(REMOTE | {"Authorization": f"Bearer {secrets[Scope.ADMIN]}"}) == 401
    assert await status({}) not in (401, 403)


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({}, 401, "an API key is needed; `sollold key new"),
        ({"Authorization": "{key}"}, 401, "sent as `Authorization: Bearer KEY` or `x-api-key: KEY`"),
        ({"Authorization": "Basic eDp5"}, 401, "sent as `Authorization: Bearer KEY`"),
        ({"Authorization": "Bearer"}, 401, "sent as `Authorization: Bearer KEY`"),
        ({"Authorization": "Bearer ollama"}, 401, "is not known to this cluster"),
        ({"X-Api-Key": "sk-sollold-x"}, 401, "unknown, expired or revoked"),
        ({"Authorization": "  bEaReR \t {key} "}, 200, ""),
        ({"x-aPi-KEY": " {key}\t"}, 200, ""),
    ],
)
async def test_an_invalid_key_is_explained(
    serve: Serve, http: ClientSession, keys: Keys, headers: dict[str, str], status: int, message: str
) -> None:
    _, secret = await keys.create("laptop", Scope.INFER)
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES)
    sent = REMOTE | {name: value.format(key=secret) for name, value in headers.items()}
    async with http.get(url + "/api/tags", headers=sent) as answer:
        assert answer.status == status and message in await answer.text()


async def test_a_key_is_found_beside_the_basic_auth_of_a_proxy(
    serve: Serve, http: ClientSession, keys: Keys
) -> None:
    _, secret = await keys.create("laptop", Scope.INFER)
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES)
    sent = [*REMOTE.items(), ("Authorization", "Basic eDp5"), ("Authorization", f"Bearer {secret}")]
    async with http.get(url + "/api/tags", headers=sent) as answer:
        assert answer.status == 200


class PlainAdmission:
    """Accepts every change of the cluster's membership."""

    def __init__(self) -> None:
        self.secret = self

    async def admit(self, text: str) -> WaitingMachine:
        return WaitingMachine("a" * 16, text, "ABCD-EFGH")

    async def open_door(self, seconds: float) -> list[str]:
        return []

    async def rotate(self) -> Rolled:
        return Rolled()

    async def evict(self, text: str) -> tuple[KeyringMember, Rolled]:
        return KeyringMember("a" * 16, text), Rolled()

    async def secure(self, nodes: list[str]) -> Rolled:
        return Rolled()

    def invite(self) -> Invite:
        return Invite("1234-5678", "127.0.0.1", 600.0)

    async def join(self, code: str, seed: str) -> str:
        return "anna"


@pytest.mark.parametrize(
    ("path", "body", "allowed_remotely"),
    [
        ("admit", {"machine": "bert"}, True),
        ("door", {"seconds": 60}, True),
        ("rotate", {}, True),
        ("evict", {"machine": "bert"}, True),
        ("secure", {"nodes": ["a" * 16]}, True),
        ("invite", {}, False),
        ("join", {"code": "1234-5678", "seed": "anna"}, False),
    ],
)
async def test_membership_changes_need_the_admin_scope(
    serve: Serve, http: ClientSession, keys: Keys, path: str, body: Any, allowed_remotely: bool
) -> None:
    url = await serve(parts(admission=PlainAdmission(), keys=keys), trusted_proxies=TRUSTED_PROXIES)

    async def status(headers: dict[str, str]) -> int:
        async with http.post(f"{url}/api/cluster/{path}", json=body, headers=headers) as answer:
            return answer.status

    assert await status({}) == 200
    assert await status(REMOTE) == 401
    secrets = {scope: (await keys.create(scope, scope))[1] for scope in Scope}
    for scope, secret in secrets.items():
        expected = 200 if scope is Scope.ADMIN and allowed_remotely else 403
        assert await status(REMOTE | {"Authorization": f"Bearer {secret}"}) == expected


@pytest.mark.parametrize(
    ("mode", "has_key", "status"),
    [("", False, 200), ("", True, 401), ("open", False, 200), ("open", True, 200), ("keys", False, 401)],
)
async def test_http_auth(
    serve: Serve, http: ClientSession, keys: Keys, mode: str, has_key: bool, status: int
) -> None:
    if has_key:
        await keys.create("one", Scope.INFER)
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES, auth=mode)
    async with http.get(url + "/api/tags", headers=REMOTE) as answer:
        assert answer.status == status
    async with http.get(url + "/api/tags", headers=REMOTE | {"Authorization": "Bearer ollama"}) as answer:
        assert answer.status == status, "an invalid key counts as none"
    async with http.post(url + "/api/cluster/drain", json={}, headers=REMOTE) as answer:
        assert answer.status == 401, "commands from other machines always need a key"


@pytest.mark.parametrize("path", sorted(PUBLIC - {"/web/{file}"}))
async def test_public_routes_need_no_key(serve: Serve, http: ClientSession, keys: Keys, path: str) -> None:
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    for headers in (REMOTE, REMOTE | {"Authorization": "Bearer sk-sollold-wrong"}):
        async with http.get(url + path, headers=headers) as answer:
            assert answer.status == 200
    preflight = REMOTE | {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    async with http.options(url + "/api/chat", headers=preflight) as answer:
        assert answer.status == 204


def test_every_route_is_in_a_table() -> None:
    services = parts()
    app = build_app(services, HttpSettings())
    known = PUBLIC | INFERENCE | MODELS | SECRET
    paths = {resource.canonical for resource in app.router.resources()}
    assert {path.removeprefix("/v1") if path.startswith("/v1/api/") else path for path in paths} >= known
    assert scope_of("POST", "/api/something/new") is Scope.ADMIN, "unlisted routes need the admin scope"
    assert scope_of("GET", "/api/cluster/keys") is Scope.ADMIN


def test_inference_routes_need_only_the_infer_scope() -> None:
    dialects = [row for row in routes() if row.path.startswith(("/v1/responses", "/v1/messages"))]
    asking = [row for row in routes() if row.inference]
    assert len(dialects) > 6 and len(asking) > 10
    needed = {row.path: scope_of(row.method, row.path) for row in (*dialects, *asking)}
    assert {path: scope for path, scope in needed.items() if scope is not Scope.INFER} == {}


USER: Any = [{"role": "user", "content": "hi"}]


def hello_service() -> ScriptedService:
    return ScriptedService(chunk("hello"), chunk(finish="stop"), usage_chunk())


async def test_ollama_client_raises_on_a_missing_key(serve: Serve, keys: Keys) -> None:
    url = await serve(parts(hello_service(), keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    client = ollama.AsyncClient(host=url, headers=REMOTE)
    with pytest.raises(ollama.ResponseError, match="an API key is needed") as refused:
        await client.chat("demo", USER)
    assert refused.value.status_code == 401
    _, secret = await keys.create("me", Scope.INFER)
    client = ollama.AsyncClient(host=url, headers=REMOTE | {"Authorization": f"Bearer {secret}"})
    assert (await client.list()).models
    pieces = [part.message.content async for part in await client.chat("demo", USER, stream=True)]
    assert "".join(text or "" for text in pieces) == "hello"


async def test_openai_client_raises_on_a_wrong_key(serve: Serve, keys: Keys) -> None:
    url = await serve(parts(hello_service(), keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    _, secret = await keys.create("me", Scope.INFER)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=secret, default_headers=REMOTE) as client:
        assert (await client.models.list()).data
        answer = await client.chat.completions.create(model="demo", messages=USER, stream=True)
        pieces = [part.choices[0].delta.content async for part in answer if part.choices]
        assert "".join(text or "" for text in pieces) == "hello"
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="wrong", default_headers=REMOTE) as client:
        with pytest.raises(openai.AuthenticationError, match="an API key is needed") as refused:
            await client.models.list()
        assert refused.value.type == "authentication_error"


async def test_anthropic_client_raises_on_a_wrong_key(serve: Serve, keys: Keys) -> None:
    url = await serve(parts(hello_service(), keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    _, secret = await keys.create("me", Scope.INFER)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="wrong", default_headers=REMOTE) as client:
        with pytest.raises(anthropic.AuthenticationError, match="an API key is needed"):
            await client.messages.create(model="demo", max_tokens=5, messages=USER)
    async with anthropic.AsyncAnthropic(base_url=url, api_key=secret, default_headers=REMOTE) as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="none", max_tokens=5, messages=USER)
        async with client.messages.stream(model="demo", max_tokens=5, messages=USER) as stream:
            assert "".join([text async for text in stream.text_stream]) == "hello"


async def test_keys_over_http(serve: Serve, http: ClientSession, keys: Keys) -> None:
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES)
    body = {"name": "laptop", "scope": "admin", "expires": "30d"}
    async with http.post(url + "/api/cluster/keys", json=body) as answer:
        created = await answer.json()
        assert answer.status == 200 and created["scope"] == "admin" and created["expires"]
    admin = REMOTE | {"X-Api-Key": created["key"]}
    async with http.get(url + "/api/cluster/keys", headers=admin) as answer:
        listed = await answer.json()
        assert [key["name"] for key in listed["keys"]] == ["laptop"] and created["key"] not in str(listed)
        assert listed["open"] is False
    for wrong in ({"name": "x", "expires": "soon"}, {"name": "x", "scope": "all"}, {"name": "laptop"}):
        async with http.post(url + "/api/cluster/keys", json=wrong, headers=admin) as answer:
            assert answer.status == 400
    async with http.delete(url + "/api/cluster/keys", json={"name": "laptop"}, headers=admin) as answer:
        assert answer.status == 200 and (await answer.json())["revoked"]
    async with http.get(url + "/api/cluster/keys", headers=admin) as answer:
        assert answer.status == 401


async def test_a_pass_is_issued_only_locally_and_grants_admin(
    serve: Serve, http: ClientSession, keys: Keys
) -> None:
    view = FakeView(record("0" * 16, addresses=("192.168.1.5",)))
    passes = MemberPasses(view, FakeCalls("0" * 16, {}), str)
    url = await serve(parts(keys=keys, passes=passes), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    async with http.post(url + "/api/cluster/pass", headers=REMOTE) as answer:
        assert answer.status == 401
    _, admin = await keys.create("admin", Scope.ADMIN)
    async with http.post(url + "/api/cluster/pass", headers=REMOTE | {"X-Api-Key": admin}) as answer:
        assert answer.status == 403
    for host in ("192.168.1.66", "nowhere.invalid"):
        async with http.post(url + "/api/cluster/pass", json={"host": host}) as answer:
            assert answer.status == 404
    async with http.post(url + "/api/cluster/pass", json={"host": "192.168.1.5"}) as answer:
        issued = (await answer.json())["pass"]
    for secret, status in ((issued, 200), (issued[:-1] + "x", 401)):
        headers = REMOTE | {"Authorization": f"Bearer {secret}"}
        async with http.post(url + "/api/cluster/drain", json={}, headers=headers) as answer:
            assert answer.status == status


async def test_a_batch_is_visible_only_to_its_owner_and_admins(
    serve: Serve, http: ClientSession, keys: Keys
) -> None:
    url = await serve(parts(keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="open")
    stranger = {"X-Forwarded-For": "192.168.1.78"}
    _, admin = await keys.create("admin", Scope.ADMIN)
    body = {"model": "demo", "input": ["a"]}
    async with http.post(url + "/api/batch/embed", json=body, headers=REMOTE) as answer:
        assert answer.status == 202
        path = answer.headers["Location"]
    results = path.replace("jobs", "results")
    for headers, status, count in (
        (REMOTE, 200, 1),
        (stranger, 404, 0),
        (REMOTE | {"X-Api-Key": admin}, 200, 1),
    ):
        async with http.get(url + "/api/batch/jobs", headers=headers) as answer:
            assert len((await answer.json())["jobs"]) == count
        for job_path in (path, results):
            async with http.get(url + job_path, headers=headers) as answer:
                assert answer.status == status
    async with http.delete(url + path, headers=stranger) as answer:
        assert answer.status == 404
    async with http.delete(url + path, headers=REMOTE) as answer:
        assert answer.status == 200


async def test_only_a_valid_key_identifies_a_client(serve: Serve, http: ClientSession, keys: Keys) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service, keys=keys), trusted_proxies=TRUSTED_PROXIES, auth="open")
    key, secret = await keys.create("me", Scope.INFER)
    for headers, client in (
        ({}, "127.0.0.1"),
        ({"Authorization": "Bearer made-up"}, "127.0.0.1"),
        (REMOTE | {"Authorization": "Bearer made-up-2"}, "192.168.1.77"),
        (REMOTE | {"Authorization": f"Bearer {secret}"}, f"key:{key.id}"),
    ):
        async with http.post(url + "/api/chat", json=CHAT, headers=headers) as answer:
            await answer.read()
        assert service.asks[-1].client == client


@pytest.mark.parametrize(
    ("peer", "own_address", "headers", "address", "local"),
    [
        ("127.0.0.1", "127.0.0.1", {}, "127.0.0.1", True),
        ("::1", "::1", {}, "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", {}, "127.0.0.1", True),
        ("192.168.1.5", "192.168.1.5", {}, "192.168.1.5", True),
        ("192.168.1.6", "192.168.1.5", {}, "192.168.1.6", False),
        ("fe80::1%eth0", "fe80::2%eth0", {}, "fe80::1", False),
        # A local proxy forwards requests of other machines. If it isn't trusted, its headers don't count.
        ("127.0.0.1", "127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"X-Real-IP": "8.8.8.8"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"Via": "1.1 proxy"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"X-Forwarded-Proto": "https"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"CF-Connecting-IP": "8.8.8.8"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"Tailscale-User-Login": "a@b.c"}, "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", {"Forwarded": "for=8.8.8.8"}, "127.0.0.1", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "1.2.3.4, 10.0.0.8"}, "1.2.3.4", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "9.9.9.9, 1.2.3.4"}, "1.2.3.4", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, "127.0.0.1", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "nonsense"}, "10.0.0.9", False),
        # Some proxies append the port.
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "9.9.9.9, 1.2.3.4:5678"}, "1.2.3.4", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "[2001:db8::1]:443, 10.0.0.8:1"}, "2001:db8::1", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "2001:db8::1"}, "2001:db8::1", False),
        ("10.0.0.9", "10.0.0.1", {"X-Forwarded-For": "::ffff:1.2.3.4"}, "1.2.3.4", False),
        ("192.168.1.6", "192.168.1.5", {"X-Forwarded-For": "1.2.3.4"}, "192.168.1.6", False),
    ],
)
def test_client_addresses_behind_proxies(
    peer: str, own_address: str, headers: dict[str, str], address: str, local: bool
) -> None:
    names = {"peername": (peer, 1), "sockname": (own_address, 2)}
    transport = Mock()
    transport.get_extra_info.side_effect = names.get
    request = make_mocked_request("GET", "/", headers=headers, transport=transport).clone(remote=peer)
    client = address_of(request, networks(["10.0.0.0/24"]))
    assert (client.address, client.local) == (address, local)
