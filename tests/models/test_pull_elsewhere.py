"""Pulling models from outside the cluster: by an Ollama, and from Hugging Face."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from pathlib import Path

import pytest
from aiohttp import web

from sollold.models.transfer import huggingface_hub
from sollold.models.transfer.huggingface_hub import HubSource, choose
from sollold.models.transfer.pull_progress import PullError
from tests.http_double import HttpDouble
from tests.models.hub_double import HubDouble
from tests.models.pulling import PART, ThreeNodes, big, sole
from tests.models.registry_double import RegistryDouble
from tests.models.stores import write_gguf
from tests.ollama_standin import Known, Standin


async def test_a_model_is_pulled_by_ollama(three: ThreeNodes) -> None:
    a, _, _ = three.nodes
    await three.start()
    async with Standin([Known("x:latest")]) as standin:
        a.ollama = standin.url
        lines = await a.pull("llama3.2:3b")
        assert lines[-1] == {"status": "success"}
        assert any(line.get("completed") == line.get("total") != None for line in lines)  # noqa: E711
        assert "llama3.2:3b" in standin.models
        assert "insecure" not in standin.requests[-1][1]
        async for _ in a.puller.pull("10.0.0.1:5000/x/y", insecure=True):
            pass
        assert standin.requests[-1][1]["insecure"] is True
        with pytest.raises(PullError, match="does not exist") as caught:
            await a.pull("missing-one")
        assert caught.value.missing


class SlowOllama(HttpDouble):
    """An Ollama that sends one status and then nothing until `proceed` is set."""

    def __init__(self, status: str) -> None:
        self.status, self.proceed = status, asyncio.Event()

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/api/pull", self._pull)
        return await self.serve(app)

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(json.dumps({"status": self.status}).encode() + b"\n")
        await self.proceed.wait()
        await answer.write(b'{"status":"success"}\n')
        return answer


async def test_a_pull_by_a_silent_ollama_times_out(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.transfer.ollama_pull._SILENCE_SECONDS", 0.2)
    a, _, _ = three.nodes
    await three.start()
    ollama = SlowOllama("pulling 0123456789ab")
    a.ollama = await ollama.start()
    try:
        with pytest.raises(PullError, match="sent nothing for"):
            await a.pull("llama3.2:3b")
    finally:
        await ollama.close()


async def test_a_silent_ollama_is_waited_for_while_it_verifies(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.transfer.ollama_pull._SILENCE_SECONDS", 0.2)
    a, _, _ = three.nodes
    await three.start()
    ollama = SlowOllama("verifying sha256 digest")
    a.ollama = await ollama.start()
    pulling = asyncio.create_task(a.pull("llama3.2:3b"))
    try:
        await asyncio.wait({pulling}, timeout=0.6)
        ollama.proceed.set()
        assert (await pulling)[-1] == {"status": "success"}
    finally:
        await ollama.close()


async def test_a_pull_without_any_source_is_refused(three: ThreeNodes) -> None:
    await three.start()
    a = three.nodes[0]
    with pytest.raises(PullError, match=r"no node of the cluster has nothing:latest; .* can't be reached"):
        await a.pull("nothing")
    with pytest.raises(PullError, match=r"no node of the cluster has 10\.0\.0\.1:5000/x/y:latest") as caught:
        await a.pull("10.0.0.1:5000/x/y")
    assert caught.value.missing
    with pytest.raises(PullError, match=r"^invalid model name: '\.\.' in '\.\./etc' may have only"):
        await three.nodes[0].pull("../etc")


async def test_an_interrupted_pull_from_the_hub_is_resumed(
    three: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubSource, "patience", 0.0)
    a, _, _ = three.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q8_0.gguf": b"x", "Tiny-Q4_K_M.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        hub.cut_after = 2
        with pytest.raises(PullError):
            await asyncio.wait_for(a.pull("hf.co/org/Tiny-GGUF:Q4_K_M"), 30)
        hub.cut_after = 1 << 30
        fetched = len(hub.ranges)
        lines = await a.pull("hf.co/org/Tiny-GGUF:Q4_K_M")
        assert lines[-1]["status"] == "success"
        assert len(hub.ranges) - fetched < -(-len(content) // PART)
        model = a.catalogue.get("hf.co/org/Tiny-GGUF:Q4_K_M")
        assert model is not None
        assert not model.unusable
        assert sole(a.catalogue.own).read_bytes() == content
        with pytest.raises(PullError, match="it has Q4_K_M, Q8_0") as caught:
            await a.pull("hf.co/org/Tiny-GGUF:Q2_K")
        assert caught.value.missing
        with pytest.raises(PullError, match="is not on") as caught:
            await a.pull("hf.co/org/Other:Q2_K")
        assert caught.value.missing
    finally:
        await hub.close()


async def test_a_long_list_of_files_does_not_block_the_loop(
    three: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = three.nodes
    threads = []

    def choose_elsewhere(paths: list[str], tag: str) -> tuple[str, ...]:
        threads.append(threading.current_thread())
        return choose(paths, tag)

    monkeypatch.setattr(huggingface_hub, "choose", choose_elsewhere)
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q8_0.gguf": big(tmp_path / "hub.gguf").read_bytes()})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        assert (await a.pull("hf.co/org/Tiny-GGUF:Q8_0"))[-1] == {"status": "success"}
        assert threads and threading.main_thread() not in threads
    finally:
        await hub.close()


async def test_a_model_is_pulled_from_ollamas_registry_without_an_ollama(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, _, _ = three.nodes
    content = big(tmp_path / "tiny.gguf").read_bytes()
    texts = {"template": "{{ .Prompt }}", "system": "Be brief.", "params": '{"num_ctx": 512}'}
    registry = RegistryDouble(content, **texts)
    a.registry.base = await registry.start()
    try:
        await three.start()
        assert (await a.pull("tiny"))[-1] == {"status": "success"}
        model = a.catalogue.get("tiny:latest")
        assert model is not None
        assert (model.template, model.system, model.params) == tuple(texts.values())
        assert model.manifest == hashlib.sha256(registry.manifest.encode()).hexdigest()
        assert not model.unusable
        assert sole(a.catalogue.own).read_bytes() == content
        sent = registry.sent
        assert (await a.pull("tiny"))[-1] == {"status": "success"}
        assert registry.sent == sent
        registry.put(content, **{**texts, "system": "Be verbose."})
        assert (await a.pull("tiny"))[-1] == {"status": "success"}
        (model,) = a.catalogue.models
        assert (model.name, model.system) == ("tiny:latest", "Be verbose.")
        with pytest.raises(PullError, match="tiny:70b is not in Ollama's registry") as caught:
            await a.pull("tiny:70b")
        assert caught.value.missing
    finally:
        await registry.close()


async def test_a_second_name_is_not_replaced_by_a_model_of_the_registry(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, _, _ = three.nodes
    big(a.folder / "m" / "mine.gguf")
    registry = RegistryDouble(big(tmp_path / "tiny.gguf", seed=1).read_bytes())
    a.registry.base = await registry.start()
    try:
        await three.start()
        mine = a.catalogue.get("mine:latest")
        assert mine is not None
        await a.own.copy(mine, "tiny:latest")
        assert (await a.pull("tiny"))[-1] == {"status": "success"}
        model = a.catalogue.get("tiny:latest")
        assert model is not None
        assert model.digest == mine.digest
    finally:
        await registry.close()


async def test_a_model_that_only_ollama_runs_is_not_downloaded(three: ThreeNodes, tmp_path: Path) -> None:
    a, _, _ = three.nodes
    registry = RegistryDouble(write_gguf(tmp_path / "m.gguf", architecture="gptoss").read_bytes())
    a.registry.base = await registry.start()
    try:
        await three.start()
        with pytest.raises(PullError, match=r"Stock llama\.cpp can't read this file"):
            await a.pull("tiny")
        assert not a.catalogue.models
    finally:
        await registry.close()


async def test_an_adapter_alone_is_refused(three: ThreeNodes, tmp_path: Path) -> None:
    a, _, _ = three.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("org/Lora", {"adapter-Q8_0.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        with pytest.raises(PullError, match="the files contain no model"):
            await a.pull("hf.co/org/Lora:Q8_0")
    finally:
        await hub.close()


async def test_the_hub_is_used_when_ollama_fails(three: ThreeNodes, tmp_path: Path) -> None:
    a, _, _ = three.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("missing/Tiny-GGUF", {"Tiny-Q8_0.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        async with Standin([]) as standin:
            a.ollama = standin.url
            standin.refuses_pulls = True
            lines = await a.pull("hf.co/missing/Tiny-GGUF:Q8_0")
            assert lines[-1] == {"status": "success"}
            assert [path for path, _ in standin.requests] == ["/api/pull"]
            assert sole(a.catalogue.own).read_bytes() == content
            with pytest.raises(PullError, match="Ollama could not pull"):
                await a.pull("llama3.2:3b")
    finally:
        await hub.close()


async def test_the_registry_is_used_when_the_nodes_fail(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, _ = three.nodes
    content = big(tmp_path / "tiny.gguf").read_bytes()
    registry = RegistryDouble(content)
    a.registry.base = await registry.start()
    b.registry.base = a.registry.base
    try:
        await three.start()
        await b.pull("tiny")
        await a.library.lists.refresh("b")
        a.calls.cut.add("b")
        assert (await a.pull("tiny"))[-1] == {"status": "success"}
        assert sole(a.catalogue.own).read_bytes() == content
    finally:
        await registry.close()


async def test_a_failure_of_nodes_and_registry_names_both(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await a.library.lists.refresh("b")
    a.calls.cut.add("b")
    with pytest.raises(PullError, match=r"node b could not be reached; 127\.0\.0\.1:9 can't be reached"):
        await a.pull("tiny")
