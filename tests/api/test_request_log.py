"""The request log: a line has the client, model, outcome and usage of a request, never its content."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
from aiohttp import ClientSession

from sollold.control.keys import Keys, Scope
from sollold.errors import Fault, Refusal
from sollold.log import FIELDS, REQUEST_FIELDS
from tests.api.api_parts import (
    CHAT,
    REMOTE,
    TRUSTED_PROXIES,
    ScriptedPuller,
    ScriptedService,
    chunk,
    parts,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.doubles import FakeView, record, until
from tests.models.fakes import FakeCalls


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sollold.access")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == "sollold.access"]


def fields(line: str) -> dict[str, str]:
    """Parse ``name=value`` pairs; values may be quoted."""
    return dict(word.split("=", 1) for word in shlex.split(line))


async def test_a_request_has_one_line(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    keys = Keys(FakeView(record("0" * 16)), FakeCalls("0" * 16, {}), tmp_path / "keys.json")
    _, secret = await keys.create("my laptop", Scope.INFER)
    service = ScriptedService(chunk("the answer"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, keys=keys), trusted_proxies=TRUSTED_PROXIES)
    headers = REMOTE | {"Authorization": f"Bearer {secret}", "X-Request-Id": "abc"}
    body = {**CHAT, "messages": [{"role": "user", "content": "the question"}]}
    for path in ("/api/chat", "//api/chat/"):
        async with http.post(url + path, json=body, headers=headers) as answer:
            await answer.read()
    await until(lambda: len(lines(caplog)) == 2)
    first, second = lines(caplog)
    logged = fields(first)
    assert logged["client"] == "192.168.1.77" and logged["key"] == "my laptop"
    assert logged["route"] == "POST /api/chat" and logged["status"] == "200" and logged["outcome"] == "ok"
    assert logged["model"] == "demo:latest" and logged["node"] == "beta" and logged["resumed"] == "0"
    assert int(logged["prompt_tokens"]) > 0 and int(logged["tokens"]) > 0
    assert 0 <= float(logged["first_token"]) <= float(logged["seconds"])
    assert fields(second)["route"] == "POST /api/chat"
    assert fields(second)["model"] == "demo:latest" and fields(second)["key"] == "my laptop"
    for secret_text in ("the question", "the answer", secret):
        assert secret_text not in caplog.text
    line = caplog.records[-1]
    assert line.__dict__["request"] == "abc" and line.__dict__["key"] == "my laptop"
    assert set(logged) | {"request"} <= {*FIELDS, *REQUEST_FIELDS}
    async with http.get(url + "/metrics", headers=headers) as answer:
        metrics = await answer.text()
    assert 'sollold_key_requests_total{key="my laptop"} 2.0' in metrics
    assert 'sollold_http_requests_total{dialect="ollama",route="/api/chat",status="200"} 2.0' in metrics
    assert f'sollold_key_generated_tokens_total{{key="my laptop"}} {2 * int(logged["tokens"])}.0' in metrics


@pytest.mark.parametrize(("mode", "count"), [("off", 0), ("inference", 4), ("all", 5)])
async def test_which_requests_have_a_line(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture, mode: str, count: int
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service), trusted_proxies=TRUSTED_PROXIES, logged=mode)
    for method, path, body, headers in (
        ("GET", "/api/tags", None, {}),
        ("POST", "/api/chat", CHAT, {}),
        ("POST", "/api/chat", {"model": "none", "messages": []}, {}),
        ("POST", "/api/cluster/drain", {}, {}),
        ("POST", "/api/cluster/drain", {}, REMOTE),
    ):
        async with http.request(method, url + path, json=body, headers=headers) as answer:
            await answer.read()
    # The server logs a request before it reads the next one of the connection.
    async with http.get(f"{url}/health") as answer:
        assert answer.status == 200
    await until(lambda: len(lines(caplog)) >= count)
    logged = [line for line in lines(caplog) if "/health" not in line]
    assert len(logged) == count
    if count:
        assert fields(logged[-1])["status"] == "401" and "key" not in fields(logged[-1])
        assert fields(logged[-2])["key"] == "local"


async def test_a_refused_request_has_one_line_with_the_reason(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    url = await serve(parts())
    name = 'none" status=200'
    async with http.post(f"{url}/api/chat", json={"model": name, "messages": []}) as answer:
        assert answer.status == 404
    async with http.get(f"{url}/api/cluster/history?seconds=x") as answer:
        assert answer.status == 400
    await until(lambda: len(lines(caplog)) == 2)
    refused, invalid = lines(caplog)
    assert fields(refused)["status"] == "404" and name in fields(refused)["error"]
    assert fields(invalid)["error"] == "seconds must be an integer of at most 9 digits"
    assert [entry for entry in caplog.records if entry.name != "sollold.access"] == []


async def test_a_download_that_fails_later_has_the_reason(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    down = Refusal(Fault.UNAVAILABLE, "the network is down")
    url = await serve(parts(puller=ScriptedPuller({"status": "pulling manifest"}, down)))
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        assert answer.status == 200
        await answer.read()
    await until(lambda: lines(caplog))
    assert fields(lines(caplog)[0])["error"] == "the network is down"


async def test_a_path_cannot_forge_a_line(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    url = await serve(parts())
    async with http.post(url + "/x%0Aclient=1.2.3.4 status=200%22", json={}) as answer:
        assert answer.status == 404
    await until(lambda: lines(caplog))
    (line,) = lines(caplog)
    assert "\n" not in line and fields(line)["status"] == "404" and fields(line)["client"] == "127.0.0.1"
