"""The local Ollama: its models as endpoints, and its process if managed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.cluster.gossip.packet import RECORD_LIMIT, encode
from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.engines.address import EngineAddress
from sollold.engines.llamacpp.child_journal import MARK, Journal
from sollold.engines.llamacpp.process import Process
from sollold.engines.ollama.api import Loaded, OllamaApi, OllamaError, Tag, address, is_here
from sollold.engines.ollama.convert import seconds_left
from sollold.engines.ollama.created_models import CreatedModels
from sollold.engines.ollama.endpoints import OllamaEndpoints
from sollold.engines.ollama.service import _MAX_HANGS, LocalOllama
from sollold.machine.device import Device, Kind
from sollold.models.stores.catalogue import Catalogue
from sollold.settings.schema import GIB, ModelSettings, OllamaSettings
from tests.doubles import FakeView, free_port, record, until
from tests.models.stores import OllamaStore
from tests.ollama_standin import Known, Standin

Make = Callable[..., LocalOllama]
ROOT = Path(__file__).parents[2]


def cpu(total: int = 8 * GIB) -> Device:
    return Device("CPU", Kind.CPU, "cpu", total, total, total, 0, total)


@pytest.fixture
def view() -> FakeView:
    return FakeView(record("n", devices=(cpu(),)))


@pytest.fixture
async def catalogue(tmp_path: Path) -> AsyncIterator[Catalogue]:
    OllamaStore(tmp_path / "store").model("huge:latest", tmp_path)
    settings = ModelSettings(ollama_stores=(str(tmp_path / "store"),), huggingface=False)
    catalogue = Catalogue(settings, tmp_path / "state", environ={}, home=tmp_path)
    await catalogue.start()
    yield catalogue
    await catalogue.close()


@pytest.fixture
async def standin() -> AsyncIterator[Standin]:
    models = [
        Known("small:latest", 1000),
        Known("huge:latest", 64 * GIB),
        Known("far:120b-cloud", 10, remote_host="https://ollama.com"),
        Known("embed:latest", 100, ("embedding",)),
    ]
    async with Standin(models) as server:
        yield server


@pytest.fixture
async def make(
    view: FakeView, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Make]:
    monkeypatch.setattr("sollold.engines.ollama.service._RETRY_SECONDS", (0.05, 0.1))
    made: list[LocalOllama] = []

    def make_ollama(url: str, **options: Any) -> LocalOllama:
        environ = options.pop("environ", {})
        port = options.pop("own_port", 0)
        more: dict[str, Any] = {key: options.pop(key) for key in ("stores", "service") if key in options}
        settings = OllamaSettings(url=url, **options)
        journal = Journal(tmp_path / "journal")
        ollama = LocalOllama(
            settings,
            view,
            catalogue,
            journal,
            tmp_path,
            own_port=port,
            environ=environ,
            poll=0.05,
            **({"service": {}} | more),
        )
        made.append(ollama)
        return ollama

    yield make_ollama
    for ollama in made:
        await ollama.close()


def names(ollama: LocalOllama) -> dict[str, Endpoint]:
    return {endpoint.model: endpoint for endpoint in ollama.endpoints()}


async def test_ollamas_models_are_endpoints(
    make: Make, standin: Standin, view: FakeView, catalogue: Catalogue
) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    assert ollama.version == "0.33.0"
    assert set(names(ollama)) == {"small:latest", "embed:latest"}, (
        "models that are too large and cloud models are left out"
    )
    small = names(ollama)["small:latest"]
    assert (small.id, small.backend, small.state) == ("ollama:small:latest", Backend.OLLAMA, State.READY)
    assert (small.loaded, small.bytes) == (False, 0)
    assert names(ollama)["embed:latest"].embedding
    assert view.me.endpoints == ollama.endpoints()
    assert ollama.address(small.id) == EngineAddress(standin.url)
    assert ollama.address("ollama:none") is None
    offered = {model.name: model for model in catalogue.models}
    assert offered["small:latest"].parameters == 8_000_000_000
    assert offered["small:latest"].only_ollama
    # The context length that Ollama reports limits requests.
    assert (offered["small:latest"].context_train, offered["small:latest"].width) == (4096, 64)


async def test_capabilities_missing_in_ollamas_list_are_requested_once(
    make: Make, standin: Standin, catalogue: Catalogue
) -> None:
    """Older Ollamas list no capabilities, newer ones not those of a GGUF file's own chat template."""
    standin.models = {
        "new:latest": Known("new:latest", 1000, ("tools", "thinking", "completion"), listed=("completion",)),
        "old:latest": Known("old:latest", 1000, ("embedding",), listed=()),
        "huge:latest": standin.models["huge:latest"],
    }
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: len(names(ollama)) == 2)
    capabilities = {model.name: model.capabilities for model in catalogue.models}
    assert capabilities["new:latest"] == ("tools", "thinking", "completion")
    assert capabilities["old:latest"] == ("embedding",)
    assert names(ollama)["old:latest"].embedding
    polls = standin.polls
    await until(lambda: standin.polls > polls + 12)
    assert standin.shown == ["new:latest", "old:latest"], "once, and not for a model whose file is readable"


