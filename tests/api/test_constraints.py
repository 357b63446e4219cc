"""Constraints on the output in the fields of other servers (vLLM, TGI), and invalid fields."""

from __future__ import annotations

import re
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.openai.constraints import with_own_constraints
from sollold.errors import Refusal
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CHOICES = 'root ::= "yes" | "n\\"o"'
REGEX = r'root ::= ( [0-9]{3} "-" ( [a-c] + | "x" ) )'

MAPPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_json": SCHEMA}, {"response_format": NAMED}),
    ({"guided_json": '{"type": "object"}'}, {"response_format": {"type": "json_schema"}}),
    ({"structured_outputs": {"json": SCHEMA}}, {"response_format": NAMED}),
    ({"response_format": {"type": "json", "value": SCHEMA}}, {"response_format": NAMED}),
    ({"guided_choice": ["yes", 'n"o']}, {"grammar": CHOICES}),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, {"grammar": CHOICES}),
    ({"guided_regex": r"^\d{3}-(?:[a-c]+|x)$"}, {"grammar": REGEX}),
    ({"response_format": {"type": "regex", "value": r"\d{3}-([a-c]+|x)"}}, {"grammar": REGEX}),
    ({"guided_regex": r"^a\$$|^b$"}, {"grammar": 'root ::= ( "a" "$" | "b" )'}),
    ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ({"guided_json": None, "guided_choice": None}, {}),
]


@pytest.mark.parametrize(("fields", "mapped"), MAPPED, ids=repr)
def test_constraints_of_other_servers_are_mapped(fields: dict[str, Any], mapped: dict[str, Any]) -> None:
    body, warnings = with_own_constraints({"model": "demo", **fields}, chat=True)
    assert not warnings and body.keys() == {"model", *mapped}
    for name, value in mapped.items():
        if isinstance(value, str):
            assert re.sub(r"\s", "", body[name]) == re.sub(r"\s", "", value)
        else:
            assert value.items() <= body[name].items()
    schema = mapped.get("response_format", {}).get("json_schema")
    if schema:
        assert with_own_constraints(fields, chat=False)[0] == {"json_schema": SCHEMA}


def test_a_body_without_such_constraints_is_unchanged() -> None:
    body = {"model": "demo", "grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}
    assert with_own_constraints(body, chat=True) == (body, ())


REFUSED = [
    ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "only one of"),
    ({"guided_json": "{"}, "not JSON"),
    ({"guided_choice": [1]}, "list of strings"),
    ({"guided_regex": "(?=a)b"}, "can't be enforced"),
    ({"guided_grammar": "?start: x"}, "GBNF"),
]


@pytest.mark.parametrize(("fields", "why"), REFUSED, ids=repr)
def test_unsupported_constraints_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal, match=why):
        with_own_constraints(fields, chat=True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_fields_without_effect_cause_a_warning(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    body = {"model": "demo", "messages": [{"role": "user", "content": "a"}], "prompt": "a", "stream": True}
    body |= {"guided_choice": ["a"], "guided_decoding_backend": "xgrammar", "structured_outputs": {"odd": 1}}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200
        warned = answer.headers["X-Sollold-Warning"]
    assert "guided_decoding_backend has no effect" in warned and "structured_outputs.odd has" in warned
    sent = call_of(service).body
    assert sent["grammar"] == 'root ::= "a"' and not sent.keys() & {"guided_choice", "structured_outputs"}


@pytest.mark.llama
async def test_a_models_output_matches_the_constraint(engines: dict[str, str], http: ClientSession) -> None:
    for fields, pattern in (
        ({"guided_choice": ["yes", 'n"o']}, 'yes|n"o'),
        ({"guided_regex": r"\d{3}-([a-c]{1,4}|é\.)"}, r"\d{3}-([a-c]{1,4}|é\.)"),
    ):
        grammar = with_own_constraints(fields, chat=False)[0]["grammar"]
        for seed in range(5):
            body = {"prompt": "a", "n_predict": 40, "temperature": 3, "seed": seed, "grammar": grammar}
            async with http.post(engines["random:latest"] + "/completion", json=body) as response:
                answer = await response.json()
            assert response.status == 200 and re.fullmatch(pattern, answer["content"]), answer


async def test_tokens_outside_the_vocabulary_are_refused(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(b'{"content": "a"}')
    url = await serve(parts(service, model(vocabulary="512:abc")))
    for tokens, status in (([511], 200), ([1, 512], 400), ([-1], 400), ([2**40], 400)):
        async with http.post(url + "/detokenize", json={"model": "demo", "tokens": tokens}) as answer:
            assert answer.status == status, await answer.text()
            assert status == 200 or "_M_range_check" not in await answer.text()


async def test_shell_call_output_reaches_the_engine(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    ended = {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
    items = [
        {"role": "user", "content": "List."},
        {"type": "shell_call", "call_id": "c1", "action": {"commands": ["ls"]}, "status": "completed"},
        {"type": "shell_call_output", "call_id": "c1", "output": [ended], "max_output_length": 100},
    ]
    body = {"model": "demo", "input": items, "stream": True}
    async with http.post(url + "/v1/responses", json=body) as answer:
        assert answer.status == 200, await answer.text()
    (result,) = [message for message in call_of(service).body["messages"] if message["role"] == "tool"]
    assert "a.py" in result["content"] and '"exit_code":0' in result["content"]


@pytest.mark.parametrize("path", ["load", "plan", "route"])
async def test_unknown_fields_of_a_load_are_refused(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(ScriptedService()))
    async with http.post(f"{url}/api/cluster/{path}", json={"model": "demo", "contxt": 5}) as answer:
        assert answer.status == 400 and "contxt" in await answer.text()
