"""A model's template on a real llama-server, and a real model without a template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.cluster.gossip.record import State
from sollold.engines.address import EngineAddress
from sollold.engines.install.find import Llama
from sollold.models.model import Model
from sollold.models.stores import folders
from sollold.models.stores.header_facts import HeaderFactsCache
from sollold.models.stores.read_store import Reader
from sollold.models.templates.jinja import RAW, fingerprint
from tests.agent_cluster import plan, running_agents
from tests.gguf.size import Size
from tests.gguf.writer import write
from tests.models.test_templates import CALLED, CHAT, GEMMA, LLAMA, TOOLED, TOOLS
from tests.real_model import gemma

pytestmark = pytest.mark.llama


def listed(folder: Path) -> Model:
    """The only model of a folder, as the catalogue lists it."""
    reader = Reader(HeaderFactsCache(folder / "headers.json"), folder / "links")
    (model,) = reader.seen(lambda: folders.scan_folder(folder), lambda: None).models
    return model


@asynccontextmanager
async def served(folder: Path, llama: Llama, model: Model) -> AsyncIterator[EngineAddress]:
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[model.digest] = model
        templated = replace(plan(model, "a", context=2048, size=1 << 30), template=model.template)
        assert (await cluster.deploy("d", templated)).ok
        endpoint = await cluster.until("a", "d", State.READY, seconds=120.0)
        assert endpoint.template == fingerprint(model.template)
        engine = cluster.agents["a"].deployments.address("d")
        assert engine is not None
        yield engine


async def post(engine: EngineAddress, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(headers=engine.headers) as http,
        http.post(engine.url + path, json=body) as answer,
    ):
        reply = await answer.json()
        assert answer.status == 200, reply
        return dict(reply)


@pytest.mark.parametrize(
    ("template", "body", "ending"),
    [
        (LLAMA, {"messages": CHAT}, "<|assistant|>\nyo<|eot|><|user|>\na\n\nb<|eot|><|assistant|>\n"),
        (GEMMA, {"messages": CHAT}, "<start_of_turn>user\na\n\nb<end_of_turn>\n<start_of_turn>model\n"),
        (TOOLED, {"messages": CALLED, "tools": TOOLS}, "42<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
async def test_the_prompt_is_rendered_by_the_template(
    folder: Path, llama: Llama, tmp_path: Path, template: str, body: dict[str, Any], ending: str
) -> None:
    write(tmp_path / "tiny.gguf", "llama", Size(layers=2))
    model = replace(listed(tmp_path), template=template)
    async with served(folder, llama, model) as engine:
        assert (await post(engine, "/apply-template", body))["prompt"].endswith(ending)


async def test_a_strict_template_refuses_roles_that_do_not_alternate(
    folder: Path, llama: Llama, tmp_path: Path
) -> None:
    write(tmp_path / "tiny.gguf", "llama", Size(layers=2), template="strict")
    model = listed(tmp_path)
    assert model.template == "", "the file's own template is used"
    async with served(folder, llama, model) as engine:
        fine = await post(engine, "/apply-template", {"messages": CHAT[:-1]})
        assert fine["prompt"].endswith("<|user|>\na<|end|>\n<|assistant|>\n")
        async with aiohttp.ClientSession(headers=engine.headers) as http:
            async with http.post(f"{engine.url}/apply-template", json={"messages": CHAT}) as answer:
                assert answer.status != 200 and "must alternate" in await answer.text()


async def test_a_real_model_without_a_template_completes_the_users_text(
    folder: Path, llama: Llama, tmp_path: Path
) -> None:
    (tmp_path / "gemma-3-270m-Q4_K_M.gguf").symlink_to(await asyncio.to_thread(gemma))
    model = listed(tmp_path)
    assert (model.template, model.capabilities) == (RAW, ("completion",))
    async with served(folder, llama, model) as engine:
        text = "The capital of France is"
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        chat_reply = await post(engine, "/v1/chat/completions", chat)
        raw = await post(engine, "/v1/completions", {"prompt": text, "max_tokens": 8, "temperature": 0})
        assert chat_reply["choices"][0]["message"]["content"] == raw["choices"][0]["text"]
        assert "France" in raw["choices"][0]["text"]
        assert chat_reply["usage"]["prompt_tokens"] == raw["usage"]["prompt_tokens"] < 10