async def test_an_older_list_does_not_replace_a_newer_one(view: FakeView, catalogue: Catalogue) -> None:
    """The older one waits for capabilities while a model is deleted."""
    asked, answered = asyncio.Event(), asyncio.Event()
    tags = [Tag("kept:latest", size=1000, digest="k"), Tag("deleted:latest", size=1000, digest="d")]

    class Api(OllamaApi):
        async def tags(self) -> list[Tag]:
            return list(tags)

        async def capabilities(self, model: str) -> list[str]:
            if not asked.is_set():
                asked.set()
                await answered.wait()
            return ["completion"]

    async with aiohttp.ClientSession() as session:
        api, models = Api(session, "http://127.0.0.1:1"), OllamaEndpoints(view, catalogue, lambda: 1)
        older = asyncio.create_task(models.read_tags(api))
        await asked.wait()
        tags.pop()
        newer = asyncio.create_task(models.read_tags(api))
        for _ in range(10):
            await asyncio.sleep(0)
        answered.set()
        await asyncio.gather(newer, older)
    assert models.has("kept:latest") and not models.has("deleted:latest")


async def test_a_store_of_hundreds_of_models_does_not_make_the_record_too_big(
    view: FakeView, catalogue: Catalogue
) -> None:
    found = [
        Tag(
            f"hf.co/somebody/Some-Long-Name-{number}-Instruct-GGUF:Q4_K_M", size=1000, digest=f"{number:064x}"
        )
        for number in range(600)
    ]

    class Api(OllamaApi):
        async def tags(self) -> list[Tag]:
            return found

        async def capabilities(self, model: str) -> list[str]:
            return ["completion"]

    async with aiohttp.ClientSession() as session:
        models = OllamaEndpoints(view, catalogue, lambda: 1)
        await models.read_tags(Api(session, "http://127.0.0.1:1"))
    models.use_loaded([Loaded(found[-1].name, 1000, digest=found[-1].digest)])
    models.publish()
    assert len(encode(view.me)) < RECORD_LIMIT
    assert len(view.me.endpoints) > 200
    assert [endpoint.id for endpoint in view.me.endpoints if endpoint.loaded], "those in use come first"


async def test_memory_shared_with_a_gpu_is_counted_once(
    make: Make, view: FakeView, catalogue: Catalogue
) -> None:
    shared = replace(cpu(), pool="ram")
    view.update_me(devices=(replace(shared, id="Vulkan0", kind=Kind.GPU), shared))
    async with Standin([Known("small:latest", 1000), Known("huge:latest", 12 * GIB)]) as standin:
        ollama = make(standin.url)
        await ollama.start()
        await until(lambda: names(ollama))
        assert set(names(ollama)) == {"small:latest"}
        view.update_me(devices=(replace(cpu(), id="CUDA0", kind=Kind.GPU), cpu()))
        await until(lambda: "huge:latest" in names(ollama))


