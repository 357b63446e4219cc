"""``/api/create`` with the text of a Modelfile, as older clients send it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.ollama.modelfile_text import modelfile_fields
from sollold.errors import Refusal
from tests.api.api_parts import (
    PlainLibrary,
    PlainRelayed,
    ScriptedRelay,
    ScriptedService,
    model,
    parts,
)
from tests.api.conftest import Serve

TEXT = '''# mine
FROM demo
parameter temperature 0.5
PARAMETER num_ctx 4096
PARAMETER stop "<|end|>"
PARAMETER stop b
SYSTEM """You are
kind. # not a comment
"""
TEMPLATE "{{ .Prompt }}"

MESSAGE user Hello there
MESSAGE assistant """Hi"""
LICENSE MIT
'''


def test_a_modelfile_is_converted_to_fields() -> None:
    assert modelfile_fields(TEXT) == {
        "from": "demo",
        "parameters": {"temperature": 0.5, "num_ctx": 4096, "stop": ["<|end|>", "b"]},
        "system": "You are\nkind. # not a comment\n",
        "template": "{{ .Prompt }}",
        "messages": [
            {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hi"},
        ],
        "license": ["MIT"],
    }
    assert modelfile_fields("FROM demo")["from"] == modelfile_fields("FROM demo\r\n\r\n")["from"] == "demo"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("SYSTEM hi", "no FROM"),
        ("FROM ./a.gguf", "model folder"),
        ("FROM /models/a", "model folder"),
        ("FROM demo\nADAPTER ./x", "ADAPTER is not supported"),
        ("hello", "not a command"),
        ("FROM demo\n<>", "not a command"),
    ],
)
def test_unsupported_modelfiles_are_refused(text: str, why: str) -> None:
    with pytest.raises(Refusal, match=why) as caught:
        modelfile_fields(text)
    assert "system, template, parameters" in caught.value.message


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ('SYSTEM "a\nb"', "system", "a\nb"),
        ('SYSTEM a "b', "system", 'a "b'),
        ('SYSTEM """say "a""""', "system", 'say "a"'),
        ('LICENSE """one\x0ctwo\u2028"""', "license", ["one\x0ctwo\u2028"]),
        ("MESSAGE\tuser\thi  there", "messages", [{"role": "user", "content": "hi  there"}]),
        ('MESSAGE user "a\nb"', "messages", [{"role": "user", "content": "a\nb"}]),
        ('PARAMETER\tstop\t"x y"', "parameters", {"stop": ["x y"]}),
        ("PARAMETER  seed   7", "parameters", {"seed": 7}),
    ],
)
def test_values_are_parsed_as_in_ollama(text: str, field: str, value: object) -> None:
    for written in (text, text.replace("\n", "\r\n")):
        assert modelfile_fields(f"FROM a\n{written}")[field] == value


ODD = ('SYSTEM """a', "\x00", '"' * 5000, "#" * 5000, "\n" * 99, '"""' * 3000, " " * 9000)
LONG = ("FROM a\n" + 'SYSTEM """a\n' * 30_000, "FROM a\n" + 'SYSTEM "x' * 40_000, "a" * 390_000)


@pytest.mark.parametrize("text", [*ODD, *LONG, "FROM " + "a" * 10**6], ids=lambda text: text[:20])
def test_any_text_is_parsed_or_refused_quickly(text: str) -> None:
    began = time.thread_time()
    with contextlib.suppress(Refusal):
        modelfile_fields(text)
    assert time.thread_time() - began < 0.5


async def test_ollama_is_sent_the_fields(serve: Serve, http: ClientSession) -> None:
    """Current versions of Ollama ignore ``modelfile``."""
    relay = ScriptedRelay(PlainRelayed(b'{"status":"success"}\n'))
    url = await serve(parts(library=PlainLibrary(model(source="ollama")), relay=relay))
    body = {"name": "mine", "modelfile": "FROM demo\nSYSTEM Be kind.", "from": "", "quantize": None}
    async with http.post(f"{url}/api/create", json=body) as answer:
        assert answer.status == 200
    ((_, _, sent, base),) = relay.sent
    assert json.loads(sent) == {"name": "mine", "from": "demo", "system": "Be kind."} and base == "demo"


async def test_create_makes_a_name_with_overrides(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model())
    url = await serve(parts(ScriptedService(), library=library))
    body: dict[str, Any] = {"name": "mine", "modelfile": TEXT, "stream": False}
    async with http.post(f"{url}/api/create", json=body) as answer:
        assert answer.status == 200, await answer.text()
    assert library.copied == [("demo:latest", "mine", ())]
    overrides = library.told
    assert overrides is not None and overrides.system == "You are\nkind. # not a comment\n"
    assert overrides.params is not None and json.loads(overrides.params)["num_ctx"] == 4096
    async with http.post(f"{url}/api/create", json={**body, "system": "other"}) as answer:
        assert answer.status == 200
    assert library.told is not None and library.told.system == "other"
    async with http.post(f"{url}/api/create", json={**body, "modelfile": "FROM ./a.gguf"}) as answer:
        assert answer.status == 400 and "model folder" in (await answer.json())["error"]