async def test_a_large_model_that_only_ollama_supports_is_an_endpoint(
    make: Make, standin: Standin, catalogue: Catalogue, tmp_path: Path
) -> None:
    OllamaStore(tmp_path / "store").model("huge:latest", tmp_path, architecture="gptoss")
    await catalogue.refresh()
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: "huge:latest" in names(ollama))


async def test_slots_and_address_are_read_from_ollamas_systemd_unit(make: Make, standin: Standin) -> None:
    service = {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_HOST": standin.url.removeprefix("http://")}
    ollama = make("", service=service, environ={"OLLAMA_NUM_PARALLEL": "2"})
    await ollama.start()
    await until(lambda: names(ollama))
    assert names(ollama)["small:latest"].slots == 4
    ours = make(standin.url, environ={"OLLAMA_NUM_PARALLEL": "2"})
    await ours.start()
    await until(lambda: names(ours))
    assert names(ours)["small:latest"].slots == 2


async def test_other_endpoints_of_the_record_are_kept(make: Make, standin: Standin, view: FakeView) -> None:
    head = Endpoint("d1", "m", "x", Backend.LOCAL, State.READY)
    view.update_me(endpoints=(head,))
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: len(view.me.endpoints) == 3)
    assert head in view.me.endpoints
    await standin.close()
    await until(lambda: view.me.endpoints == (head,))


async def test_loaded_models_are_reported_and_can_be_unloaded(make: Make, standin: Standin) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    await ask(standin, "small")
    await until(lambda: names(ollama)["small:latest"].loaded)
    endpoint = names(ollama)["small:latest"]
    assert (endpoint.bytes, endpoint.context) == (1000, 2048)
    assert endpoint.placed[0].device == "CPU"
    with ollama.busy(endpoint.id, None):
        assert not (await ollama.unload(endpoint.id)).ok
    assert (await ollama.unload(endpoint.id, force=True)).ok
    assert not standin.loaded
    assert not names(ollama)["small:latest"].loaded


async def test_the_expiry_of_a_loaded_model_is_reported(
    make: Make, standin: Standin, view: FakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    assert names(ollama)["small:latest"].expires == 0.0
    await ask(standin, "small")
    await until(lambda: names(ollama)["small:latest"].loaded)
    assert 200 < names(ollama)["small:latest"].expires <= 300
    version = view.me.version
    polls = standin.polls
    await until(lambda: standin.polls > polls + 3)
    assert view.me.version == version, "elapsed time alone does not change the record"
    monkeypatch.setattr("sollold.engines.ollama.endpoints._EXPIRY_SECONDS", 0.0)
    expires = names(ollama)["small:latest"].expires
    await until(lambda: names(ollama)["small:latest"].expires < expires)
    await ask(standin, "small", keep_alive=-1)
    await until(lambda: names(ollama)["small:latest"].expires == -1.0)


@pytest.mark.parametrize("text", ["", "soon", "0001-01-01T00:00:00Z"])
def test_an_invalid_expiry_time_counts_as_now(text: str) -> None:
    assert seconds_left(text, 1e9) == 0.0


async def test_a_model_used_by_other_clients_is_not_unloaded(make: Make, standin: Standin) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    await ask(standin, "small")
    await until(lambda: names(ollama)["small:latest"].loaded)
    assert not (await ollama.unload("ollama:small:latest")).ok


async def test_the_memory_of_loaded_models_is_reported(make: Make, standin: Standin) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    assert ollama.loaded_bytes() == {}
    await ask(standin, "small")
    await until(lambda: names(ollama)["small:latest"].loaded)
    assert ollama.loaded_bytes() == {"CPU": names(ollama)["small:latest"].bytes} != {"CPU": 0}


async def test_eviction_can_be_forbidden(make: Make, standin: Standin) -> None:
    await ask(standin, "small")
    ollama = make(standin.url, evict=False)
    await ollama.start()
    await until(lambda: names(ollama) and names(ollama)["small:latest"].loaded)
    refused = await ollama.unload("ollama:small:latest")
    assert not refused.ok and "ollama.evict" in refused.reason
    assert standin.loaded


async def test_reported_requests_are_in_the_record(make: Make, standin: Standin, view: FakeView) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    ollama.report("ollama:small:latest", 2, 3, 41.5)
    await until(lambda: names(ollama)["small:latest"].active == 2)
    endpoint = names(ollama)["small:latest"]
    assert (endpoint.waiting, endpoint.speed) == (3, 41.5)
    ollama.report("ollama:small:latest", 0, 0, 0.0)
    await until(lambda: names(ollama)["small:latest"].active == 0)
    assert names(ollama)["small:latest"].speed == 41.5, "an unknown speed does not replace a known one"


async def test_an_ollama_that_loads_a_model_is_not_considered_hung(
    make: Make, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.engines.ollama.api._PS_TIMEOUT", 0.1)
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    standin.ps_free.clear()
    polls = standin.polls
    await until(lambda: standin.polls > polls + 3 * _MAX_HANGS)
    assert names(ollama)
    standin.ps_free.set()


async def test_a_hung_ollama_is_removed_until_it_answers(
    make: Make, standin: Standin, view: FakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.engines.ollama.api._TIMEOUT", 0.1)
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    standin.awake.clear()
    await until(lambda: not names(ollama))
    assert ollama.url_of_api == ""
    standin.awake.set()
    await until(lambda: names(ollama))


@pytest.mark.parametrize("turns", range(4))
async def test_the_watch_ends_also_in_the_moment_of_a_use(make: Make, standin: Standin, turns: int) -> None:
    ollama = make(standin.url)
    ollama._poll = 60.0
    await ollama.start()
    await until(lambda: names(ollama))
    await asyncio.sleep(0.1)
    ollama._poll_now.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    assert ollama._task is not None
    ollama._task.cancel()
    await asyncio.wait({ollama._task}, timeout=5.0)
    assert ollama._task.done()


async def test_a_missing_ollama_is_no_problem(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[bool] = []
    connect = LocalOllama._connect

    async def recorded(ollama: LocalOllama) -> bool:
        attempts.append(await connect(ollama))
        return attempts[-1]

    monkeypatch.setattr(LocalOllama, "_connect", recorded)
    ollama = make("http://127.0.0.1:9")
    await ollama.start()
    await until(lambda: len(attempts) > 1)
    assert not any(attempts)
    assert ollama.endpoints() == ()
    assert ollama.trouble == ""


async def test_the_daemons_own_port_is_refused(make: Make, standin: Standin) -> None:
    ollama = make(standin.url, own_port=int(standin.url.rsplit(":", 1)[1]))
    await ollama.start()
    await until(lambda: ollama.trouble)
    assert "this daemon itself" in ollama.trouble
    assert ollama.endpoints() == ()


async def test_a_disabled_ollama_has_no_endpoints(make: Make, standin: Standin) -> None:
    ollama = make(standin.url, enabled=False)
    await ollama.start()
    assert ollama._task is None and ollama.endpoints() == ()


async def test_a_managed_ollama_is_started_restarted_and_ended(make: Make, tmp_path: Path) -> None:
    port = free_port()
    binary = tmp_path / "ollama"
    environment_file = tmp_path / "environment"
    binary.write_text(
        f"#!/bin/sh\nenv > {environment_file}\ncd {ROOT}\n"
        f'exec {sys.executable} -m tests.ollama_standin --model tiny:latest "$@"\n'
    )
    binary.chmod(0o755)
    ollama = make(
        f"http://127.0.0.1:{port}",
        manage=True,
        binary=str(binary),
        stores=(str(tmp_path / "mine"), "/other"),
        environ={"OLLAMA_MODELS": "/elsewhere", "OLLAMA_NUM_PARALLEL": "3"},
        service={"OLLAMA_NUM_PARALLEL": "7"},
    )
    await ollama.start()
    await until(lambda: names(ollama))
    assert names(ollama)["tiny:latest"].slots == 3
    environment = environment_file.read_text()
    assert f"OLLAMA_HOST=127.0.0.1:{port}" in environment
    assert "OLLAMA_NO_CLOUD=1" in environment
    assert f"OLLAMA_MODELS={tmp_path}/mine\n" in environment
    assert "OLLAMA_NOPRUNE=1" in environment
    own = ollama._own
    assert own is not None
    assert own._process is not None
    first = own._process.pid
    ollama.fail("ollama:tiny:latest", "no token for two minutes")
    await until(lambda: own._process is not None and own._process.pid != first)
    await until(lambda: names(ollama))
    second = own._process.pid
    await ollama.close()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def test_runners_left_by_a_killed_daemon_are_ended(make: Make, tmp_path: Path) -> None:
    mark = {**os.environ, MARK: Journal(tmp_path / "journal").mark}
    runner = await asyncio.create_subprocess_exec("/bin/sleep", "600", env=mark)
    try:
        await make("http://127.0.0.1:9", manage=True, binary="/nowhere/ollama").start()
        assert await asyncio.wait_for(runner.wait(), 10) == -signal.SIGKILL
    finally:
        if runner.returncode is None:
            runner.kill()
            await runner.wait()


async def test_another_ollama_at_the_address_of_a_managed_one_that_exited_is_used(
    make: Make, standin: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ollama = make(standin.url, manage=True, binary="/nowhere/ollama")
    own = ollama._own
    assert own is not None
    journal, log_file = Journal(tmp_path / "own"), tmp_path / "own.log"
    exited = await Process.start("ollama", ["/bin/true"], deployment="o", journal=journal, log_file=log_file)
    await exited.exited
    own._process = exited
    await ollama.start()
    await until(lambda: not own.ended and names(ollama))
    polls = standin.polls
    await until(lambda: standin.polls > polls + 6)
    assert names(ollama)
    assert caplog.text.count("stopped answering") == 1


async def test_a_list_of_an_ollama_that_is_gone_is_not_used(make: Make) -> None:
    ollama = make("http://127.0.0.1:9")

    class Api(OllamaApi):
        async def tags(self) -> list[Tag]:
            ollama._mark_gone()
            return [Tag("small:latest", size=1000, digest="s", capabilities=["completion"])]

        async def capabilities(self, model: str) -> list[str]:
            raise OllamaError("it is gone")

    async with aiohttp.ClientSession() as session:
        ollama._api = Api(session, "http://127.0.0.1:9")
        await ollama.refresh()
    assert not names(ollama) and not ollama.has("small:latest")


SLOW = """#!{python}
import os, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path in ("/api/version", "/api/tags", "/api/ps")
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(b'{{"version": "0.33.0", "models": []}}')
with Path({starts!r}).open("a") as starts:
    starts.write("x")
server = HTTPServer(("127.0.0.1", {port}), Answer)
while not Path({ready!r}).exists():
    time.sleep(0.01)
server.serve_forever()
"""


async def test_a_managed_ollama_that_starts_slowly_is_not_restarted(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.engines.ollama.api._TIMEOUT", 0.1)
    port, starts, ready = free_port(), tmp_path / "starts", tmp_path / "ready"
    binary = tmp_path / "ollama"
    binary.write_text(SLOW.format(python=sys.executable, port=port, starts=str(starts), ready=str(ready)))
    binary.chmod(0o755)
    results: list[bool] = []
    answers = LocalOllama._answers

    async def recorded(ollama: LocalOllama) -> bool:
        results.append(await answers(ollama))
        return results[-1]

    monkeypatch.setattr(LocalOllama, "_answers", recorded)
    ollama = make(f"http://127.0.0.1:{port}", manage=True, binary=str(binary))
    await ollama.start()
    await until(lambda: starts.exists() and len(results) > 5)
    assert ollama.version == ""
    ready.touch()
    await until(lambda: ollama.version)
    assert starts.read_text() == "x", "started once"


async def test_a_managed_ollama_that_crashes_repeatedly_is_restarted_with_a_backoff(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, starts, ready = free_port(), tmp_path / "starts", tmp_path / "ready"
    ready.touch()
    binary = tmp_path / "ollama"
    text = SLOW.format(python=sys.executable, port=port, starts=str(starts), ready=str(ready))
    ends = "        self.path == '/api/ps' and os._exit(1)\n"
    binary.write_text(text.replace("        known =", ends + "        known ="))
    binary.chmod(0o755)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        if seconds >= 1.0:
            pauses.append(seconds)
            seconds = 0.01
        await sleep(seconds)

    monkeypatch.setattr("sollold.engines.ollama.service._RETRY_SECONDS", (5.0, 60.0))
    monkeypatch.setattr("sollold.engines.ollama.service.asyncio.sleep", pause)
    ollama = make(f"http://127.0.0.1:{port}", manage=True, binary=str(binary))
    await ollama.start()
    await until(lambda: len(starts.read_text() if starts.exists() else "") > 4)
    assert pauses[:3] == [5.0, 10.0, 20.0]


async def test_a_missing_binary_of_a_managed_ollama_is_reported(make: Make) -> None:
    ollama = make("http://127.0.0.1:9", manage=True, binary="/nowhere/ollama")
    await ollama.start()
    await until(lambda: ollama.trouble)
    assert "/nowhere/ollama" in ollama.trouble


@pytest.mark.parametrize(
    ("url", "host", "expected"),
    [
        ("", "", "http://127.0.0.1:11434"),
        ("", "0.0.0.0", "http://127.0.0.1:11434"),
        ("", "192.168.1.5:8000", "http://192.168.1.5:8000"),
        ("", ":1234", "http://127.0.0.1:1234"),
        ("", "https://box.lan", "https://box.lan:443"),
        ("http://[::1]:11434/", "x", "http://[::1]:11434"),
        ("", "host:notaport", "http://host:11434"),
        ("", "[::1", "http://127.0.0.1:11434"),
        ("http://[::1", "", "http://127.0.0.1:11434"),
    ],
)
def test_ollamas_address_from_setting_and_environment(url: str, host: str, expected: str) -> None:
    assert address(url, {"OLLAMA_HOST": host} if host else {}) == expected


def test_addresses_of_this_machine_are_recognized() -> None:
    assert is_here("http://127.0.0.1:11434") and is_here("http://localhost")
    assert is_here(f"http://{socket.gethostname()}:1") and is_here("http://no-such-name.invalid:1")
    assert not is_here("http://192.0.2.1:11434") and not is_here("http://[2001:db8::1]:11434")


async def test_an_ollama_host_of_another_machine_is_not_used(
    make: Make, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.engines.ollama.connect.is_here", lambda url: False)
    ollama = make("", environ={"OLLAMA_HOST": standin.url})
    await ollama.start()
    await until(lambda: ollama.trouble)
    assert f"OLLAMA_HOST names {standin.url}, which is another machine" in ollama.trouble
    assert not names(ollama)
    named = make(standin.url)
    await named.start()
    await until(lambda: names(named))
    assert not named.trouble


async def ask(standin: Standin, model: str, **more: Any) -> None:
    from aiohttp import ClientSession

    body = {"model": model, "prompt": "hi", "stream": False, "options": {"num_ctx": 2048}, **more}
    async with ClientSession() as session, session.post(f"{standin.url}/api/generate", json=body) as answer:
        assert answer.status == 200


async def test_only_models_created_through_the_daemon_can_be_deleted(
    make: Make, standin: Standin, catalogue: Catalogue
) -> None:
    ollama = make(standin.url)
    await ollama.start()
    await until(lambda: names(ollama))
    ollama._poll = 3600.0
    standin.models["mine:latest"] = Known("mine:latest")
    await ollama.refresh()
    assert "mine:latest" in names(ollama)
    assert not await ollama.delete("mine:latest"), "it was not created through the daemon"
    ollama.created.add("mine")
    assert await ollama.delete("mine:latest")
    assert "mine:latest" not in standin.models
    assert "mine:latest" not in names(ollama)
    assert not await ollama.delete("mine:latest")


def test_names_recorded_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    created = CreatedModels(tmp_path / "models.json")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(created.add, [f"m{number}" for number in range(40)]))
    assert all(f"m{number}" in created for number in range(40))


def test_a_list_of_created_models_that_can_not_be_read_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = CreatedModels(tmp_path / "models.json")
    created.add("first:latest")

    def fail(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        created.add("second:latest")
        assert "first:latest" not in created
    assert "first:latest" in created
